"""When a run is sure enough: how wide each interval may be, and whether more steps or more probes would narrow it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from hesd_fast.errors import ProblemError
from hesd_fast.estimate import Estimate
from hesd_fast.lanczos.block_tridiagonal import BlockTridiagonal
from hesd_fast.lanczos.options import LanczosSettings
from hesd_fast.methodology.generalization_criteria import Criteria, criteria, extreme_ratio, resolution_of
from hesd_fast.methodology.hesd_type import TypeThresholds
from hesd_fast.spectrum.spectral_measure import SpectralMeasure

Tolerance = float | Mapping[str, float] | str | None
"""What users pass: one width for the numbers of DEFAULT_NUMBERS, a width for each number by name, "auto" or none."""

DEFAULT_TOLERANCE = 0.02
TYPE = "type"
DEFAULT_NUMBERS = ("lambda_max", "lambda_min", "r_e", TYPE)

SMALLEST_UNIT = 0.05
"""Magnitude of a ratio below which its tolerance is no longer relative to it, but to this."""

SMALLEST_TRACE = 1e-3
"""The same of a trace, relative to the largest that a matrix of its norm can have, ``sqrt(n) ||H||_F``."""

FIRST_CHECK, GROWTH = 8, 1.25
"""Steps of a run before the intervals are looked at, and the factor from one look to the next."""


MOST_PROBES = 16
"""Of one run: orthogonalization takes time that grows with the square of their number."""

MARGIN = 1.1
"""Of the number of missing probes, so that a few more do not make runs of their own."""

NOISE_SHARE = 4.0
"""Part of the noise in a width from which on nothing narrows it but products of higher precision."""


class Findings:
    """What the runs so far say, each number computed when it is first asked for."""

    def __init__(self, measure: SpectralMeasure, found: Criteria | None = None) -> None:
        self.measure = measure
        if found is not None:
            self.criteria = found

    @cached_property
    def criteria(self) -> Criteria:
        """The criteria of the measure."""
        return criteria(self.measure)

    @property
    def share_of_steps(self) -> float:
        """How much of the width of k_mass and balance the probes' own bounds leave, which more steps would narrow."""
        whole, of_probes = _half_width(self.criteria.balance), _half_width(self.criteria.probe_balance)
        return min(of_probes / whole, 1.0) if whole > 0.0 else 1.0


class Number(NamedTuple):
    """A number that a tolerance can be given for.

    Attributes
    ----------
    estimate : callable
        Takes Findings.
    unit : str
        What its tolerance is relative to: the "spectrum", the number "itself", itself or SMALLEST_UNIT as a "ratio" is,
        or SMALLEST_TRACE as a "trace", or to nothing, "absolute".
    narrowed_by : str
        "steps", "probes", or "both" in the shares that the width of the balance has.
    needs_signs : bool
        Whether it means nothing where no eigenvalue exceeds the resolution.
    """

    estimate: Callable[[Findings], Estimate]
    unit: str
    narrowed_by: str
    needs_signs: bool = True


def _r_e(found: Findings) -> Estimate:
    return _of_either_sign(extreme_ratio(found.measure, resolution_of(found.measure)))


def _of_either_sign(ratio: Estimate) -> Estimate:
    """Return a ratio, or that of ``-H`` where it is above 1, as it may be infinite."""
    if ratio.value <= 1.0:
        return ratio
    value, low, high = (1.0 / end if end else math.inf for end in (ratio.value, ratio.high, ratio.low))
    return Estimate(value, low, high, ratio.method)


NUMBERS: dict[str, Number] = {
    "lambda_max": Number(lambda found: found.measure.lambda_max, "spectrum", "steps", needs_signs=False),
    "lambda_min": Number(lambda found: found.measure.lambda_min, "spectrum", "steps", needs_signs=False),
    "r_e": Number(_r_e, "ratio", "steps"),
    "trace": Number(lambda found: found.measure.trace, "trace", "probes"),
    "frobenius_norm": Number(lambda found: found.measure.frobenius_norm, "itself", "probes"),
    "k_mass": Number(lambda found: _of_either_sign(found.criteria.k_mass), "ratio", "both"),
    "balance": Number(lambda found: found.criteria.balance, "absolute", "both"),
    TYPE: Number(lambda found: found.criteria.balance, "absolute", "both"),
}
"""By name, those that take the least work first."""


def tolerances(tolerance: Tolerance) -> dict[str, float]:
    """Return the width that is asked for by the name of each number; a ProblemError for what none can have.

    A width is the larger distance of a number from the ends of its interval: of lambda_max and lambda_min relative to
    the largest magnitude of an eigenvalue; of frobenius_norm relative to itself, as of the trace, or to 0.001 sqrt(n)
    ``||H||_F`` if that is more; of r_e and k_mass (or 1/r_e and 1/k_mass, where they are above 1) relative to
    themselves, or to 0.05 if that is more; of the balance as it is. "type" is the balance again, which may be as wide
    as leaves no doubt on which side of the type's thresholds it lies. A number in place of a mapping is for lambda_max,
    lambda_min, r_e and the type; "auto" is 0.02.
    """
    if tolerance is None:
        return {}
    if is_default(tolerance):
        tolerance = DEFAULT_TOLERANCE
    if not isinstance(tolerance, Mapping):
        return dict.fromkeys(DEFAULT_NUMBERS, _checked("tolerance", tolerance))
    for name in tolerance:
        if name not in NUMBERS:
            raise ProblemError(f"tolerance names {name!r}; wanted numbers among {', '.join(NUMBERS)}")
    if not tolerance:
        raise ProblemError("tolerance is an empty mapping; name a number, or give None for a run of all its steps")
    return {name: _checked(f"tolerance[{name!r}]", tolerance[name]) for name in NUMBERS if name in tolerance}


def is_default(tolerance: Any) -> bool:
    """Return whether the user has asked for no tolerance in particular."""
    return isinstance(tolerance, str) and tolerance == "auto"


def _checked(name: str, value: Any) -> float:
    good = isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)
    if not (good and 0.0 < value < math.inf):
        raise ProblemError(
            f"{name} is {value!r}; wanted a positive number, half the width of an interval relative to its number "
            "(0.02 for 2 %), or None for a run of all its steps"
        )
    return float(value)


@dataclass(frozen=True)
class Width:
    """Half the width of an interval beside the one that was asked for, both relative to the number's unit.

    Attributes
    ----------
    name : str
        The number.
    estimate : Estimate
        What is known of it.
    wanted, of_steps, of_probes : float
        What was asked for; what more steps would narrow, and what more probes would.
    """

    name: str
    estimate: Estimate
    wanted: float
    of_steps: float
    of_probes: float

    @property
    def is_met(self) -> bool:
        """Whether the interval is as narrow as was asked for."""
        return self.of_steps + self.of_probes <= self.wanted

    @property
    def probes_needed(self) -> float:
        """How many times the probes there are would be enough, the steps being as they are."""
        if self.is_met:
            return 1.0
        left = self.wanted - self.of_steps
        return (self.of_probes / left) ** 2 if left > 0.0 else math.inf


def widths(found: Findings, wanted: Mapping[str, float]) -> Iterator[Width]:
    """Yield the width of each number that was asked for, those first that take the least work."""
    has_signs = found.measure.largest_magnitude > resolution_of(found.measure)
    for name, number in NUMBERS.items():
        if name in wanted and (has_signs or not number.needs_signs):
            estimate = number.estimate(found)
            half, unit = _half_width(estimate), _unit(number, found, estimate.value)
            relative = half / unit if unit > 0.0 else (0.0 if half == 0.0 else math.inf)
            limit = wanted[name] if name != TYPE else max(wanted[name], _distance_from_thresholds(estimate.value))
            of_steps = {"steps": relative, "probes": 0.0}.get(number.narrowed_by)
            if of_steps is None:
                of_steps = relative * found.share_of_steps
            of_probes = relative - of_steps if of_steps < relative else 0.0
            yield Width(name, estimate, limit, of_steps, of_probes)


def _unit(number: Number, found: Findings, value: float) -> float:
    if number.unit == "trace":
        largest = math.sqrt(found.measure.size or 0) * found.measure.frobenius_norm.value
        return max(abs(value), SMALLEST_TRACE * largest)
    units = {"absolute": 1.0, "itself": abs(value), "ratio": max(abs(value), SMALLEST_UNIT)}
    return units.get(number.unit, found.measure.largest_magnitude)


def _distance_from_thresholds(balance: float) -> float:
    delta = TypeThresholds().delta
    return min(abs(balance - delta), abs(balance + delta))


class StoppingRule:
    """Says when a run has taken enough steps, and whether another one with fresh probes is to follow.

    Half the width of an interval has a part ``q(s)`` that falls with the steps of a run, and a part ``e(s)`` that falls
    as ``1/sqrt(N)`` with the number ``N`` of runs of ``s`` steps. A tolerance ``t`` is therefore met after ``s N = s
    (e / (t - q))^2`` steps in all. The first run goes on as long as this falls: while eigenvalues converge, each makes
    the variance of the probes smaller. Then runs of as many steps with probes of their own follow; but where they would
    take as many products as the matrix has rows, the first goes on, for its space then holds the whole spectrum; or,
    where it has come to its end before, all unit vectors are multiplied.

    The probes that are missing are put into as few runs as there is memory for: the space of a wide block holds more of
    the large eigenvalues, and what it holds has no sampling error.

    Parameters
    ----------
    wanted : mapping of str to float
        The tolerance of each number, see `tolerances`; empty for one run of all its steps.
    settings : LanczosSettings
        Of the first run: all runs together have no more products than it would with all its steps.
    widest : int
        Probes that a run may have.
    """

    def __init__(self, wanted: Mapping[str, float], settings: LanczosSettings, widest: int) -> None:
        self._wanted, self._widest = wanted, widest
        self._max_steps, self._block_size = settings.max_steps, settings.block_size
        self._next_check, self._cost = FIRST_CHECK, math.inf

    def is_due(self, steps: int, others: Sequence[BlockTridiagonal] = ()) -> bool:
        """Return whether the intervals are to be looked at after so many steps of the first run, beside others."""
        left = self._max_steps * self._block_size - sum(map(_products_of, others))
        return (steps + 1) * self._block_size > left or (bool(self._wanted) and steps >= self._next_check)

    def is_enough(self, runs: Sequence[BlockTridiagonal]) -> bool:
        """Return whether the first of these runs, the only one that can go on, is to end."""
        done, steps = sum(map(_products_of, runs)), runs[0].steps
        left = self._max_steps * self._block_size - done
        if left < self._block_size:
            return True
        self._next_check = math.ceil(steps * GROWTH)
        needed = self.probes_needed(runs)
        cost, before = needed * steps, self._cost
        self._cost = cost
        is_worth_it = left >= steps * self._block_size and needed * done < runs[0].size
        return needed <= 1.0 or (before <= cost < math.inf and is_worth_it)

    def next_run(self, done: Sequence[BlockTridiagonal]) -> tuple[int, int]:
        """Return the probes and steps of the run with fresh probes that is to follow those done; 0 for none."""
        steps, size = done[0].steps, done[0].size
        left = self._max_steps * self._block_size - sum(map(_products_of, done))
        most = min(left // steps, (self._max_steps + 1) * self._block_size // (steps + 1), self._widest, size)
        if any(one.knows_all for one in done):
            return 0, 0
        if not self._wanted:
            return (min(self._block_size, most), steps) if most >= 1 else (0, 0)
        missing = self.probes_needed(done) - 1.0
        if missing > 0.0 and missing * sum(map(_products_of, done)) >= size and left >= size:
            return size, 1  # unit vectors: the whole matrix
        if missing <= 0.0 or most < 1:
            return 0, 0
        return math.ceil(min(MARGIN * missing * sum(one.probes for one in done), most)), steps

    def probes_needed(self, done: Sequence[BlockTridiagonal]) -> float:
        """Return how many times the probes of these runs would be enough for all tolerances."""
        found, most = Findings(SpectralMeasure.from_tridiagonal(*done)), 1.0
        for width in widths(found, self._wanted):
            most = max(most, width.probes_needed)
            if most == math.inf:
                break
        return most


def _products_of(run: BlockTridiagonal) -> int:
    return sum(run.block_sizes)


def _half_width(estimate: Estimate) -> float:
    ends = (estimate.high - estimate.value, estimate.value - estimate.low)
    return math.inf if any(math.isnan(end) for end in ends) else max(ends)


def outcome(found: Findings, wanted: Mapping[str, float]) -> tuple[str, ...]:
    """Return what is to be said of each number that is not as narrow as was asked for; nothing where all are."""
    return tuple(_what_is_missing(found, width) for width in widths(found, wanted) if not width.is_met)


def _what_is_missing(found: Findings, width: Width) -> str:
    probes = found.measure.probes
    total = width.of_steps + width.of_probes
    text = f"{width.name} is {width.estimate}, {total:.2g} wide on one side where {width.wanted:.2g} was asked for"
    noise = found.measure.noise / (found.measure.largest_magnitude or 1.0)
    if NOISE_SHARE * noise >= width.wanted:
        return f"{text}; the noise of the products is {noise:.2g} of the largest eigenvalue: use float64"
    if math.isfinite(width.probes_needed):
        needed, size = math.ceil(width.probes_needed * probes), found.measure.size or 0
        cure = f"about {needed} would do" if needed < size else f"it takes as many products as parameters, {size}"
        return f"{text}; the sampling error of {probes} probes is what is left, {cure}"
    if width.of_probes > width.of_steps:
        return f"{text}; it takes more steps, and then more probes"
    return f"{text}; it takes more steps"
