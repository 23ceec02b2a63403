"""The type rule on spectra made to be of each type, and on its borders."""

from __future__ import annotations

import math
from dataclasses import FrozenInstanceError, replace

import numpy as np
import pytest
from numpy_block_lanczos import Array, block_lanczos, rademacher

from hesd_fast.errors import ProblemError
from hesd_fast.estimate import Estimate
from hesd_fast.methodology.generalization_criteria import criteria
from hesd_fast.methodology.hesd_type import (
    BALANCED,
    CONTRADICTORY,
    CONVERGE_EXTREMES,
    LESS_NOISE,
    MORE_PROBES,
    MORE_STEPS,
    HESDType,
    TypeEvidence,
    TypeThresholds,
    classify,
    decide_type,
)
from hesd_fast.spectrum.spectral_measure import SpectralMeasure

SIZE = 1000


def positive(size: int = SIZE) -> Array:
    """Most of the nuclear norm in positive outliers, half of the mass negative."""
    return np.concatenate([np.random.default_rng(0).normal(0.0, 1e-4, size - 30), [-0.5], np.linspace(0.5, 8.0, 29)])


def run(spectrum: Array, steps: int = 30, probes: int = 4, seed: int = 0) -> SpectralMeasure:
    return SpectralMeasure.from_tridiagonal(block_lanczos(spectrum, rademacher(probes, spectrum.size, seed), steps))


def bare(nodes: list[float], weights: list[float]) -> tuple[HESDType, TypeEvidence]:
    measure = SpectralMeasure(nodes, weights)
    return classify(measure, criteria(measure))


def test_mainly_positive_although_half_of_the_eigenvalues_are_negative() -> None:
    measure = run(positive())
    assert np.mean(positive() < 0.0) > 0.45
    hesd_type, evidence = classify(measure, criteria(measure))
    assert hesd_type is HESDType.MP
    assert evidence.balance.low >= evidence.thresholds.delta
    assert evidence.advice == ()
    assert evidence.thresholds.version == 1


def test_mainly_negative_is_the_mirror_image() -> None:
    measure = run(-positive())
    assert classify(measure, criteria(measure))[0] is HESDType.MN


@pytest.mark.parametrize("value", [1.0, -1.0])
def test_identity(value: float) -> None:
    measure = run(np.full(SIZE, value))
    expected = HESDType.MP if value > 0.0 else HESDType.MN
    assert classify(measure, criteria(measure))[0] is expected


def test_a_balanced_spectrum_is_undetermined_and_nothing_more_can_be_computed() -> None:
    hesd_type, evidence = bare([-1.0, 1.0], [0.5, 0.5])
    assert hesd_type is HESDType.UNDETERMINED
    assert "balance" in evidence.reason
    assert "does not lie above" in evidence.reason
    hesd_type, evidence = bare([-1.0, 1.01], [0.5, 0.5])
    assert evidence.advice == (BALANCED,)


def test_contradicting_conditions_are_undetermined() -> None:
    # The balance is positive, the largest magnitude negative.
    hesd_type, evidence = bare([-3.0, 1.0], [0.1, 0.9])
    assert evidence.balance.value == pytest.approx(0.5)
    assert hesd_type is HESDType.UNDETERMINED
    assert "lambda_max" in evidence.reason
    assert "balance" not in evidence.reason
    assert evidence.advice == (CONTRADICTORY,)


def test_where_noise_is_what_is_wide_more_steps_are_not_advised() -> None:
    measure = SpectralMeasure([-1.0, 2.0], [0.5, 0.5])
    wide = replace(criteria(measure), balance=Estimate(0.2, -0.3, 0.7), probe_balance=Estimate(0.2, -0.3, 0.7))
    assert classify(measure, wide, noise=1e-3)[1].advice == (MORE_STEPS,)
    assert classify(measure, wide, noise=0.1)[1].advice == (LESS_NOISE,)


def test_balance_border_belongs_to_the_type() -> None:
    measure = SpectralMeasure([-1.0, 2.0], [0.5, 0.5])
    result = criteria(measure)
    border = Estimate(0.1, 0.1, 0.1)
    below = Estimate(math.nextafter(0.1, 0.0), math.nextafter(0.1, 0.0), 0.2)
    below = Estimate(below.low, below.low, 0.2)
    assert classify(measure, replace(result, balance=border))[0] is HESDType.MP
    assert classify(measure, replace(result, balance=below))[0] is HESDType.UNDETERMINED
    assert classify(measure, result, thresholds=TypeThresholds(delta=0.5))[0] is HESDType.UNDETERMINED


def test_advice_follows_what_is_wide() -> None:
    measure = SpectralMeasure([-1.0, 2.0], [0.5, 0.5])
    result = criteria(measure)
    wide, narrow = Estimate(0.2, -0.3, 0.7), Estimate(0.2, 0.19, 0.21)
    assert classify(measure, replace(result, balance=wide, probe_balance=wide))[1].advice == (MORE_STEPS,)
    assert classify(measure, replace(result, balance=wide, probe_balance=narrow))[1].advice == (MORE_PROBES,)
    between = Estimate(0.2, -0.1, 0.5)
    both = classify(measure, replace(result, balance=wide, probe_balance=between))[1].advice
    assert set(both) == {MORE_STEPS, MORE_PROBES}
    assert both[0] == MORE_STEPS


def test_few_steps_are_undetermined_and_more_steps_decide() -> None:
    few = run(positive(), steps=1)
    hesd_type, evidence = classify(few, criteria(few))
    assert hesd_type is HESDType.UNDETERMINED
    assert MORE_STEPS in evidence.advice
    many = run(positive(), steps=30)
    assert classify(many, criteria(many))[0] is HESDType.MP


def test_quasi_singular_by_sharpness() -> None:
    measure = run(positive())
    result = criteria(measure)
    # Sharpness 8 * ||theta||^2 / L against kappa = 1e-2.
    for norm_squared, expected in ((1e-3, HESDType.QS), (2e-3, HESDType.MP)):
        hesd_type, evidence = classify(measure, result, loss_value=1.0, parameter_norm_squared=norm_squared)
        assert hesd_type is expected
        assert evidence.sharpness is not None
        assert evidence.sharpness.value == pytest.approx(8.0 * norm_squared, rel=1e-6)
    # Also when all curvature is negative: it is the magnitude that counts.
    mirrored = run(-positive())
    assert classify(mirrored, criteria(mirrored), loss_value=1.0, parameter_norm_squared=1e-3)[0] is HESDType.QS


def test_sharpness_at_kappa_is_not_below_it() -> None:
    measure = SpectralMeasure([-0.25, 1.0], [0.5, 0.5])
    thresholds = TypeThresholds(kappa=0.5)
    at = classify(measure, criteria(measure), loss_value=1.0, parameter_norm_squared=0.5, thresholds=thresholds)
    under = classify(measure, criteria(measure), loss_value=1.0, parameter_norm_squared=0.499, thresholds=thresholds)
    assert (at[0], under[0]) == (HESDType.MP, HESDType.QS)


def test_undecided_sharpness_or_noise_is_undetermined() -> None:
    # Two probes that disagree on the largest node leave an interval for it.
    measure = SpectralMeasure([[-0.1, 1.0], [-0.1, 2.0]], [[0.5, 0.5], [0.5, 0.5]])
    result = criteria(measure)
    hesd_type, evidence = classify(measure, result, loss_value=1.0, parameter_norm_squared=0.007)
    assert hesd_type is HESDType.UNDETERMINED
    assert evidence.advice == (CONVERGE_EXTREMES,)
    hesd_type, evidence = classify(measure, result, noise=1.5)
    assert hesd_type is HESDType.UNDETERMINED
    assert evidence.advice[0] == LESS_NOISE
    assert classify(measure, result, noise=0.5)[0] is HESDType.MP


def test_quasi_singular_under_noise() -> None:
    measure = run(positive())
    hesd_type, evidence = classify(measure, criteria(measure), noise=10.0)
    assert hesd_type is HESDType.QS
    assert "noise" in evidence.reason
    zero = run(np.zeros(SIZE))
    assert classify(zero, criteria(zero))[0] is HESDType.QS
    # The resolution of the criteria is the noise when nothing else is said.
    assert classify(measure, criteria(measure, resolution=10.0))[0] is HESDType.QS


def test_loss_that_is_not_positive_has_no_sharpness() -> None:
    measure = run(positive())
    for loss in (0.0, -1.0):
        hesd_type, evidence = classify(measure, criteria(measure), loss_value=loss, parameter_norm_squared=1e-9)
        assert evidence.sharpness is None
        assert hesd_type is HESDType.MP


def test_weights_of_zero_have_no_sharpness_however_large_the_curvature() -> None:
    result = criteria(SpectralMeasure([-1.0, 2.0], [0.5, 0.5]))
    unbounded, smallest = Estimate(2.0, 2.0, math.inf), Estimate(-1.0, -1.0, -1.0)
    hesd_type, evidence = decide_type(unbounded, smallest, result, (1.0, 0.0), result.resolution, TypeThresholds())
    assert evidence.sharpness is not None
    assert [evidence.sharpness.value, evidence.sharpness.low, evidence.sharpness.high] == [0.0, 0.0, 0.0]
    assert hesd_type is HESDType.QS


def test_bad_numbers_are_refused() -> None:
    measure = SpectralMeasure([-1.0, 2.0], [0.5, 0.5])
    result = criteria(measure)
    for options, words in (
        ({"loss_value": 1.0}, "both"),
        ({"parameter_norm_squared": 1.0}, "both"),
        ({"loss_value": math.nan, "parameter_norm_squared": 1.0}, "loss_value must be finite"),
        ({"loss_value": 1.0, "parameter_norm_squared": -1.0}, "parameter_norm_squared"),
        ({"noise": -1.0}, "noise"),
    ):
        with pytest.raises(ProblemError, match=words):
            classify(measure, result, **options)
    with pytest.raises(ProblemError, match="delta"):
        TypeThresholds(delta=0.0)
    with pytest.raises(ProblemError, match="kappa"):
        TypeThresholds(kappa=-1.0)


def test_evidence_is_frozen_and_printable() -> None:
    measure = SpectralMeasure([-1.0, 2.0], [0.5, 0.5])
    hesd_type, evidence = classify(measure, criteria(measure))
    assert str(hesd_type) == "mainly positive"
    with pytest.raises(FrozenInstanceError):
        evidence.reason = "because"  # type: ignore[misc]
