"""From the block tridiagonal matrix to all numbers of a report, which a stopping rule asks for while a run goes on.

make bench
.venv/bin/python -m pytest bench -k report_numbers
"""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
import workloads
from contest import Contestant

import hesd_fast as hesd

SEED = 5


def spectrum(n):
    """A bulk around zero and outliers on both sides, as trained networks have."""
    bulk = np.random.default_rng(0).normal(0.0, 1e-2, n - 26)
    return np.concatenate((bulk, np.geomspace(0.1, 10.0, 20), -np.geomspace(0.05, 1.0, 6)))


def check_numbers(eigenvalues):
    """A check of what is certain: Rademacher probes have squares of 1, so on a diagonal matrix all see its spectrum."""

    def check(numbers):
        measure, criteria = numbers
        plus, minus = (np.clip(side * eigenvalues, 0.0, None).sum() for side in (1.0, -1.0))
        threshold = criteria.resolution
        for found, truth in (
            (measure.lambda_max, eigenvalues.max()),
            (measure.lambda_min, eigenvalues.min()),
            (measure.trace, eigenvalues.sum()),
            (criteria.r_e, -eigenvalues.min() / eigenvalues.max()),
            (criteria.probe_balance, (plus - minus) / (plus + minus)),
            (criteria.k_mass, minus / plus),
            (criteria.unresolved_mass, (np.abs(eigenvalues) <= threshold).mean()),
        ):
            assert found.low <= truth <= found.high, f"{found} does not hold {truth}"

    return check


def numbers_of(tridiagonal):
    measure = hesd.SpectralMeasure.from_tridiagonal(tridiagonal)
    criteria = hesd.criteria(measure)
    hesd.classify(measure, criteria)
    return measure, criteria


@pytest.mark.parametrize("shape", ["4 x 100", "16 x 100", "4 x 400", "32 x 100", "1 x 400"])
def test_report_numbers(hold, sizes, shape):
    block, steps = (max(1, round(int(number) * sizes.report_share)) for number in shape.split(" x "))
    eigenvalues = spectrum(sizes.report_length)
    run = hesd.block_lanczos(
        workloads.Diagonal(torch.from_numpy(eigenvalues)), steps, block, seed=SEED, probe_kind="rademacher"
    )
    dense = run.matrix()

    def check_eigenvalues(found):
        np.testing.assert_allclose(found[0], run.ritz_ends()[0], atol=run.noise(10.0))

    hold(
        # nothing is kept from one time to the next
        Contestant(
            "report numbers", lambda: numbers_of(dataclasses.replace(run)), check_numbers(eigenvalues), "engine"
        ),
        [Contestant("eigenvectors of the dense matrix", lambda: np.linalg.eigh(dense), check_eigenvalues, "NumPy")],
        sizes.rounds,
        about=f"{block} x {steps}, {len(dense)} Ritz values, float64",
    )
