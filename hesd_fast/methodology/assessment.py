"""The unified methodology: find the type of every spectrum first, then compare the criteria."""

from __future__ import annotations

import enum
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from hesd_fast.errors import ProblemError
from hesd_fast.estimate import Estimate
from hesd_fast.methodology.comparability import check_comparable, check_reports, notes
from hesd_fast.methodology.generalization_criteria import Criteria
from hesd_fast.methodology.hesd_type import HESDType, TypeEvidence
from hesd_fast.terminal import printable


@runtime_checkable
class TypedReport(Protocol):
    """What `compare` needs of a report."""

    @property
    def hesd_type(self) -> HESDType:
        """The type of the spectrum."""

    @property
    def type_evidence(self) -> TypeEvidence:
        """Why it is of that type."""

    @property
    def criteria(self) -> Criteria:
        """The criteria of the spectrum."""


class Verdict(enum.Enum):
    """What the criteria say about generalization from the reference to another data set.

    Examples
    --------
    >>> import hesd_fast as hesd
    >>> [str(verdict) for verdict in hesd.Verdict]
    ['holds', 'degrades', 'inconclusive', 'not applicable']
    """

    HOLDS = "holds"
    DEGRADES = "degrades"
    INCONCLUSIVE = "inconclusive"
    NOT_APPLICABLE = "not applicable"

    def __str__(self) -> str:
        return self.value


@dataclass(frozen=True)
class ComparisonThresholds:
    """How much a criterion may grow before generalization is said to degrade.

    A criterion ``c`` may grow from the reference ``r`` up to ``(1 + relative) r + absolute``. The numbers are our own
    choice and provisional.

    Attributes
    ----------
    relative, absolute : float
        The allowed growth.
    version : int
        Version of the rule and its numbers.
    """

    relative: float = 0.25
    absolute: float = 0.01
    version: int = 1

    def __post_init__(self) -> None:
        for name in ("relative", "absolute"):
            value = getattr(self, name)
            if not (value >= 0.0 and math.isfinite(value)):
                raise ProblemError(f"{name} must be finite and not negative, got {value!r}; it is an allowed growth")


@dataclass(frozen=True)
class Change:
    """A criterion on the reference and on another data set.

    Attributes
    ----------
    reference, other : Estimate
        The criterion on each.
    difference, ratio : Estimate
        ``other - reference`` and ``other / reference``, with every value that the two intervals allow.
    """

    reference: Estimate
    other: Estimate
    difference: Estimate
    ratio: Estimate


@dataclass(frozen=True)
class Comparison:
    """One data set compared with the reference.

    Attributes
    ----------
    name : str
        Name of the data set.
    hesd_type : HESDType
        Its type.
    verdict : Verdict
        What the criteria say.
    reason : str
        Why.
    changes : dict
        `Change` of ``r_e``, ``k_hn`` and ``k_mass``; empty unless both spectra are mainly positive.
    """

    name: str
    hesd_type: HESDType
    verdict: Verdict
    reason: str
    changes: dict[str, Change]


@dataclass(frozen=True)
class Assessment:
    """The verdicts on all data sets but the reference; printing it gives the whole argument.

    Attributes
    ----------
    reference : str
        Name of the reference.
    reference_type : HESDType
        Its type.
    entries : tuple of Comparison
        One for each other data set, in the order given.
    thresholds : ComparisonThresholds
        The numbers of the rule, with its version.
    notes : tuple of str
        Differences between the reports that do not forbid the comparison and that a reader has to know.

    Examples
    --------
    >>> import hesd_fast as hesd, torch
    >>> model, loss = torch.nn.Linear(2, 1), lambda m, b: m(b).square().mean()
    >>> one, two = (hesd.analyze(model, loss, x, progress=False) for x in (torch.eye(2), torch.ones(3, 2)))
    >>> assessment = hesd.compare({"train": one, "test": two})
    >>> assessment.reference, assessment.entries[0].name
    ('train', 'test')
    >>> print(assessment.notes[0].partition(", and")[0])
    'test' has 3 loss terms, the reference 'train' has 2 loss terms
    """

    reference: str
    reference_type: HESDType
    entries: tuple[Comparison, ...]
    thresholds: ComparisonThresholds
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = [f"reference {self.reference}: {self.reference_type}"]
        for entry in self.entries:
            lines.append(f"{entry.name}: {entry.hesd_type}; generalization: {entry.verdict}")
            lines.append(f"  {entry.reason}")
            lines += [
                f"  {name}: {change.reference} -> {change.other}, change {change.difference}, ratio {change.ratio}"
                for name, change in entry.changes.items()
            ]
        lines += [f"note: {note}" for note in self.notes]
        return "\n".join(printable(line) for line in lines)


def compare(
    reports: Mapping[str, TypedReport],
    *,
    thresholds: ComparisonThresholds | None = None,
    weights_may_differ: bool = False,
) -> Assessment:
    """Return what the spectra say about generalization from the first data set to each of the others.

    Both spectra must be mainly positive; a quasi-singular or mainly negative one makes the criteria not applicable, an
    undetermined one leaves the verdict inconclusive. Then, with ``(1 + relative) r + absolute`` the allowed value of a
    criterion that is ``r`` on the reference:

    - ``degrades``, if ``r_e`` or ``k_mass`` exceeds what is allowed for every value in the two intervals;
    - ``holds``, if both stay within what is allowed for every value in the two intervals;
    - ``inconclusive`` otherwise.

    ``k_hn`` is shown and decides nothing, because it depends on the number of Lanczos steps. The intervals are combined
    as if their errors could be opposite, which is cautious.

    What is compared are data sets, so everything else must be the same: operator, model class, names and shapes
    of the parameters, module mode, precision, protocol, exponents and weights. Modes are compared by their names, so
    "as_is" is another one than "eval" even of a model in eval mode. That the loss is the same function cannot be seen.
    Where the numbers of loss terms or of Lanczos steps differ, the assessment has a note. A measure made by hand is
    compared for what it has.

    Parameters
    ----------
    reports : mapping of str to report
        At least two; the first is the reference.
    thresholds : ComparisonThresholds, optional
        The allowed growth.
    weights_may_differ : bool
        Compare checkpoints of one network, as on the same data after more training.

    Raises
    ------
    ProblemError
        If something else is given, there are fewer than two reports, or two of them cannot be compared; it names both,
        and what differs.

    References
    ----------
    Type first, criteria second: Gabdullin, arXiv 2504.17618. The verdict rule is ours.

    Examples
    --------
    >>> import hesd_fast as hesd, torch
    >>> model, loss = torch.nn.Linear(2, 1), lambda m, b: m(b).square().mean()
    >>> one, two = (hesd.analyze(model, loss, x, progress=False) for x in (torch.eye(2), 2 * torch.eye(2)))
    >>> print(hesd.compare({"train": one, "test": two}).entries[0].verdict)
    holds
    """
    check_reports(reports, "compare", TypedReport, "the reference first, as in {'train': report, 'test': other}")
    if len(reports) < 2:
        raise ProblemError(f"compare needs a reference and at least one other report, got {len(reports)}; add one")
    thresholds = ComparisonThresholds() if thresholds is None else thresholds
    (reference_name, reference), *others = reports.items()
    check_comparable(reports, weights_may_differ)
    entries = tuple(_compare_one(reference_name, reference, name, report, thresholds) for name, report in others)
    return Assessment(reference_name, reference.hesd_type, entries, thresholds, tuple(notes(reports)))


def _compare_one(
    reference_name: str, reference: TypedReport, name: str, report: TypedReport, thresholds: ComparisonThresholds
) -> Comparison:
    obstacles = [
        (_obstacle(who, each), each.hesd_type)
        for who, each in ((reference_name, reference), (name, report))
        if each.hesd_type is not HESDType.MP
    ]
    if obstacles:
        applicable = all(hesd_type is HESDType.UNDETERMINED for _, hesd_type in obstacles)
        verdict = Verdict.INCONCLUSIVE if applicable else Verdict.NOT_APPLICABLE
        return Comparison(name, report.hesd_type, verdict, " ".join(text for text, _ in obstacles), {})
    changes = {
        key: _change(getattr(reference.criteria, key), getattr(report.criteria, key))
        for key in ("r_e", "k_hn", "k_mass")
    }
    verdict, reason = _judge(changes, thresholds)
    return Comparison(name, report.hesd_type, verdict, reason, changes)


def _obstacle(name: str, report: TypedReport) -> str:
    """Return why the criteria cannot be used on this spectrum."""
    evidence = report.type_evidence
    if report.hesd_type is HESDType.QS:
        return f"{name} is quasi-singular, so curvature says nothing about generalization here: {evidence.reason}."
    if report.hesd_type is HESDType.MN:
        return (
            f"{name} is mainly negative, so the criteria do not apply: {evidence.reason}. Likely causes: gradients "
            "that were scaled or clipped from outside during training, weights far from a minimum, or a loss of wrong "
            "sign."
        )
    return f"{name} has no type yet: {evidence.reason}. To decide it: {'; '.join(evidence.advice)}."


def _judge(changes: Mapping[str, Change], thresholds: ComparisonThresholds) -> tuple[Verdict, str]:
    grown, within = [], []
    for key in ("r_e", "k_mass"):
        change = changes[key]
        factor = 1.0 + thresholds.relative
        if change.other.low > factor * change.reference.high + thresholds.absolute:
            grown.append(key)
        if change.other.high <= factor * change.reference.low + thresholds.absolute:
            within.append(key)
    allowed = f"{1.0 + thresholds.relative:g} times the reference plus {thresholds.absolute:g}"
    if grown:
        return Verdict.DEGRADES, f"{' and '.join(grown)} certainly exceed{'s' if len(grown) == 1 else ''} {allowed}."
    if len(within) == 2:
        return Verdict.HOLDS, f"r_e and k_mass certainly stay within {allowed}."
    unclear = [key for key in ("r_e", "k_mass") if key not in within]
    return Verdict.INCONCLUSIVE, f"the interval of {' and '.join(unclear)} allows both sides of {allowed}."


def _change(reference: Estimate, other: Estimate) -> Change:
    method = "all values that both intervals allow"
    difference = _ordered(
        _minus(other.value, reference.value),
        _minus(other.low, reference.high),
        math.inf if math.isinf(other.high) else other.high - reference.low,
        method,
    )
    ratio = _ordered(
        _over(other.value, reference.value), _over(other.low, reference.high), _over(other.high, reference.low), method
    )
    return Change(reference, other, difference, ratio)


def _minus(a: float, b: float) -> float:
    return 0.0 if a == b else a - b


def _over(a: float, b: float) -> float:
    """Return ``a / b`` for non-negative numbers, 1 where they are equal and zero or infinite."""
    if a == b:
        return 1.0
    return a / b if b > 0.0 else math.inf


def _ordered(value: float, low: float, high: float, method: str) -> Estimate:
    return Estimate(value, min(low, value), max(high, value), method)
