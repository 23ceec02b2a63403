"""Runs with probes of their own make one measure; norms, shares and numbers of eigenvalues have intervals that hold."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import hesd_fast as hesd
from hesd_fast.lanczos.drive import drive, multiply_by, start_run
from hesd_fast.lanczos.options import LanczosSettings
from hesd_fast.operators import as_operator

SIZE = 400
EPSILON = 2.0**-52


def network_like():
    random = np.random.default_rng(5)
    return np.sort(np.concatenate([random.normal(0.0, 0.05, SIZE - 8), [-0.6, 0.5, 0.9, 1.3, 2.0, 3.0, 5.0, 8.0]]))


EIGENVALUES = network_like()
OPERATOR = as_operator(torch.diag(torch.from_numpy(EIGENVALUES)))


def run(steps, probes, seed, first_probe=0, kind="sphere"):
    lanczos = start_run(OPERATOR, LanczosSettings(probes, steps, seed=seed, probe_kind=kind, first_probe=first_probe))
    drive({"": lanczos}, multiply_by(OPERATOR))
    return lanczos.result()


def measure_of(*runs):
    return hesd.SpectralMeasure.from_tridiagonal(*runs)


def test_every_probe_counts_the_same():
    runs = [run(12, 4, 0), run(9, 2, 0, first_probe=4)]
    together, first, second = measure_of(*runs), measure_of(runs[0]), measure_of(runs[1])
    assert together.probes == 6
    assert together.tridiagonals == tuple(runs)
    for order in range(4):
        mean = (4 * first.moment(order) + 2 * second.moment(order)) / 6
        assert together.moment(order) == pytest.approx(mean, rel=16 * EPSILON)
    points = np.linspace(-1.0, 8.5, 30)
    for both, one, other in zip(
        together.cdf_bounds(points), first.cdf_bounds(points), second.cdf_bounds(points), strict=True
    ):
        np.testing.assert_allclose(both, (4 * one + 2 * other) / 6, rtol=0, atol=16 * EPSILON)
    trace = (4 * first.trace.value + 2 * second.trace.value) / 6
    assert together.trace.value == pytest.approx(trace, rel=16 * EPSILON)


def test_fresh_probes_narrow_what_they_are_missing_for():
    runs = [run(12, 4, 3, first_probe=4 * i) for i in range(4)]
    one, four = measure_of(runs[0]), measure_of(*runs)
    for name in ("trace", "frobenius_norm"):
        ends = [getattr(measure, name) for measure in (one, four)]
        ratio = (ends[0].high - ends[0].low) / (ends[1].high - ends[1].low)
        assert 1.6 < ratio < 2.5, name  # about the square root of four
    assert four.lambda_max.low <= 8.0 <= four.lambda_max.high


def test_an_eigenvalue_beyond_what_the_first_run_says_is_believed():
    # The first run is of the matrix without its largest eigenvalue, as if its probes had missed that altogether.
    without = as_operator(torch.diag(torch.from_numpy(np.where(EIGENVALUES > 7.0, 0.0, EIGENVALUES))))
    lanczos = start_run(without, LanczosSettings(2, 20))
    drive({"": lanczos}, multiply_by(without))
    measure = measure_of(lanczos.result(), run(20, 2, 0, first_probe=2))
    assert measure_of(lanczos.result()).lambda_max.high < 8.0
    assert measure.lambda_max.low <= 8.0 <= measure.lambda_max.high


def test_runs_that_cannot_be_averaged_are_refused():
    with pytest.raises(hesd.ProblemError, match="got no matrix; give what block_lanczos returns"):
        measure_of()
    with pytest.raises(hesd.ProblemError, match="from_tridiagonal got ndarray; give what block_lanczos returns"):
        measure_of(np.eye(3))
    other = hesd.block_lanczos(torch.eye(5).double(), 2, 1)
    with pytest.raises(hesd.ProblemError, match=r"orders \[5, 400\]; wanted runs on one operator"):
        measure_of(run(3, 1, 0), other)
    given = hesd.block_lanczos(OPERATOR, 3, probes=torch.ones(1, SIZE).double())
    with pytest.raises(hesd.ProblemError, match="probe_kind='given'; several runs are averaged only if all"):
        measure_of(run(3, 1, 0), given)
    assert measure_of(given).probes == 1


@pytest.mark.parametrize(("steps", "probes", "runs"), [(6, 2, 1), (15, 4, 1), (10, 4, 3), (25, 1, 2)])
def test_norm_shares_and_numbers_hold_the_truth(steps, probes, runs):
    points = (-0.3, 0.12, 0.7, 4.0, 9.0)
    seeds, misses = 40, dict.fromkeys(["norm", "share", *points], 0)
    for seed in range(seeds):
        measure = measure_of(*[run(steps, probes, seed, probes * i) for i in range(runs)])
        norm, share = measure.frobenius_norm, measure.share_between(-0.05, 0.05)
        misses["norm"] += not norm.low <= np.linalg.norm(EIGENVALUES) <= norm.high
        misses["share"] += not share.low <= (np.abs(EIGENVALUES) <= 0.05).mean() <= share.high
        for point in points:
            number = measure.count_above(point)
            assert number.low == round(number.low)
            count = np.count_nonzero(point < EIGENVALUES)
            misses[point] += not number.low <= count <= number.high
    assert max(misses.values()) <= 4, misses  # a risk of 5 % misses more of 40 once in 300


def test_outliers_are_counted_exactly():
    measure = measure_of(run(25, 4, 0))
    for point, count in ((0.45, 7), (1.0, 5), (6.0, 1), (9.0, 0)):
        number = measure.count_above(point)
        assert (number.low, number.high) == (count, count)
    assert measure.count_above(-10.0).value == SIZE


def test_exact_runs_and_bare_measures_count_exactly():
    eigenvalues = np.array([-2.0, -2.0, 0.0, 1.0, 3.0])
    exact = measure_of(hesd.block_lanczos(torch.diag(torch.from_numpy(eigenvalues)), 5, 2))
    bare = hesd.SpectralMeasure(eigenvalues, np.full(5, 0.2), size=5)
    for measure in (exact, bare):
        assert measure.frobenius_norm.value == pytest.approx(np.sqrt(18.0), rel=64 * EPSILON)
        assert measure.share_between(-2.5, 0.5).value == pytest.approx(0.6, abs=1e-6)
        assert measure.count_above(0.5).value == 2.0
    assert bare.share_between(-np.inf, np.inf).low == pytest.approx(1.0)
    with pytest.raises(hesd.ProblemError, match=r"low is 2\.0 and high is 1\.0; wanted low <= high"):
        bare.share_between(2.0, 1.0)
    sizeless = hesd.SpectralMeasure([1.0], [1.0])
    for number in (lambda: sizeless.frobenius_norm, lambda: sizeless.count_above(0.0)):
        with pytest.raises(hesd.ProblemError, match="got size=None; pass size=n to SpectralMeasure"):
            number()


@pytest.mark.parametrize("kind", ["sphere", "gaussian", "rademacher"])
def test_probes_on_two_equal_coordinates(kind):
    # lambda_max belongs to (1, 1, 0, 0, ...) / sqrt(2), to which signs are orthogonal half of the time
    matrix = torch.diag(torch.linspace(0.0, 1.0, 60)).double()
    matrix[:2, :2] = torch.tensor([[1.0, 1.0], [1.0, 1.0]])
    seeds, misses = 80, 0
    for seed in range(seeds):
        lambda_max = measure_of(hesd.block_lanczos(matrix, 12, 1, seed=seed, probe_kind=kind)).lambda_max
        misses += lambda_max.high < 2.0
    if kind == "rademacher":
        assert misses > 25
    else:
        assert misses <= 6  # 2.5 % of 80 are 2


def test_probes_on_the_sphere_have_its_radius():
    for dtype in (torch.float64, torch.float32):
        operator = as_operator(torch.eye(1000, dtype=dtype))
        start = start_run(operator, LanczosSettings(3, 1, seed=4)).panel
        result = hesd.block_lanczos(operator, 1, 3, seed=4)
        sums = (result.start**2).sum(axis=1) / 1000
        np.testing.assert_allclose(sums, 1.0, rtol=0, atol=16 * torch.finfo(dtype).eps)
        assert start.shape == (3, 1000)


def test_nothing_is_counted_where_nothing_is():
    # sums of weights round, and what rounds to 1e-16 is no eigenvalue
    for size in (5, 20, 60):
        for seed in range(20):
            matrix = torch.diag(torch.linspace(-2.0, -1.0, size)).double()
            measure = measure_of(hesd.block_lanczos(matrix, size, 2, seed=seed))
            assert measure.count_above(0.0).high == 0.0
            assert measure.count_above(-3.0).low == size


def test_ends_that_are_infinite_or_no_numbers():
    measure = measure_of(run(8, 2, 0))
    assert measure.share_between(-np.inf, np.inf).value == 1.0
    assert measure.share_between(np.inf, np.inf).value == 0.0
    assert measure.count_above(1.7976931348623157e308).value == 0.0
    for wrong in ("a", None, [0.0, 1.0], 1j):
        for call in (measure.count_above, lambda x: measure.share_between(x, np.inf)):
            with pytest.raises(hesd.ProblemError, match="wanted a number"):
                call(wrong)
