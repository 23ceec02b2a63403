"""Outliers are those that were planted, their number is certain where it says so, and a bulk alone has none."""

from __future__ import annotations

import functools
import math

import numpy as np
import pytest
import torch

import hesd_fast as hesd
from hesd_fast.cli.demo_problem import demo_problem

RANDOM = np.random.default_rng(0)


def random_matrix(size):
    matrix = RANDOM.standard_normal((size, size))
    return np.linalg.eigvalsh(matrix + matrix.T) / math.sqrt(8.0 * size)  # on [-1, 1]


def covariance(size, rank):
    factor = RANDOM.standard_normal((size, rank))
    return np.linalg.eigvalsh(factor @ factor.T) / (math.sqrt(size) + math.sqrt(rank)) ** 2  # on [0, 1]


BULKS = {"semicircle": random_matrix(300), "Marchenko-Pastur": covariance(300, 700), "low rank": covariance(300, 150)}


rotation_of = functools.cache(lambda size: np.linalg.qr(np.random.default_rng(99).standard_normal((size, size)))[0])


def measure_of(eigenvalues, steps, block, seed=0, **options):
    basis = rotation_of(len(eigenvalues))
    matrix = (basis * eigenvalues) @ basis.T
    run = hesd.block_lanczos((matrix + matrix.T) / 2, steps, block, seed=seed, **options)
    return hesd.SpectralMeasure.from_tridiagonal(run)


@pytest.mark.parametrize(("steps", "block"), [(25, 4), (60, 2), (60, 4)])
@pytest.mark.parametrize("name", BULKS)
def test_a_bulk_alone_has_none(name, steps, block):
    outliers = measure_of(BULKS[name], steps, block).outliers
    assert (outliers.below, outliers.above, str(outliers)) == ((), (), "none")
    assert (outliers.number_above.low, outliers.number_above.high) == (0.0, math.inf)


@pytest.mark.parametrize(("steps", "block"), [(25, 4), (60, 2), (60, 4)])
@pytest.mark.parametrize("planted", [[1.5], [2.0, 2.1, 5.0], [1.4, 1.6, 3.0, 3.0, 10.0, 20.0]])
@pytest.mark.parametrize("name", BULKS)
def test_planted_outliers_are_found_and_counted_and_no_others(name, planted, steps, block):
    eigenvalues = np.concatenate((BULKS[name], planted))
    for sign in (1.0, -1.0):
        outliers = measure_of(sign * eigenvalues, steps, block).outliers
        found, number = (outliers.above, outliers.number_above) if sign > 0 else (outliers.below, outliers.number_below)
        assert (number.low, number.value, number.high) == (len(planted),) * 3, number.method
        for estimate, truth in zip(found, sorted(sign * np.array(planted), reverse=sign > 0), strict=True):
            assert estimate.low <= truth <= estimate.high
        assert len(outliers.all) == len(planted)
        assert str(outliers) == f"{len(planted)} {'above' if sign > 0 else 'below'} the bulk"


def test_both_sides_are_counted_apart():
    eigenvalues = np.concatenate((BULKS["semicircle"], [-3.0, 1.5, 2.0]))
    outliers = measure_of(eigenvalues, 30, 4).outliers
    assert str(outliers) == "2 above, 1 below the bulk"
    assert [round(one.value, 6) for one in outliers.all] == [-3.0, 1.5, 2.0]
    low, high = outliers.bulk
    assert -1.2 < low < high < 1.2


def test_a_number_said_to_be_exact_is():
    """The risk is 2.5 % for each eigenvalue that may be missed, and the bound behind it far from tight."""
    random, exact = np.random.default_rng(1), 0
    for run in range(40):
        planted = random.choice([-1.0, 1.0], 8, p=[0.3, 0.7]) * random.uniform(1.2, 6.0, 8)
        eigenvalues = np.concatenate((BULKS["semicircle"], planted))
        measure = measure_of(eigenvalues, int(random.integers(3, 20)), int(random.integers(2, 5)), seed=run)
        nodes = measure.nodes[0]
        for number, values, truth in (
            (measure.outliers.number_above, nodes[::-1], eigenvalues),
            (measure.outliers.number_below, -nodes, -eigenvalues),
        ):
            count = int(number.value)
            beyond = int((truth > 0.5 * (values[count - 1] + values[count])).sum()) if count else 0
            assert number.low <= beyond  # interlacing, without exception
            if count and number.high == number.low:
                exact += 1
                assert beyond == count
    assert exact > 40


def test_what_one_probe_or_given_probes_cannot_tell_is_said():
    eigenvalues = np.concatenate((BULKS["semicircle"], [2.0, 3.0]))
    outliers = measure_of(eigenvalues, 60, 1).outliers
    assert str(outliers) == "at least 2 above the bulk"
    assert "fewer than two random probes" in outliers.number_above.method
    probes = torch.randn(2, eigenvalues.size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert str(measure_of(eigenvalues, 40, 2, probes=probes).outliers) == "at least 2 above the bulk"


def test_few_steps_leave_room_for_others():
    eigenvalues = np.concatenate((np.zeros(290), np.linspace(1.0, 3.0, 10)))
    numbers = [measure_of(eigenvalues, steps, 2).outliers.number_above for steps in (1, 2, 3)]
    assert all(number.low <= 10.0 <= number.high for number in numbers)
    assert numbers[1].high == math.inf


def test_nothing_is_said_where_eigenvalues_have_copies_or_no_error():
    eigenvalues = np.concatenate((BULKS["semicircle"], [2.0, 3.0]))
    for measure, reason in (
        (measure_of(eigenvalues, 40, 2, reorthogonalization="none"), "eigenvalues have copies"),
        (hesd.SpectralMeasure([0.0, 5.0], [0.99, 0.01]), "a bare measure"),
    ):
        outliers = measure.outliers
        assert outliers.all == ()
        assert math.isnan(outliers.number_above.value)
        assert str(outliers).startswith("not known: ")
        assert reason in str(outliers)


@pytest.mark.parametrize(
    "eigenvalues", [[0.0] * 30, [2.0] * 30, [1.0], [-1.0, 1.0], [-1.0] * 10 + [0.0] * 10 + [2.0] * 10]
)
def test_spectra_without_a_bulk_have_none(eigenvalues):
    for block in (1, 2):
        if block <= len(eigenvalues):
            assert measure_of(np.array(eigenvalues), 8, block).outliers.all == ()


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_units_do_not_matter(scale):
    outliers = measure_of(scale * np.concatenate((BULKS["semicircle"], [2.0, 3.0])), 30, 4).outliers
    assert str(outliers) == "2 above the bulk"


def test_a_classifier_has_about_as_many_as_classes():
    """One for each of ten classes but one; on the training images the smallest of them is in the tail of the bulk."""
    for split, expected in (("train", 8), ("test", 9)):
        run = hesd.block_lanczos(hesd.HessianOperator(demo_problem(split)), steps=14, block_size=4)
        for steps in (11, 14):
            number = hesd.SpectralMeasure.from_tridiagonal(run.truncated(steps)).outliers.number_above
            assert (number.low, number.value, number.high) == (expected,) * 3
