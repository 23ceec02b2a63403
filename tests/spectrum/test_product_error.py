"""Intervals of a run whose products are those of a matrix nearby hold the numbers of the exact one."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

import hesd_fast as hesd
from hesd_fast.errors import CheckpointError
from hesd_fast.estimate import ProductError
from hesd_fast.lanczos.block_tridiagonal import BlockTridiagonal


def matrices(size: float, kind: str, seed: int):
    """A matrix with positive and negative eigenvalues, and one nearby."""
    generator = np.random.default_rng(seed)
    basis = np.linalg.qr(generator.standard_normal((60, 60)))[0]
    values = np.concatenate((np.geomspace(1e-3, 1.0, 50), -np.geomspace(1e-3, 0.1, 10)))
    exact = (basis * values) @ basis.T
    if kind == "rank one":  # along the eigenvector of the largest eigenvalue
        vector = basis[:, int(np.argmax(values))]
        error = -size * np.outer(vector, vector)
    elif kind == "definite":
        root = generator.standard_normal((60, 60))
        error = root @ root.T
        error *= size / np.linalg.norm(error, 2)
    else:
        root = generator.standard_normal((60, 60))
        error = root + root.T
        error *= size / np.linalg.norm(error, 2)
    return exact, exact + error


def with_error(found: BlockTridiagonal, exact, near) -> BlockTridiagonal:
    error, n = near - exact, len(exact)
    known = ProductError(np.linalg.norm(error, 2), np.linalg.norm(error) / np.sqrt(n), abs(np.trace(error)) / n)
    return dataclasses.replace(found, product_error=known)


@pytest.mark.parametrize("kind", ["rank one", "definite", "indefinite"])
@pytest.mark.parametrize("size", [1e-3, 0.3])
def test_intervals_hold_the_numbers_of_the_exact_matrix(kind, size):
    missed = 0
    for seed in range(6):
        exact, near = matrices(size, kind, seed)
        run = hesd.block_lanczos(torch.from_numpy(near), steps=15, block_size=4, seed=seed, probe_kind="gaussian")
        measure = hesd.SpectralMeasure.from_tridiagonal(with_error(run, exact, near))
        found, values = hesd.criteria(measure), np.linalg.eigvalsh(exact)
        plus, minus = values.clip(0.0).sum(), (-values).clip(0.0).sum()
        truth = [
            (measure.lambda_max, values[-1]),
            (measure.lambda_min, values[0]),
            (measure.trace, values.sum()),
            (found.r_e, -values[0] / values[-1]),
            (found.k_mass, minus / plus),
            (found.balance, (plus - minus) / (plus + minus)),
        ]
        missed += sum(not estimate.low <= true <= estimate.high for estimate, true in truth)
        largest = measure.tridiagonals[0].top(1)[0]
        missed += not (np.abs(values - largest.value) <= largest.high - largest.value).any()
    assert missed <= 1  # of 42, most of which are certain


def test_the_band_of_the_distribution_function_moves_by_the_error():
    exact, near = matrices(0.05, "indefinite", 0)
    probes = torch.eye(60, dtype=torch.float64) * 60**0.5  # so that the measure is that of the matrix
    run = hesd.block_lanczos(torch.from_numpy(near), steps=1, probes=probes)
    points = np.linspace(-0.3, 1.2, 200)
    share = np.searchsorted(np.linalg.eigvalsh(exact), points) / 60
    low, high = hesd.SpectralMeasure.from_tridiagonal(with_error(run, exact, near)).cdf_bounds(points)
    assert np.all((low <= share + 1e-12) & (share <= high + 1e-12))
    low, high = hesd.SpectralMeasure.from_tridiagonal(run).cdf_bounds(points)
    assert not np.all((low <= share + 1e-12) & (share <= high + 1e-12))


def test_an_error_is_kept_in_files_and_checked():
    run = hesd.block_lanczos(torch.eye(9), steps=1, block_size=2)
    assert run.product_error is None
    assert BlockTridiagonal.from_dict(run.to_dict()).product_error is None
    kept = dataclasses.replace(run, product_error=ProductError(0.1, 0.02, 0.01))
    assert BlockTridiagonal.from_dict(kept.to_dict()).product_error == kept.product_error
    assert kept.truncated(1).product_error == kept.product_error
    with pytest.raises(ValueError, match="finite and not negative"):
        ProductError(-1.0, 0.0, 0.0)
    content = kept.to_dict()
    content["product_error"]["largest"] = -1.0
    with pytest.raises(CheckpointError, match="product_error: a ProductError needs numbers"):
        BlockTridiagonal.from_dict(content)
