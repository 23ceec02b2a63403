"""Spectra that tests share, matrices that have them, and how far apart two quadratures are."""

from __future__ import annotations

import numpy as np
from numpy_block_lanczos import Array, rotation

SIZE = 120
_RANDOM = np.random.default_rng(0)
SPECTRA: dict[str, Array] = {
    "bulk and outliers": np.concatenate([_RANDOM.normal(0.0, 0.05, SIZE - 5), [-0.7, 1.0, 2.0, 4.0, 9.0]]),
    "indefinite": _RANDOM.normal(0.0, 1.0, SIZE),
    "low rank": np.concatenate([np.zeros(SIZE - 4), [-1.0, 0.5, 2.0, 3.0]]),
    "repeated": np.repeat([-1.0, 0.0, 2.0], SIZE // 3),
    "all negative": -_RANDOM.uniform(0.5, 3.0, SIZE),
    "zero": np.zeros(SIZE),
}


def dense(name: str) -> Array:
    basis = rotation(SIZE, 1)
    return (basis * SPECTRA[name]) @ basis.T


def scale_of(name: str) -> float:
    return float(np.abs(SPECTRA[name]).max())


def hessian_like(n=300, seed=0):
    rng = np.random.default_rng(seed)
    return np.concatenate([rng.normal(0, 1e-2, n - 6), [-0.7, -0.2, 1.0, 2.0, 5.0, 10.0]])


def quadrature(tridiagonal):
    """Ritz values and their weights, averaged over the probes."""
    values, vectors, _ = tridiagonal.ritz()
    weights = ((tridiagonal.start @ vectors[: tridiagonal.start.shape[1]]) ** 2).sum(axis=0)
    return values, weights / weights.sum()


def distance(one, other):
    """Wasserstein-1 distance: the area between the two distribution functions."""
    nodes = np.concatenate([one[0], other[0]])
    order = np.argsort(nodes, kind="stable")
    height = np.cumsum(np.concatenate([one[1], -other[1]])[order])
    return float((np.abs(height[:-1]) * np.diff(nodes[order])).sum())
