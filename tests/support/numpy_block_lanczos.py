"""Block Lanczos in plain NumPy, float64, fully reorthogonalized: the independent source of test matrices."""

from __future__ import annotations

import numpy as np
from lanczos_driver import times
from numpy.typing import NDArray

from hesd_fast.lanczos.block_tridiagonal import BlockTridiagonal

Array = NDArray[np.float64]
EPSILON = 2.0**-52


def rademacher(probes: int, size: int, seed: int) -> Array:
    return np.random.default_rng(seed).choice([-1.0, 1.0], size=(probes, size))


def rotation(size: int, seed: int) -> Array:
    """A random orthogonal matrix."""
    return np.linalg.qr(np.random.default_rng(seed).standard_normal((size, size)))[0]


def block_lanczos(
    matrix: Array, probes: Array, steps: int, *, probe_kind: str = "rademacher", tolerance: float = 1e-10
) -> BlockTridiagonal:
    """Run block Lanczos on a dense matrix, or on a 1-D array that stands for a diagonal one.

    A direction is dropped when its part outside the known basis is below ``tolerance`` of the largest product.
    """

    size = probes.shape[1]
    start, block = _orthonormal_rows(probes, 1e-10 * np.linalg.norm(probes))
    basis = block
    diagonal: list[Array] = []
    offdiagonal: list[Array] = []
    products = 0
    scale = 0.0
    while len(diagonal) < steps and block.shape[0]:
        image = times(block, matrix)
        products += block.shape[0]
        scale = max(scale, float(np.linalg.norm(image)))
        a = image @ block.T
        diagonal.append((a + a.T) / 2)
        for _ in range(2):
            image = image - (image @ basis.T) @ basis
        c, block = _orthonormal_rows(image, tolerance * scale)
        if block.shape[0]:
            columns, triangle = np.linalg.qr((block - (block @ basis.T) @ basis).T)
            block = (columns * np.sign(np.diag(triangle))).T
        offdiagonal.append(c)
        basis = np.concatenate((basis, block))
    taken = basis[: sum(a.shape[0] for a in diagonal)]
    return BlockTridiagonal(
        size=size,
        start=start,
        diagonal=tuple(diagonal),
        offdiagonal=tuple(offdiagonal),
        epsilon=EPSILON,
        reorthogonalization="full",
        products=products,
        orthogonality=float(np.abs(taken @ taken.T - np.eye(len(taken))).max()),
        breakdown=block.shape[0] == 0,
        probe_kind=probe_kind,
    )


def _orthonormal_rows(rows: Array, least: float) -> tuple[Array, Array]:
    """Factor ``rows = coefficients @ basis`` with orthonormal rows in the basis, dropping what is below ``least``."""
    left, singular, right = np.linalg.svd(rows, full_matrices=False)
    keep = singular > least
    return left[:, keep] * singular[keep], right[keep]
