"""Whether two reports can be compared: what must be the same, and what has to be said where it is not."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from hesd_fast.errors import ProblemError
from hesd_fast.lanczos.block_tridiagonal import ORTHOGONAL_MODES

UNKNOWN = object()
"""What a report says of a property that it does not have; a measure made by hand has hardly any."""


class Property(NamedTuple):
    """Something that must be the same in all reports that are compared.

    Attributes
    ----------
    of : callable
        Takes a report, gives its value, or UNKNOWN.
    says : callable
        Takes a value and the one it differs from, gives the words for "the report ...".
    remedy : str
        What to do about a difference.
    """

    of: Callable[[Any], Any]
    says: Callable[[Any, Any], str]
    remedy: str


def _attribute(report: Any, path: str) -> Any:
    for name in path.split("."):
        report = getattr(report, name, UNKNOWN)
    return report


def _property(path: str, words: str, remedy: str = "") -> Property:
    """Return the property that is the attribute of that path, with one place in the words for its value."""
    return Property(lambda report: _attribute(report, path), lambda value, _: words.format(value), remedy)


def _selection(report: Any) -> Any:
    names, shapes = _attribute(report, "problem.parameters"), _attribute(report, "problem.shapes")
    return UNKNOWN if UNKNOWN in (names, shapes) else dict(zip(names, shapes, strict=True))


def _selection_words(selection: Any, other: Any) -> str:
    own = [f"{name!r} of shape {shape}" for name, shape in selection.items() if other.get(name, UNKNOWN) != shape]
    return f"is of {len(selection)} parameters" + (f", among them {own[0]}" if own else "")


WEIGHTS = _property(
    "problem.weights",
    "is of weights with the digest {!r}",
    "what is compared are data sets, so analyse the same weights on both; to compare checkpoints of one network say "
    "weights_may_differ=True (hesd compare --weights-may-differ)",
)

PROPERTIES = (
    _property("operator", "is of the operator {!r}", "compare spectra of the same operator"),
    _property("problem.model", "is of a model of the class {!r}", "compare reports of one architecture"),
    Property(_selection, _selection_words, "select the same parameters of the same architecture in both"),
    _property("problem.mode", "is of mode {!r}", "analyse both in the same module mode"),
    _property("problem.precision", "was computed in {}", "convert the model to one precision and analyse both in it"),
    _property(
        "settings.protocol",
        "has the protocol {!r}",
        "numbers of a published protocol compare with others of it only, so run both with the same protocol",
    ),
    Property(
        lambda report: (report.criteria.exponent, report.criteria.mass_exponent),
        lambda value, _: f"has the criterion exponents {value}",
        "compute both with the same exponents",
    ),
)


def check_reports(
    reports: Any, function: str, kind: type | tuple[type, ...], example: str = "as in {'train': report}"
) -> None:
    """Raise a ProblemError unless the function of that name was given reports by name, all of a class or protocol."""
    if not isinstance(reports, Mapping):
        raise ProblemError(f"{function} got a {type(reports).__name__}; give reports by name, {example}")
    for name, report in reports.items():
        if not isinstance(report, kind):
            raise ProblemError(
                f"{function} got a {type(report).__name__} under {name!r}; give a Report, "
                "as analyze and load_report return"
            )


def check_comparable(reports: Mapping[str, Any], weights_may_differ: bool) -> None:
    """Raise a ProblemError that names two reports of different things, what differs, and what to do.

    Each property is compared among all reports that know it, so their order plays no part.
    """
    for one in (*PROPERTIES, *(() if weights_may_differ else (WEIGHTS,))):
        for name, report, first, of_first in _differing(reports, one):
            raise ProblemError(
                f"{name!r} {one.says(report, of_first)}, {_called(first, reports)} {one.says(of_first, report)}; "
                f"{one.remedy}"
            )


def notes(reports: Mapping[str, Any]) -> Iterator[str]:
    """Yield what a reader must know of each report that differs from the first in what criteria depend on."""
    for one, text in (
        (WEIGHTS, "so this compares checkpoints of a network, not data sets"),
        (
            _property("problem.terms", "has {:,.10g} loss terms"),
            "and k_mass tends to fall as their number grows, so take as many of both",
        ),
        (
            Property(_run_length, lambda value, _: f"has {value}", ""),
            "and K_Hn depends on how many Ritz values there are and whether some are copies, so see r_e and k_mass",
        ),
    ):
        for name, value, first, of_first in _differing(reports, one):
            yield (
                f"{name!r} {one.says(value, of_first)}, {_called(first, reports)} {one.says(of_first, value)}, {text}"
            )


def _run_length(report: Any) -> Any:
    tridiagonals = _attribute(report, "measure.tridiagonals")
    if not isinstance(tridiagonals, tuple) or not tridiagonals:
        return UNKNOWN
    copies = any(matrix.reorthogonalization not in ORTHOGONAL_MODES for matrix in tridiagonals)
    runs = [f"{matrix.steps} Lanczos steps of {matrix.probes} probes" for matrix in tridiagonals]
    return " and ".join(runs) + (", and copies among them" if copies else "")


def _differing(reports: Mapping[str, Any], one: Property) -> Iterator[tuple[str, Any, str, Any]]:
    """Yield name and value of each report that differs from the first that knows the property, and that one's."""
    known = [(name, value) for name, report in reports.items() if (value := one.of(report)) is not UNKNOWN]
    for name, value in known[1:]:
        if value != known[0][1]:
            yield name, value, *known[0]


def _called(name: str, reports: Mapping[str, Any]) -> str:
    return f"the reference {name!r}" if name == next(iter(reports)) else repr(name)
