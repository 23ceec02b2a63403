"""What is said of eigenvalues that were not found, against dense matrices; and the Krylov space that it rests on."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from matrices import DTYPES, matrix_with

import hesd_fast as hesd
from hesd_fast.engine import kernels
from hesd_fast.estimators.eigenpairs_missed import End, HiddenMass
from hesd_fast.estimators.thick_restart import KrylovSpace, move_rows

N = 80
EIGENVALUES = np.concatenate([np.random.default_rng(1).normal(size=N - 3), [3.4, 3.5, -4.0]])
CROWDED = np.sqrt(np.linspace(0.0, 1.0, N))


def restarted_space(dtype, block_size, cycles, mass_points=None, eigenvalues=EIGENVALUES, seed=5):
    """A space after some restarts, what it knows of hidden eigenvectors, the random vectors, and the matrix."""
    matrix = matrix_with(eigenvalues, dtype)
    space = KrylovSpace(hesd.MatrixOperator(matrix), kernels.empty_panel(20, N, dtype))
    start = space.join_random(block_size, seed=seed, first_probe=0)
    begun = torch.from_numpy(start) @ space.residual_block.double()
    mass = None if mass_points is None else HiddenMass(start, mass_points)
    for cycle in range(cycles):
        while not space.full:
            space.expand()
        if cycle + 1 < cycles:
            ritz = space.ritz()
            kept = np.arange(space.order)[::-1][:8]
            if mass is not None:
                mass.restarted(ritz, kept)
            space.restart(ritz, kept)
    return space, mass, begun, matrix.double()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block_size", [1, 2, 3])
@pytest.mark.parametrize("cycles", [1, 2, 4])
def test_the_decomposition_holds_and_is_orthonormal(dtype, block_size, cycles):
    space, _, _, matrix = restarted_space(dtype, block_size, cycles)
    vectors, residual = space.basis.double(), space.residual_block.double()
    epsilon = torch.finfo(dtype).eps
    left = vectors @ matrix - torch.from_numpy(space.matrix) @ vectors - torch.from_numpy(space.coupling) @ residual
    assert float(left.abs().max()) <= 64 * epsilon * 4.0
    rows = torch.cat([vectors, residual])
    assert float((rows @ rows.T - torch.eye(len(rows))).abs().max()) <= 64 * epsilon
    assert np.array_equal(space.matrix, space.matrix.T)
    assert space.recurrence_error <= 64 * epsilon * 4.0


@pytest.mark.parametrize("block_size", [1, 2, 3])
@pytest.mark.parametrize("cycles", [1, 2])
def test_random_vectors_have_no_more_of_an_eigenvector_than_its_mass(block_size, cycles):
    matrix = matrix_with(CROWDED)
    values, vectors = torch.linalg.eigh(matrix)
    hidden = 0
    for seed in range(10):
        points = np.concatenate([[4.0, 2.0], values.numpy()[::-1]])
        space, mass, begun, _ = restarted_space(torch.float64, block_size, cycles, points, CROWDED, seed)
        ritz = space.ritz()
        beyond = values.numpy() > ritz.values[-1] + 1e-6  # not yet found
        seen = (begun @ vectors).square().sum(dim=0).numpy()
        masses = mass.at_points(ritz)
        assert (seen[beyond] <= masses[2:][::-1][beyond] * (1 + 1e-6)).all()
        outwards = masses[: 2 + beyond.sum()]
        assert (np.diff(outwards) > 0).all()  # less room further out
        hidden += beyond.sum()
    assert hidden >= 10


@pytest.mark.parametrize("side", [1.0, -1.0])
@pytest.mark.parametrize("block_size", [1, 2])
def test_what_is_counted_beyond_a_number(side, block_size):
    space, _, _, matrix = restarted_space(torch.float64, block_size, 4)
    ritz = space.ritz()
    order = np.arange(space.order)[::-1] if side > 0 else np.arange(space.order)
    space.restart(ritz, order[:10])
    basis = space.basis.double()
    outside = torch.linalg.svd(basis, full_matrices=True).Vh[len(basis) :]
    eigenvalues = np.linalg.eigvalsh(outside @ matrix @ outside.T)
    extreme = float(eigenvalues[-1] if side > 0 else eigenvalues[0])
    end = End(side, 0.0, np.diagonal(space.matrix), space.coupling, 2, 4.0)
    tried = np.linspace(-4.5, 4.5, 400)
    claims = 0
    for x, reach in zip(tried, end.reaches(tried), strict=True):
        if side * extreme <= side * reach:  # the complement does not reach further
            found = (side * end.values[:2] > side * x).sum()
            assert (side * EIGENVALUES > side * x).sum() == found
            claims += 1
    assert claims > 20


def test_vectors_that_are_locked_stay_out():
    matrix = matrix_with(EIGENVALUES)
    panel = kernels.empty_panel(20, N, torch.float64)
    vectors = torch.linalg.eigh(matrix).eigenvectors
    panel[:3] = vectors[:, -3:].T
    space = KrylovSpace(hesd.MatrixOperator(matrix), panel, locked=3)
    space.join_random(1, seed=0, first_probe=0)
    while not space.full:
        space.expand()
    assert space.ritz().values[-1] <= np.sort(EIGENVALUES)[-4] + 64 * torch.finfo(torch.float64).eps
    assert float((space.basis @ panel[:3].T).abs().max()) <= 64 * torch.finfo(torch.float64).eps


@pytest.mark.parametrize(("source", "target"), [(0, 2), (2, 0), (1, 1)])
def test_rows_move_over_themselves(source, target):
    panel = torch.arange(6.0)[:, None].repeat(1, 2)
    before = panel.clone()
    move_rows(panel, source, target, 4)
    assert torch.equal(panel[target : target + 4], before[source : source + 4])
