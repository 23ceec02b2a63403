"""Criteria: published values, node invariance, intervals that contain the truth."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
from numpy_block_lanczos import EPSILON, Array, block_lanczos, rademacher, rotation

from hesd_fast.errors import ProblemError
from hesd_fast.estimate import Estimate
from hesd_fast.methodology.generalization_criteria import Criteria, criteria
from hesd_fast.methodology.signed_moments import Interval, signed_moments
from hesd_fast.spectrum.spectral_measure import SpectralMeasure

PUBLISHED = json.loads((Path(__file__).parent / "lla_criteria.json").read_text())["cases"]
SIZE = 200


def trained(size: int, seed: int, negative: float = 0.5) -> Array:
    """A spectrum like that of a trained network: a bulk around zero, a few large outliers, one negative outlier."""
    random = np.random.default_rng(seed)
    return np.concatenate([random.normal(0.0, 0.02, size - 7), [-negative, 0.5, 1.0, 2.0, 3.0, 5.0, 8.0]])


def rotated(spectrum: Array, seed: int = 1) -> tuple[Array, Array]:
    basis = rotation(spectrum.size, seed)
    return (basis * spectrum) @ basis.T, basis


def contains(estimate: Estimate | Interval, truth: float) -> bool:
    slack = 1e3 * EPSILON * max(1.0, abs(truth))
    return estimate.low - slack <= truth <= estimate.high + slack


def signed(spectrum: Array, weights: Array, exponent: float, resolution: float) -> tuple[float, float]:
    powers = np.abs(spectrum) ** exponent
    return float(weights @ (powers * (spectrum > resolution))), float(weights @ (powers * (spectrum < -resolution)))


@pytest.mark.parametrize("case", PUBLISHED, ids=[case["name"] for case in PUBLISHED])
def test_equal_to_the_published_library(case: dict[str, object]) -> None:
    result = criteria(SpectralMeasure(case["eigenvalues"], case["weights"]), exponent=case["n"])  # type: ignore[arg-type]
    # The published values of a trained network were computed in single precision, those of synthetic ones in double.
    single = str(case["name"]).startswith("trained")
    tolerance = 2.0**-23 if single else 1e-12
    assert result.r_e.value == pytest.approx(case["re"], rel=tolerance)
    assert result.k_hn.value == pytest.approx(case["Khn"], rel=tolerance)
    if single:
        assert float(np.float32(result.r_e.value)) == case["re"]
    if len(case["eigenvalues"]) == 1:  # type: ignore[arg-type]
        for name in ("r_e", "k_hn", "k_mass", "balance", "unresolved_mass"):
            estimate = getattr(result, name)
            assert estimate.low == estimate.value == estimate.high


def test_exponent_of_k_hn_by_hand() -> None:
    measure = SpectralMeasure([-1.0, 4.0], [0.25, 0.75])
    assert criteria(measure, exponent=1.0).k_hn.value == pytest.approx(0.25 / 3.0, rel=10 * EPSILON)
    assert criteria(measure, exponent=0.5).k_hn.value == pytest.approx(0.5 / math.sqrt(3.0), rel=10 * EPSILON)
    assert criteria(measure, mass_exponent=2.0).k_mass.value == pytest.approx(0.25 / 12.0, rel=10 * EPSILON)
    assert criteria(measure).balance.value == pytest.approx(2.75 / 3.25, rel=10 * EPSILON)


def test_k_mass_does_not_depend_on_the_nodes_and_k_hn_does() -> None:
    one = SpectralMeasure([-1.0, 0.5, 4.0], [0.2, 0.2, 0.6])
    split = SpectralMeasure([-1.0, -1.0, 0.5, 4.0], [0.15, 0.05, 0.2, 0.6])
    assert criteria(split).k_mass.value == pytest.approx(criteria(one).k_mass.value, rel=10 * EPSILON)
    assert criteria(split).balance.value == pytest.approx(criteria(one).balance.value, rel=10 * EPSILON)
    assert criteria(split).k_hn.value > 1.2 * criteria(one).k_hn.value


def test_spread_over_probes_of_a_bare_measure() -> None:
    result = criteria(SpectralMeasure([[-1.0, 2.0], [-1.0, 4.0]], [[0.5, 0.5], [0.5, 0.5]]))
    assert result.r_e.value == pytest.approx(0.375)
    assert result.r_e.high == pytest.approx(0.375 + 2.0 * 0.125)  # the mean and two standard errors of two values
    assert result.r_e.low == pytest.approx(0.375 - 2.0 * 0.125)
    assert result.k_mass.low <= 0.375 <= result.k_mass.high


@pytest.mark.parametrize("steps", [1, 2, 4, 10, 25])
@pytest.mark.parametrize("probes", [1, 4])
def test_intervals_contain_the_probes_truth(steps: int, probes: int) -> None:
    for seed, spectrum in enumerate(
        [
            trained(SIZE, 0),
            trained(SIZE, 1, negative=12.0),
            -trained(SIZE, 2),
            np.random.default_rng(3).normal(0.0, 1.0, SIZE),
            np.abs(trained(SIZE, 4)),
        ]
    ):
        matrix, basis = rotated(spectrum)
        z = rademacher(probes, SIZE, seed)
        weights = ((z @ basis) ** 2 / SIZE).mean(axis=0)
        measure = SpectralMeasure.from_tridiagonal(block_lanczos(matrix, z, steps))
        for resolution in (None, 0.03):
            result = criteria(measure, resolution=resolution)
            plus, minus = signed(spectrum, weights, 1.0, result.resolution)
            moments = signed_moments(measure, 1.0, result.resolution)
            of_probes, of_matrix = moments.of_probes, moments.of_matrix
            slack = 1e3 * EPSILON
            assert of_probes.plus.low - slack <= plus <= of_probes.plus.high + slack
            assert of_probes.minus.low - slack <= minus <= of_probes.minus.high + slack
            assert contains(result.probe_balance, (plus - minus) / (plus + minus))
            assert contains(result.unresolved_mass, float(weights @ (np.abs(spectrum) <= result.resolution)))
            # the matrix's own values, as far as two standard errors go; these seeds are within them
            plus, minus = signed(spectrum, np.full(SIZE, 1.0 / SIZE), 1.0, result.resolution)
            assert contains(of_matrix.plus, plus)
            assert contains(of_matrix.minus, minus)
            assert contains(result.balance, (plus - minus) / (plus + minus))
            assert contains(result.k_mass, minus / plus)


@pytest.mark.parametrize("exponent", [0.5, 1.5, 2.0])
def test_other_mass_exponents(exponent: float) -> None:
    spectrum = trained(SIZE, 0)
    matrix, basis = rotated(spectrum)
    z = rademacher(3, SIZE, 0)
    weights = ((z @ basis) ** 2 / SIZE).mean(axis=0)
    result = criteria(SpectralMeasure.from_tridiagonal(block_lanczos(matrix, z, 20)), mass_exponent=exponent)
    plus, minus = signed(spectrum, weights, exponent, result.resolution)
    assert contains(result.probe_balance, (plus - minus) / (plus + minus))
    assert result.probe_balance.high - result.probe_balance.low < 0.5


@pytest.mark.parametrize("exponent", [0.5, 1.0])
def test_intervals_contain_the_truth_of_the_matrix(exponent: float) -> None:
    size, seeds = 100, 100
    spectrum = trained(size, 0)
    matrix, _ = rotated(spectrum)
    uniform = np.full(size, 1.0 / size)
    hits: dict[str, int] = dict.fromkeys(("plus", "minus", "balance", "k_mass", "unresolved"), 0)
    for seed in range(seeds):
        # 25 steps leave little to the bounds, so that it is the standard errors that are tested.
        measure = SpectralMeasure.from_tridiagonal(block_lanczos(matrix, rademacher(2, size, seed), 25))
        result = criteria(measure, mass_exponent=exponent, resolution=0.01)
        plus, minus = signed(spectrum, uniform, exponent, result.resolution)
        of_matrix = signed_moments(measure, exponent, result.resolution).of_matrix
        hits["plus"] += contains(of_matrix.plus, plus)
        hits["minus"] += contains(of_matrix.minus, minus)
        hits["balance"] += contains(result.balance, (plus - minus) / (plus + minus))
        hits["k_mass"] += contains(result.k_mass, minus / plus)
        hits["unresolved"] += contains(result.unresolved_mass, float(uniform @ (np.abs(spectrum) <= 0.01)))
    assert min(hits.values()) >= 0.95 * seeds, hits


def test_standard_errors_are_not_needlessly_wide() -> None:
    # Without the standard errors the interval of the probes misses the truth of the matrix: the widening does work.
    spectrum = trained(SIZE, 0)
    matrix, _ = rotated(spectrum)
    plus, minus = signed(spectrum, np.full(SIZE, 1.0 / SIZE), 1.0, 0.0)
    truth = (plus - minus) / (plus + minus)
    missed = 0
    for seed in range(10):
        result = criteria(SpectralMeasure.from_tridiagonal(block_lanczos(matrix, rademacher(1, SIZE, seed), 80)))
        missed += not contains(result.probe_balance, truth)
    assert missed >= 3


def test_more_steps_tighten_balance_and_k_mass() -> None:
    matrix, _ = rotated(trained(SIZE, 0))
    z = rademacher(2, SIZE, 0)
    widths = []
    for steps in (3, 8, 20, 60):
        result = criteria(SpectralMeasure.from_tridiagonal(block_lanczos(matrix, z, steps)))
        widths.append(result.probe_balance.high - result.probe_balance.low)
    assert all(later < 0.8 * earlier for earlier, later in itertools.pairwise(widths))


def test_the_value_of_the_balance_does_not_hang_on_the_sign_of_the_bulk_node() -> None:
    # The sign of the node that carries the bulk flips with the number of steps; the balance hardly moves.
    spectrum = np.concatenate([np.random.default_rng(0).normal(0.0, 1e-3, 2000 - 4), [1.0, 2.0, 3.0, 4.0]])
    z = rademacher(2, 2000, 0)
    t = block_lanczos(spectrum, z, 10)
    values, negative = [], []
    for steps in range(6, 11):
        measure = SpectralMeasure.from_tridiagonal(t.truncated(steps))
        values.append(criteria(measure).balance.value)
        negative.append(float(measure.cdf(0.0)))
    assert max(negative) - min(negative) > 0.25
    assert max(values) - min(values) < 0.05


@pytest.mark.parametrize("negative", [0.5, 12.0])
def test_r_e_interval(negative: float) -> None:
    spectrum = trained(SIZE, 0, negative=negative)
    matrix, _ = rotated(spectrum)
    for steps in (8, 12, 20):
        measure = SpectralMeasure.from_tridiagonal(block_lanczos(matrix, rademacher(3, SIZE, 0), steps))
        r_e = criteria(measure).r_e
        assert contains(r_e, negative / 8.0)
        assert r_e.value == pytest.approx(-measure.lambda_min.value / measure.lambda_max.value, rel=10 * EPSILON)


def test_r_e_is_zero_when_no_negative_value_is_resolved() -> None:
    spectrum = np.abs(trained(SIZE, 0))
    matrix, _ = rotated(spectrum)
    measure = SpectralMeasure.from_tridiagonal(block_lanczos(matrix, rademacher(3, SIZE, 0), 20))
    r_e = criteria(measure).r_e
    assert r_e.value == r_e.low == 0.0
    assert 0.0 < r_e.high < 1e-2
    # A resolution above the negative outlier takes its sign away.
    indefinite, _ = rotated(trained(SIZE, 0, negative=0.5))
    measure = SpectralMeasure.from_tridiagonal(block_lanczos(indefinite, rademacher(3, SIZE, 0), 20))
    assert criteria(measure, resolution=0.4).r_e.value > 0.0
    assert criteria(measure, resolution=0.6).r_e.value == 0.0


def test_k_hn_interval_contains_the_values_at_fewer_steps() -> None:
    matrix, _ = rotated(trained(SIZE, 0))
    t = block_lanczos(matrix, rademacher(2, SIZE, 0), 16)
    k_hn = criteria(SpectralMeasure.from_tridiagonal(t)).k_hn
    for steps in (8, 16):
        cut = SpectralMeasure.from_tridiagonal(t.truncated(steps))
        bare = SpectralMeasure(list(cut.nodes), list(cut.weights))
        assert contains(k_hn, criteria(bare).k_hn.value)
    assert k_hn.value == pytest.approx(criteria(bare).k_hn.value, rel=10 * EPSILON)
    assert k_hn.high > k_hn.low


def finite_or_infinite(result: Criteria) -> None:
    for name in ("r_e", "k_hn", "k_mass", "balance", "probe_balance", "unresolved_mass"):
        estimate = getattr(result, name)
        assert estimate.low <= estimate.value <= estimate.high, name  # fails on NaN


@pytest.mark.parametrize("steps", [1, 3, 12])
def test_all_negative_spectrum(steps: int) -> None:
    spectrum = -np.random.default_rng(0).uniform(0.5, 3.0, SIZE)
    measure = SpectralMeasure.from_tridiagonal(block_lanczos(spectrum, rademacher(2, SIZE, 0), steps))
    result = criteria(measure)
    finite_or_infinite(result)
    assert result.r_e.value == math.inf
    assert result.k_hn.value == math.inf
    assert result.k_mass.high == math.inf
    assert result.balance.low == pytest.approx(-1.0, abs=1e-9)
    if steps == 12:
        assert result.balance.high < -0.9
    bare = criteria(SpectralMeasure([-3.0, -1.0], [0.5, 0.5]))
    assert bare.r_e.value == 3.0  # the plain ratio of the extreme nodes
    assert bare.k_mass.value == math.inf
    assert bare.balance.value == -1.0


def test_zero_spectrum() -> None:
    measure = SpectralMeasure.from_tridiagonal(block_lanczos(np.zeros(SIZE), rademacher(2, SIZE, 0), 5))
    result = criteria(measure)
    finite_or_infinite(result)
    assert (result.balance.low, result.balance.value, result.balance.high) == (-1.0, 0.0, 1.0)
    assert (result.k_mass.low, result.k_mass.value, result.k_mass.high) == (0.0, 0.0, math.inf)
    assert (result.r_e.low, result.r_e.value, result.r_e.high) == (0.0, 0.0, math.inf)
    assert (result.k_hn.value, result.k_hn.high) == (0.0, math.inf)
    # The bounds leave r^2 with r = 8 * 2^-26, and the standard error is of the order of its square root.
    assert result.unresolved_mass.low == pytest.approx(1.0, abs=1e-4)
    finite_or_infinite(criteria(SpectralMeasure([0.0], [1.0])))


@pytest.mark.parametrize("value", [2.5, -2.5])
def test_multiple_of_the_identity(value: float) -> None:
    measure = SpectralMeasure.from_tridiagonal(block_lanczos(np.full(SIZE, value), rademacher(2, SIZE, 0), 5))
    for mass_exponent in (1.0, 3.0):  # one step, but every moment is known
        result = criteria(measure, mass_exponent=mass_exponent)
        finite_or_infinite(result)
        assert result.balance.value == pytest.approx(math.copysign(1.0, value), abs=1e-6)
    assert result.r_e.value == (0.0 if value > 0.0 else math.inf)


@pytest.mark.parametrize("scale", [1e-30, 1e-6, 1e12])
def test_criteria_do_not_depend_on_the_unit(scale: float) -> None:
    spectrum, z = trained(SIZE, 0), rademacher(2, SIZE, 0)
    one = criteria(SpectralMeasure.from_tridiagonal(block_lanczos(spectrum, z, 10)))
    scaled = criteria(SpectralMeasure.from_tridiagonal(block_lanczos(spectrum * scale, z, 10)))
    for name in ("r_e", "k_hn", "k_mass", "balance"):
        for end in ("low", "value", "high"):
            # The position of a node near a prescribed one is known to 8 * 2^-26.
            assert getattr(getattr(scaled, name), end) == pytest.approx(getattr(getattr(one, name), end), abs=1e-5)
    assert scaled.resolution == pytest.approx(one.resolution * scale, rel=1e-12)


def test_bad_options_are_refused() -> None:
    measure = SpectralMeasure.from_tridiagonal(block_lanczos(trained(SIZE, 0), rademacher(1, SIZE, 0), 2))
    for options, words in (
        ({"exponent": 0.0}, "exponent must be positive"),
        ({"mass_exponent": math.nan}, "mass_exponent must be positive"),
        ({"resolution": -1.0}, "resolution must be finite"),
        ({"mass_exponent": 3.0}, "take more steps"),
    ):
        with pytest.raises(ProblemError, match=words):
            criteria(measure, **options)
    with pytest.raises(ProblemError, match="bare nodes"):
        signed_moments(SpectralMeasure([1.0], [1.0]), 1.0, 0.0)
