"""Real networks through the compiled engine, held against their dense Hessians in float64."""

from __future__ import annotations

import itertools
from functools import cache

import numpy as np
import pytest
import torch
from catalogue import CASES
from dense import dense_hessian

import hesd_fast as hesd
from hesd_fast.lanczos.lanczos_run import fill_probes
from hesd_fast.lanczos.options import LanczosSettings

NETWORKS = [case for case in CASES if case.name in ("mlp-tanh", "cnn-train", "transformer")]
EPSILON = 2.0**-52


@cache
def truth(case):
    """The problem's operator and its dense Hessian's eigenvalues and eigenvectors."""
    model, loss, data = case.build()
    problem = hesd.Problem(model, loss, data, mode=case.mode)
    model.train(case.mode == "train")
    hessian = dense_hessian(model, lambda model: case.total(model, data), problem.parameters)
    eigenvalues, vectors = torch.linalg.eigh((hessian + hessian.T) / 2)
    return hesd.HessianOperator(problem), eigenvalues.numpy(), vectors.numpy()


def probes_of(n, block, seed):
    probes = torch.empty(block, n, dtype=torch.float64)
    fill_probes(probes, LanczosSettings(block, 1, seed=seed))
    return probes.numpy()


@pytest.mark.parametrize("case", NETWORKS, ids=str)
def test_the_exhausted_space_has_exactly_the_eigenvalues(case):
    operator, eigenvalues, _ = truth(case)
    n = operator.size
    assert 500 <= n <= 6000
    block = 8
    tridiagonal = hesd.block_lanczos(operator, steps=n // block + 1, block_size=block)
    values, _, _ = tridiagonal.ritz()
    scale = np.abs(eigenvalues).max()
    tolerance = 256 * EPSILON * scale
    # A zero of high multiplicity appears once per direction of the block: so compare as sets.
    nearest = np.abs(values[:, None] - eigenvalues[None, :])
    assert nearest.min(axis=1).max() <= tolerance
    assert nearest.min(axis=0).max() <= tolerance
    visible = np.abs(eigenvalues) > tolerance
    assert (np.abs(values) > tolerance).sum() == visible.sum()


@pytest.mark.parametrize("case", NETWORKS, ids=str)
@pytest.mark.parametrize("block", [1, 4])
def test_the_first_2m_moments_are_those_of_the_probes(case, block):
    operator, eigenvalues, vectors = truth(case)
    n, steps = operator.size, 6
    measure = hesd.SpectralMeasure.from_tridiagonal(hesd.block_lanczos(operator, steps, block, seed=3))
    exact_weights = (probes_of(n, block, 3) @ vectors) ** 2 / n
    scale = np.abs(eigenvalues).max()
    for probe in range(block):
        nodes, weights = measure.nodes[probe], measure.weights[probe]
        assert abs(weights.sum() - 1) <= 16 * EPSILON
        for order in range(2 * steps):
            exact = exact_weights[probe] @ (eigenvalues / scale) ** order
            size = exact_weights[probe] @ np.abs(eigenvalues / scale) ** order
            found = weights @ (nodes / scale) ** order
            # float64 sums of n terms, and a Ritz value's rounding enters `order` times
            assert abs(found - exact) <= 64 * (order + 1) * EPSILON * (size + 1e-3), order


@pytest.mark.parametrize("case", NETWORKS, ids=str)
def test_extremes_lie_within_their_bounds_at_every_length(case):
    operator, eigenvalues, _ = truth(case)
    tridiagonal = hesd.block_lanczos(operator, 40, 3, seed=1)
    for steps in (1, 2, 4, 8, 16, tridiagonal.steps):
        values, _, residuals = tridiagonal.truncated(steps).ritz()
        distance = np.abs(values[:, None] - eigenvalues[None, :]).min(axis=1)
        assert (distance <= residuals).all()
        assert values[-1] <= eigenvalues[-1] + residuals[-1]
        assert values[0] >= eigenvalues[0] - residuals[0]
    measure = hesd.SpectralMeasure.from_tridiagonal(tridiagonal)
    assert measure.lambda_max.low <= eigenvalues[-1] <= measure.lambda_max.high
    assert measure.lambda_min.low <= eigenvalues[0] <= measure.lambda_min.high


@pytest.mark.parametrize("case", NETWORKS, ids=str)
def test_the_wasserstein_distance_falls_with_the_number_of_steps(case):
    operator, eigenvalues, vectors = truth(case)
    block = 4
    tridiagonal = hesd.block_lanczos(operator, 40, block, seed=2)
    weights = (probes_of(operator.size, block, 2) @ vectors) ** 2 / operator.size
    of_probes = hesd.SpectralMeasure([eigenvalues] * block, list(weights))
    lengths = (2, 5, 10, 20, tridiagonal.steps)
    measures = [hesd.SpectralMeasure.from_tridiagonal(tridiagonal.truncated(steps)) for steps in lengths]
    to_probes = [measure.wasserstein1(of_probes) for measure in measures]
    assert all(later < earlier for earlier, later in itertools.pairwise(to_probes))
    to_spectrum = [measure.wasserstein1(eigenvalues) for measure in measures]
    floor = of_probes.wasserstein1(eigenvalues)  # what these probes cannot see
    assert to_spectrum[-1] < to_spectrum[0]
    assert to_spectrum[-1] <= floor + to_probes[-1] + 1024 * EPSILON * np.abs(eigenvalues).max()


@pytest.mark.parametrize("case", NETWORKS, ids=str)
@pytest.mark.parametrize("mode", ["full", "window", "none"])
def test_the_band_contains_the_probes_distribution(case, mode):
    operator, eigenvalues, vectors = truth(case)
    block = 2
    tridiagonal = hesd.block_lanczos(operator, 15, block, seed=5, reorthogonalization=mode)
    measure = hesd.SpectralMeasure.from_tridiagonal(tridiagonal)
    weights = ((probes_of(operator.size, block, 5) @ vectors) ** 2 / operator.size).mean(axis=0)
    cumulative = np.concatenate([[0.0], np.cumsum(weights)])
    points = np.linspace(eigenvalues[0] * 1.1, eigenvalues[-1] * 1.1, 401)
    low, high = measure.cdf_bounds(points)
    below = cumulative[np.searchsorted(eigenvalues, points, side="left")]
    up_to = cumulative[np.searchsorted(eigenvalues, points, side="right")]
    slack = 64 * EPSILON
    assert (low <= below + slack).all()
    assert (up_to <= high + slack).all()
    assert (high - low).mean() < 0.5
