"""The eigenvalues at either end: every interval holds one, and each value is a bound of the one of its rank."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from dense import dense_hessian
from torch import nn

import hesd_fast as hesd

MATRICES = {
    "simple": np.linspace(-1.0, 3.0, 60),
    "clustered": np.concatenate((np.linspace(0.0, 1e-6, 50), [1.0, 1.0 + 1e-9, 2.0, -3.0])),
    "repeated": np.repeat([-1.0, 0.0, 0.5, 2.0], 12),
    "graded": np.geomspace(1e-10, 1.0, 40) * (-1.0) ** np.arange(40),
    "zero": np.zeros(20),
}


EPSILON = 2.0**-52


def matrix_of(eigenvalues, seed=0):
    basis = np.linalg.qr(np.random.default_rng(seed).standard_normal((eigenvalues.size,) * 2))[0]
    product = (basis * eigenvalues) @ basis.T
    return torch.from_numpy((product + product.T) / 2)


@pytest.mark.parametrize("name", MATRICES)
@pytest.mark.parametrize(("steps", "probes"), [(1, 1), (1, 4), (5, 1), (9, 3), (60, 7)])
@pytest.mark.parametrize("scale", [1.0, 1e-120, 1e120])
def test_ends_of_ritz_vectors_are_those_of_the_dense_matrix(name, steps, probes, scale):
    run = hesd.block_lanczos(matrix_of(MATRICES[name]), steps, probes)
    scaled = [tuple(block * scale for block in blocks) for blocks in (run.diagonal, run.offdiagonal)]
    run = dataclasses.replace(run, diagonal=scaled[0], offdiagonal=scaled[1])
    values, seen, couplings = run.ritz_ends()
    dense, coupling, order = run.matrix(), run.offdiagonal[-1], sum(run.block_sizes)
    unit = scale * max(1.0, 3.0)
    tolerance = 20 * EPSILON * np.sqrt(order)
    np.testing.assert_allclose(values / unit, run.ritz()[0] / unit, atol=tolerance)
    # vectors of eigenvalues close to each other may be any of their space; functions of the matrix may not
    ends = np.zeros((probes + coupling.shape[1], order))
    ends[:probes, : run.start.shape[1]] = run.start / run.size**0.5
    ends[probes:, order - coupling.shape[0] :] = coupling.T / unit
    found = np.concatenate((seen / run.size**0.5, couplings.T / unit))
    power, powers = ends, np.ones(order)
    for _ in range(6):
        np.testing.assert_allclose((found * powers) @ found.T, power @ ends.T, atol=10 * tolerance)
        power, powers = power @ (dense / unit), powers * values / unit


@pytest.mark.parametrize("mode", ["full", "window"])
def test_quadrature_of_fewer_steps(mode):
    run = hesd.block_lanczos(matrix_of(MATRICES["simple"]), 9, 3, reorthogonalization=mode)
    for steps in range(1, run.steps + 1):
        nodes, weights = run.quadrature(steps)
        truth = hesd.SpectralMeasure.from_tridiagonal(run.truncated(steps))
        np.testing.assert_allclose(nodes, truth.nodes[0], atol=64 * EPSILON * 3.0)
        assert weights.shape == (3, nodes.size)
        for probe in range(3):
            np.testing.assert_allclose(weights[probe], truth.weights[probe], atol=1e3 * EPSILON)
    np.testing.assert_array_equal(run.quadrature()[0], run.quadrature(run.steps)[0])
    with pytest.raises(hesd.ProblemError, match="steps must be between 1 and 9, got 10"):
        run.quadrature(10)


@pytest.mark.parametrize("mode", ["full", "window", "none"])
@pytest.mark.parametrize("probes", [1, 4])
def test_rounding_of_many_ritz_values_is_allowed_for(mode, probes):
    # copies of a converged eigenvalue lie on either side of it, the more of them the farther
    eigenvalues = np.concatenate((np.random.default_rng(5).normal(0.0, 1e-2, 994), [-0.7, -0.2, 1.0, 2.0, 5.0, 10.0]))
    run = hesd.block_lanczos(torch.diag(torch.from_numpy(eigenvalues)), 150, probes, reorthogonalization=mode)
    for steps in (20, 75, 150):
        measure = hesd.SpectralMeasure.from_tridiagonal(run.truncated(steps))
        assert measure.lambda_max.low <= 10.0 <= measure.lambda_max.high
        assert measure.lambda_min.low <= -0.7 <= measure.lambda_min.high
        assert measure.lambda_max.high - measure.lambda_max.low <= 1e3 * EPSILON * np.sqrt(steps * probes) * 10.0


def check_top(found, eigenvalues, noise):
    """Assert what the docstring says is certain, against all eigenvalues of the matrix."""
    descending = np.sort(eigenvalues)[::-1]
    values = [estimate.value for estimate in found]
    assert values == sorted(values, reverse=True)
    for rank, estimate in enumerate(found):
        assert ((descending >= estimate.low) & (descending <= estimate.high)).any()
        assert descending[rank] >= estimate.value - noise


@pytest.mark.parametrize("name", MATRICES)
@pytest.mark.parametrize("steps", [1, 4, 12, 60])
@pytest.mark.parametrize("mode", ["full", "partial"])
def test_each_interval_holds_an_eigenvalue(name, steps, mode):
    eigenvalues = MATRICES[name]
    run = hesd.block_lanczos(matrix_of(eigenvalues), steps, 3, reorthogonalization=mode)
    count, noise = sum(run.block_sizes), run.noise(np.abs(eigenvalues).max())
    check_top(run.top(count), eigenvalues, noise)
    mirrored = [hesd.Estimate(-e.value, -e.high, -e.low) for e in run.top(count, which="smallest")]
    check_top(mirrored, -eigenvalues, noise)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_intervals_cover_a_basis_of_lower_precision(dtype):
    eigenvalues = MATRICES["simple"]
    run = hesd.block_lanczos(matrix_of(eigenvalues).float(), 12, 3, basis_dtype=dtype)
    check_top(run.top(36), eigenvalues, run.noise(3.0))


def test_the_largest_eigenvalues_of_a_network():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2)).double()
    data = (torch.randn(50, 4).double(), torch.randint(0, 2, (50,)))
    problem = hesd.Problem(model, hesd.losses.supervised(nn.CrossEntropyLoss()), data)
    mean_loss = nn.CrossEntropyLoss()
    dense = dense_hessian(model, lambda network: mean_loss(network(data[0]), data[1]), problem.parameters)
    exact = np.linalg.eigvalsh(dense.numpy())
    report = hesd.analyze(problem, max_steps=10, progress=False)
    noise = report.measure.noise
    check_top(report.top(40), exact, noise)
    five = report.top(5)
    assert five == report.top(40)[:5] == report.top(np.int64(5))
    assert five[0].value == report.lambda_max.value
    assert report.top(1, "smallest")[0].value == report.lambda_min.value
    np.testing.assert_allclose([e.value for e in five], exact[::-1][:5], rtol=0, atol=2 * noise)
    # an error of a few epsilons, which is the square of the residual norm, leaves an interval of sqrt(epsilon)
    assert all(e.high - e.low <= 2.0**-26 * five[0].value for e in five)
    assert five[0].method == "residual norm and noise"


def test_a_loaded_report_has_the_same_eigenvalues(tmp_path):
    torch.manual_seed(0)
    data = (torch.randn(30, 4), torch.randn(30, 2))
    report = hesd.analyze(nn.Linear(4, 2), hesd.losses.supervised(nn.MSELoss()), data, progress=False)
    report.save(tmp_path / "r.json")
    assert hesd.load_report(tmp_path / "r.json").top(3) == report.top(3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0,), "k is 0; wanted a positive integer"),
        ((-1,), "k is -1; wanted a positive integer"),
        ((True,), "k is True; wanted a positive integer"),
        ((2.0,), "k is 2.0; wanted a positive integer"),
        (("3",), "k is '3'; wanted a positive integer"),
        ((13,), "k is 13, and the run has 12 Ritz values; ask for fewer, or take more steps or probes"),
        ((1, "LA"), "which is 'LA'; wanted 'largest' or 'smallest'"),
    ],
)
def test_what_cannot_be_asked_for(arguments, message):
    run = hesd.block_lanczos(matrix_of(MATRICES["simple"]), 4, 3)
    with pytest.raises(hesd.ProblemError, match=message):
        run.top(*arguments)


@pytest.mark.parametrize("mode", ["window", "none"])
def test_copies_are_not_counted_as_eigenvalues(mode):
    run = hesd.block_lanczos(matrix_of(MATRICES["simple"]), 4, 3, reorthogonalization=mode)
    message = f"reorthogonalization='{mode}', where copies of an eigenvalue .* run it again with 'full' or 'partial'"
    with pytest.raises(hesd.ProblemError, match=message):
        run.top(1)


def test_a_measure_without_a_run_has_no_single_eigenvalues():
    torch.manual_seed(0)
    report = hesd.analyze(nn.Linear(2, 1), lambda m, b: m(b).square().mean(), torch.randn(9, 2), progress=False)
    bare = dataclasses.replace(report, measure=hesd.SpectralMeasure([1.0], [1.0]))
    with pytest.raises(hesd.ProblemError, match=r"no block tridiagonal matrix, .*; give the report of a run"):
        bare.top(1)
