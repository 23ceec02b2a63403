"""The unified methodology: type first, then criteria, then a verdict."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pytest

from hesd_fast.errors import ProblemError
from hesd_fast.estimate import Estimate
from hesd_fast.methodology.assessment import ComparisonThresholds, Verdict, compare
from hesd_fast.methodology.generalization_criteria import Criteria, criteria
from hesd_fast.methodology.hesd_type import HESDType, TypeEvidence, classify
from hesd_fast.spectrum.spectral_measure import SpectralMeasure


@dataclass(frozen=True)
class FakeReport:
    hesd_type: HESDType
    type_evidence: TypeEvidence
    criteria: Criteria


def from_nodes(nodes: list[float], weights: list[float], **options: float) -> FakeReport:
    measure = SpectralMeasure(nodes, weights)
    result = criteria(measure)
    return FakeReport(*classify(measure, result, **options), result)  # type: ignore[arg-type]


def mp(negative: float, r_e: tuple[float, float, float] | None = None) -> FakeReport:
    """A mainly positive report with r_e = negative / 2 and k_mass = negative / 2, or with another interval of r_e."""
    report = from_nodes([-negative, 2.0], [0.5, 0.5])
    assert report.hesd_type is HESDType.MP
    if r_e is None:
        return report
    changed = Criteria(**{**report.criteria.__dict__, "r_e": Estimate(*r_e)})
    return FakeReport(report.hesd_type, report.type_evidence, changed)


def verdict(reference: FakeReport, other: FakeReport, **thresholds: float) -> Verdict:
    rule = ComparisonThresholds(**thresholds) if thresholds else None  # type: ignore[arg-type]
    return compare({"train": reference, "shifted": other}, thresholds=rule).entries[0].verdict


def test_the_three_verdicts() -> None:
    assert verdict(mp(0.2), mp(0.2)) is Verdict.HOLDS
    assert verdict(mp(0.2), mp(0.1)) is Verdict.HOLDS
    assert verdict(mp(0.2), mp(0.6)) is Verdict.DEGRADES
    assert verdict(mp(0.2), mp(0.2, r_e=(0.1, 0.05, 0.5))) is Verdict.INCONCLUSIVE
    assert verdict(mp(0.2, r_e=(0.1, 0.0, 0.5)), mp(0.2)) is Verdict.INCONCLUSIVE


def test_border_of_the_allowed_growth() -> None:
    # 0.1 may grow to 1.25 * 0.1 + 0.01 = 0.135.
    reference = mp(0.2)
    assert verdict(reference, mp(0.2, r_e=(0.134, 0.134, 0.134))) is Verdict.HOLDS
    assert verdict(reference, mp(0.2, r_e=(0.136, 0.136, 0.136))) is Verdict.DEGRADES
    assert verdict(reference, mp(0.2, r_e=(0.136, 0.134, 0.137))) is Verdict.INCONCLUSIVE
    assert verdict(reference, mp(0.2, r_e=(0.136, 0.136, 0.136)), relative=0.4) is Verdict.HOLDS
    assert verdict(reference, mp(0.2, r_e=(0.136, 0.136, 0.136)), absolute=0.02) is Verdict.HOLDS


def test_one_criterion_is_enough_to_degrade_and_k_hn_decides_nothing() -> None:
    reference = mp(0.2)
    worse = Criteria(**{**reference.criteria.__dict__, "k_mass": Estimate(0.9, 0.8, 1.0)})
    assert verdict(reference, FakeReport(HESDType.MP, reference.type_evidence, worse)) is Verdict.DEGRADES
    assert "k_mass certainly exceeds 1.25 times" in str(
        compare({"train": reference, "shifted": FakeReport(HESDType.MP, reference.type_evidence, worse)})
    )
    odd = Criteria(**{**reference.criteria.__dict__, "k_hn": Estimate(1e6, 1e6, 1e6)})
    assert verdict(reference, FakeReport(HESDType.MP, reference.type_evidence, odd)) is Verdict.HOLDS


def test_changes_are_interval_arithmetic() -> None:
    change = compare({"a": mp(0.2, r_e=(0.1, 0.05, 0.2)), "b": mp(0.2, r_e=(0.3, 0.2, 0.4))}).entries[0].changes["r_e"]
    got = [change.difference.value, change.difference.low, change.difference.high]
    np.testing.assert_allclose(got, [0.2, 0.0, 0.35], atol=1e-15)
    got = [change.ratio.value, change.ratio.low, change.ratio.high]
    np.testing.assert_allclose(got, [3.0, 1.0, 8.0], rtol=1e-15)


def test_zero_and_infinite_criteria_make_no_nan() -> None:
    zero, unbounded = mp(0.2, r_e=(0.0, 0.0, 0.0)), mp(0.2, r_e=(0.0, 0.0, math.inf))
    for pair in ((zero, zero), (zero, unbounded), (unbounded, zero), (unbounded, unbounded), (zero, mp(0.2))):
        entry = compare({"a": pair[0], "b": pair[1]}).entries[0]
        for estimate in (entry.changes["r_e"].difference, entry.changes["r_e"].ratio):
            assert estimate.low <= estimate.value <= estimate.high  # fails on NaN
    infinite = mp(0.2, r_e=(math.inf, 1.0, math.inf))
    change = compare({"a": infinite, "b": infinite}).entries[0].changes["r_e"]
    assert not math.isnan(change.difference.value)
    assert verdict(zero, zero) is Verdict.HOLDS
    assert verdict(zero, mp(0.2)) is Verdict.DEGRADES


@pytest.mark.parametrize("which", ["train", "shifted"])
def test_types_come_before_criteria(which: str) -> None:
    good = mp(0.2)
    negative = from_nodes([-2.0, 0.2], [0.5, 0.5])
    singular = from_nodes([-0.2, 2.0], [0.5, 0.5], noise=3.0)
    undetermined = from_nodes([-1.0, 1.0], [0.5, 0.5])
    for bad, expected, words in (
        (negative, Verdict.NOT_APPLICABLE, "Likely causes"),
        (singular, Verdict.NOT_APPLICABLE, "says nothing"),
        (undetermined, Verdict.INCONCLUSIVE, "To decide it"),
    ):
        reports = {"train": good, "shifted": good} | {which: bad}
        entry = compare(reports).entries[0]
        assert entry.verdict is expected
        assert words in entry.reason
        assert which in entry.reason
        assert entry.changes == {}


def test_several_entries_and_the_printed_argument() -> None:
    assessment = compare({"train": mp(0.2), "same": mp(0.2), "shifted": mp(0.8)})
    assert [entry.verdict for entry in assessment.entries] == [Verdict.HOLDS, Verdict.DEGRADES]
    text = str(assessment)
    for words in (
        "reference train: mainly positive",
        "same: mainly positive; generalization: holds",
        "k_hn:",
        "degrades",
        "r_e and k_mass certainly exceed 1.25 times",
    ):
        assert words in text


def test_reports_that_cannot_be_compared() -> None:
    with pytest.raises(ProblemError, match="got 1"):
        compare({"train": mp(0.2)})
    other = mp(0.2)
    changed = FakeReport(other.hesd_type, other.type_evidence, Criteria(**{**other.criteria.__dict__, "exponent": 1.0}))
    with pytest.raises(ProblemError, match="same exponents"):
        compare({"train": mp(0.2), "shifted": changed})
    with pytest.raises(ProblemError, match="relative"):
        ComparisonThresholds(relative=-1.0)


def test_what_is_not_a_mapping_of_reports() -> None:
    with pytest.raises(ProblemError, match="compare got a list; give reports by name, the reference first"):
        compare([mp(0.2), mp(0.2)])  # type: ignore[arg-type]
    with pytest.raises(ProblemError, match="compare got a str under 'b'; give a Report"):
        compare({"a": mp(0.2), "b": "run.hesd.json"})  # type: ignore[dict-item]
