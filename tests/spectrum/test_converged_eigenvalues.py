"""Known eigenpairs take their noise out of the estimates, and never their truth."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import hesd_fast as hesd

N = 200


def network_like(seed=0):
    random = np.random.default_rng(seed)
    return np.concatenate([random.normal(0.0, 0.02, N - 7), [-0.5, 0.5, 1.0, 2.0, 3.0, 5.0, 8.0]])


def measure_of(eigenvalues, steps, block, seed=0, **options):
    basis, _ = np.linalg.qr(np.random.default_rng(99).standard_normal((len(eigenvalues),) * 2))
    matrix = (basis * eigenvalues) @ basis.T
    run = hesd.block_lanczos((matrix + matrix.T) / 2, steps, block, seed=seed, **options)
    return hesd.SpectralMeasure.from_tridiagonal(run)


def test_only_isolated_eigenvalues_converge():
    eigenvalues = network_like()
    converged = measure_of(eigenvalues, 15, 4).converged
    for outlier in (-0.5, 0.5, 1.0, 2.0, 3.0, 5.0, 8.0):
        assert np.abs(converged.eigenvalues - outlier).min() <= 1e-9
    for value in converged.eigenvalues:
        assert np.abs(eigenvalues - value).min() <= 1e-3 * np.abs(value)


@pytest.mark.parametrize("steps", [6, 10, 25])
def test_trace_and_balance_are_much_sharper_and_still_true(steps):
    eigenvalues = network_like()
    positive, negative = eigenvalues[eigenvalues > 0].sum(), -eigenvalues[eigenvalues < 0].sum()
    truth = {"trace": eigenvalues.sum(), "k_mass": negative / positive}
    truth["balance"] = (positive - negative) / (positive + negative)
    hits, seeds = dict.fromkeys(truth, 0), 60
    widths, plain = [], []
    for seed in range(seeds):
        measure = measure_of(eigenvalues, steps, 4, seed)
        found = hesd.criteria(measure)
        estimates = {"trace": measure.trace, "k_mass": found.k_mass, "balance": found.balance}
        for name, estimate in estimates.items():
            hits[name] += estimate.low <= truth[name] <= estimate.high
        widths.append(measure.trace.high - measure.trace.low)
        plain.append(4.0 * N * measure.standard_error_bound(lambda x: x))
    assert all(count >= 0.95 * seeds - 2 for count in hits.values()), hits
    assert np.median(widths) < 0.3 * np.median(plain)


@pytest.mark.parametrize("multiplicity", [2, 3, 6])
def test_multiple_eigenvalues_do_not_lose_their_share(multiplicity):
    eigenvalues = np.concatenate([np.random.default_rng(1).normal(0.0, 0.02, N - multiplicity), [5.0] * multiplicity])
    hits = 0
    for seed in range(40):
        trace = measure_of(eigenvalues, 12, 4, seed).trace
        hits += trace.low <= eigenvalues.sum() <= trace.high
    assert hits >= 36


def test_an_exhausted_space_is_known_exactly():
    eigenvalues = np.random.default_rng(2).normal(0.0, 1.0, 40)
    measure = measure_of(eigenvalues, 40, 4)
    assert measure.converged.mask.all()
    assert measure.trace.high - measure.trace.low <= 1e-5  # the square root of rounding
    assert measure.trace.value == pytest.approx(eigenvalues.sum(), abs=1e-12)
    found = hesd.criteria(measure)
    positive, negative = eigenvalues[eigenvalues > 0].sum(), -eigenvalues[eigenvalues < 0].sum()
    assert found.k_mass.value == pytest.approx(negative / positive, rel=1e-6)
    assert found.k_mass.high - found.k_mass.low <= 1e-4


@pytest.mark.parametrize("options", [{"reorthogonalization": "none"}, {"reorthogonalization": "window"}])
def test_nothing_counts_as_converged_among_ghosts(options):
    assert not measure_of(network_like(), 30, 4, **options).converged.mask.any()


def test_nothing_counts_as_converged_with_one_probe_or_given_probes():
    assert not measure_of(network_like(), 30, 1).converged.mask.any()
    given = torch.randn(4, N, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert not measure_of(network_like(), 30, 4, probes=given).converged.mask.any()
