"""Jacobi matrices of the probes are those of Lanczos with full reorthogonalization, their rules those of LAPACK."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from numpy_block_lanczos import EPSILON, Array, block_lanczos, rademacher
from scipy.linalg import eigh_tridiagonal
from spectra import SIZE, SPECTRA, dense, scale_of

from hesd_fast.lanczos.block_tridiagonal import BlockTridiagonal
from hesd_fast.spectrum.jacobi_matrix import Jacobi, jacobi_matrices
from hesd_fast.spectrum.ritz_pairs import RitzPairs


def lanczos_on_the_block_matrix(tridiagonal: BlockTridiagonal, probe: int) -> tuple[Array, Array]:
    """Lanczos on the dense matrix from one probe, fully reorthogonalized."""
    matrix, coupling = tridiagonal.matrix(), tridiagonal.offdiagonal[-1]
    vector = np.zeros(len(matrix))
    vector[: tridiagonal.start.shape[1]] = tridiagonal.start[probe]
    vector /= np.linalg.norm(vector)
    basis, alphas, betas = np.empty((0, len(matrix))), [], []
    steps = len(matrix) if tridiagonal.breakdown else tridiagonal.steps
    negligible = 32 * len(matrix) * EPSILON * tridiagonal.norm_bound
    for step in range(steps):
        basis = np.concatenate((basis, vector[None]))
        product = matrix @ vector
        alphas.append(float(vector @ product))
        for _ in range(2):
            product = product - basis.T @ (basis @ product)
        beta = float(np.linalg.norm(product))
        if step + 1 == steps:
            beta = float(np.hypot(beta, np.linalg.norm(coupling.T @ vector[len(matrix) - coupling.shape[0] :])))
        betas.append(beta if beta > negligible else 0.0)
        if betas[-1] == 0.0:
            break
        vector = product / beta
    return np.array(alphas), np.array(betas)


@pytest.mark.parametrize("name", list(SPECTRA))
@pytest.mark.parametrize(("probes", "steps"), [(1, 1), (1, 20), (3, 1), (3, 7), (4, 25)])
def test_the_coefficients_are_those_of_lanczos(name: str, probes: int, steps: int) -> None:
    run = block_lanczos(dense(name), rademacher(probes, SIZE, 0), steps)
    for probe, jacobi in enumerate(jacobi_matrices(RitzPairs.of(run))):
        alphas, betas = lanczos_on_the_block_matrix(run, probe)
        assert jacobi.diagonal.size == alphas.size
        tolerance = 1e5 * EPSILON * scale_of(name)
        np.testing.assert_allclose(jacobi.diagonal, alphas, atol=tolerance)
        np.testing.assert_allclose(jacobi.offdiagonal, betas, atol=tolerance)
        rows = np.abs(run.matrix()).sum(axis=1).max()
        coupling = run.offdiagonal[-1]
        assert jacobi.scale == pytest.approx(rows + (np.linalg.norm(coupling, 2) if coupling.size else 0.0), rel=1e-14)


@pytest.mark.parametrize("scale", [1e-120, 1e-30, 1e120])
def test_the_unit_does_not_matter(scale: float) -> None:
    run = block_lanczos(dense("indefinite"), rademacher(2, SIZE, 0), 12)
    blocks = [tuple(block * scale for block in side) for side in (run.diagonal, run.offdiagonal)]
    scaled = replace(run, diagonal=blocks[0], offdiagonal=blocks[1])
    for one, other in zip(jacobi_matrices(RitzPairs.of(run)), jacobi_matrices(RitzPairs.of(scaled)), strict=True):
        np.testing.assert_allclose(other.diagonal / scale, one.diagonal, atol=1e3 * EPSILON * one.scale)
        np.testing.assert_allclose(other.offdiagonal / scale, one.offdiagonal, atol=1e3 * EPSILON * one.scale)
        points = np.array([-1.0, 0.1, 2.5])
        np.testing.assert_allclose(other.radau(points * scale)[0] / scale, one.radau(points)[0], atol=1e-9)


def test_a_repeated_probe_has_the_same_matrix() -> None:
    z = rademacher(2, SIZE, 0)
    run = block_lanczos(dense("bulk and outliers"), np.concatenate((z, z[:1])), 10)
    first, _, again = jacobi_matrices(RitzPairs.of(run))
    np.testing.assert_allclose(again.diagonal, first.diagonal, atol=1e3 * EPSILON * first.scale)
    np.testing.assert_allclose(again.offdiagonal, first.offdiagonal, atol=1e3 * EPSILON * first.scale)


def gauss_radau(jacobi: Jacobi, point: float) -> tuple[Array, Array]:
    """The rule with a prescribed node, from Golub's formula and LAPACK."""
    order = jacobi.diagonal.size
    matrix = (
        np.diag(jacobi.diagonal - point) + np.diag(jacobi.offdiagonal[:-1], 1) + np.diag(jacobi.offdiagonal[:-1], -1)
    )
    entry = point + jacobi.offdiagonal[-1] ** 2 * np.linalg.solve(matrix, np.eye(order)[-1])[-1]
    values, vectors = eigh_tridiagonal(np.append(jacobi.diagonal, entry), jacobi.offdiagonal)
    return values, vectors[0] ** 2


@pytest.mark.parametrize("name", ["bulk and outliers", "indefinite", "all negative"])
@pytest.mark.parametrize("steps", [1, 2, 12])
def test_rules_with_a_prescribed_node(name: str, steps: int) -> None:
    run = block_lanczos(dense(name), rademacher(2, SIZE, 1), steps)
    for jacobi in jacobi_matrices(RitzPairs.of(run)):
        points = np.array([-3.0, -0.01, 0.2, 20.0])
        nodes, weights = jacobi.radau(points)
        assert (np.abs(nodes - points[:, None]).min(axis=1) <= 1e3 * EPSILON * np.maximum(jacobi.scale, 20.0)).all()
        for point, found, masses in zip(points, nodes, weights, strict=True):
            truth = gauss_radau(jacobi, float(point))
            np.testing.assert_allclose(found, truth[0], atol=1e5 * EPSILON * jacobi.scale, rtol=1e5 * EPSILON)
            np.testing.assert_allclose(masses, truth[1], atol=1e5 * EPSILON)


def test_the_mirror_image_has_the_mirrored_rule() -> None:
    (jacobi,) = jacobi_matrices(RitzPairs.of(block_lanczos(dense("indefinite"), rademacher(1, SIZE, 1), 9)))
    mirrored, anew = jacobi.reflected(), Jacobi(-jacobi.diagonal, jacobi.offdiagonal, jacobi.scale, jacobi.rounding)
    for one, other in zip(mirrored.gauss(), anew.gauss(), strict=True):
        np.testing.assert_allclose(one, other, atol=100 * EPSILON * jacobi.scale)
    cross = [one * two for _, one, two in (mirrored.eigenvectors, anew.eigenvectors)]
    np.testing.assert_allclose(*(np.abs(c.sum()) for c in cross), atol=100 * EPSILON)
    np.testing.assert_allclose(*(np.abs(c @ jacobi.gauss()[0]) for c in cross), atol=100 * EPSILON)
