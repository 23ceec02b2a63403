"""Criteria of generalization read off a spectral measure, each with the interval it is known to."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from hesd_fast.errors import ProblemError
from hesd_fast.estimate import Estimate
from hesd_fast.lanczos.block_tridiagonal import Array, BlockTridiagonal
from hesd_fast.spectrum.converged_eigenvalues import Settled
from hesd_fast.spectrum.jacobi_matrix import cdf_band, hinge_bounds
from hesd_fast.spectrum.spectral_measure import SpectralMeasure, standard_error

STEP_COUNTS = 4
BOUNDED = "tightest bounds from the moments and two standard errors of the probes"
BARE = "the measure as given, two standard errors over its probes"


@dataclass(frozen=True)
class Criteria:
    """The criteria of one spectral measure.

    Attributes
    ----------
    r_e : Estimate
        ``|lambda_min / lambda_max|``: 0 when no negative value is resolved, infinite when no positive one is.
    k_hn : Estimate
        ``sum over theta_i < 0 of (|theta_i| w_i)^exponent``, divided by the same sum over ``theta_i > 0``. It depends
        on the number of Lanczos steps and is there to compare with published values.
    k_mass : Estimate
        ``E_minus / E_plus`` with ``E_pm`` the integral of ``|lambda|^mass_exponent`` over ``pm lambda > resolution``.
        It does not depend on how the measure is split into nodes.
    balance : Estimate
        ``(E_plus - E_minus) / (E_plus + E_minus)`` in ``[-1, 1]``: 1 for positive, -1 for negative spectra.
    probe_balance : Estimate
        The balance of this run's probes. What it leaves open can be decided by more Lanczos steps; what `balance`
        leaves open beyond it, by more probes.
    exponent, mass_exponent : float
        The exponents above.
    resolution : float
        Magnitude below which an eigenvalue has no sign.
    unresolved_mass : Estimate
        Share of the eigenvalues in ``[-resolution, resolution]``.
    """

    r_e: Estimate
    k_hn: Estimate
    k_mass: Estimate
    balance: Estimate
    probe_balance: Estimate
    exponent: float
    mass_exponent: float
    resolution: float
    unresolved_mass: Estimate


def criteria(
    measure: SpectralMeasure,
    exponent: float = 0.5,
    mass_exponent: float = 1.0,
    resolution: float | None = None,
) -> Criteria:
    """Return the criteria of a spectral measure.

    Of a measure made from a tridiagonal, the intervals are

    - ``r_e``: from the intervals of the extreme eigenvalues;
    - ``k_hn``: the range over 4 step counts from ``m/2`` to ``m``, each with two standard errors over the probes, and
      over both signs of the nodes within the resolution. This is a spread, not a bound;
    - ``k_mass``, ``balance``, ``unresolved_mass``: from the tightest bounds that the moments allow, which are rigorous
      for the probes' measure, and two standard errors of the probes. The value is the middle of what those bounds leave
      for ``E_plus`` and ``E_minus`` before the standard errors, so no node of arbitrary sign decides it.

    A bare measure is taken as it is: each criterion is computed per probe and averaged, with two standard errors over
    the probes, and the value of ``r_e`` is the plain ratio of its extreme nodes.

    A spectrum without anything above the resolution has ``r_e``, ``k_mass``, ``k_hn`` and ``balance`` of value 0 with
    intervals ``[0, inf]`` and ``[-1, 1]``, for nothing is known of its sign; a criterion without a positive part, but
    with a negative one, is infinite.

    Parameters
    ----------
    measure : SpectralMeasure
        The measure.
    exponent : float
        The exponent of ``k_hn``.
    mass_exponent : float
        The exponent of ``k_mass`` and ``balance``. With 1 the bounds are much tighter: the integrand is then linear but
        for a kink, and ``E_plus - E_minus`` is the mean eigenvalue, which the quadrature gives exactly.
    resolution : float, optional
        Magnitude below which the Hessian product is noise, in units of the eigenvalues. The noise floor,
        ``16 * roundoff * max|Ritz value|``, is used when it is larger, or when nothing is passed.

    Raises
    ------
    ProblemError
        If an exponent is not positive, the resolution is negative, or ``mass_exponent`` needs more moments than the
        Lanczos steps give.

    Notes
    -----
    Costs about 320 symmetric eigenproblems of order ``m + 1`` per probe, and 3 of at most order ``k``.

    References
    ----------
    ``r_e`` and ``k_hn``: Gabdullin, arXiv 2412.10146 and 2504.17618. ``k_mass`` and ``balance`` are extensions of ours.
    """
    for name, value in (("exponent", exponent), ("mass_exponent", mass_exponent)):
        if not (value > 0.0 and math.isfinite(value)):
            raise ProblemError(f"{name} must be positive and finite, got {value!r}; the published exponent is 0.5")
    if resolution is not None and not (resolution >= 0.0 and math.isfinite(resolution)):
        raise ProblemError(f"resolution must be finite and not negative, got {resolution!r}; leave it out if unknown")
    threshold = _threshold(measure, resolution or 0.0)
    tridiagonal = measure.tridiagonal
    if tridiagonal is None:
        pairs = list(zip(measure.nodes, measure.weights, strict=True))
        parts = [_signed_sums(x, w, mass_exponent, threshold) for x, w in pairs]
        inside = [float(w @ (np.abs(x) <= threshold)) for x, w in pairs]
        balance = _spread([_balance(plus, minus) for plus, minus in parts], -1.0, 1.0)
        return Criteria(
            r_e=_spread([_ratio(abs(float(x[0])), abs(float(x[-1]))) for x in measure.nodes], 0.0, math.inf),
            k_hn=_spread(_k_hn(measure, exponent, 0.0, 0.0), 0.0, math.inf),
            k_mass=_spread([_ratio(minus, plus) for plus, minus in parts], 0.0, math.inf),
            balance=balance,
            probe_balance=balance,
            exponent=exponent,
            mass_exponent=mass_exponent,
            resolution=threshold,
            unresolved_mass=_spread(inside, 0.0, 1.0),
        )

    unresolved, of_probes, corrected, of_matrix = _signed_moments(measure, mass_exponent, threshold)
    # Between bounds that hold nothing but rounding there is no value in the middle.
    resolved = measure.largest_magnitude > threshold
    values, probe_values = (s.middle() if resolved else (0.0, 0.0) for s in (corrected, of_probes))
    return Criteria(
        r_e=_extreme_ratio(measure, threshold),
        k_hn=_k_hn_over_steps(measure, tridiagonal, exponent, threshold),
        k_mass=of_matrix.k_mass(values, BOUNDED),
        balance=of_matrix.balance(values, BOUNDED),
        probe_balance=of_probes.balance(probe_values, "tightest bounds from the moments, for these probes"),
        exponent=exponent,
        mass_exponent=mass_exponent,
        resolution=threshold,
        unresolved_mass=unresolved,
    )


def signed_moments(measure: SpectralMeasure, exponent: float, resolution: float) -> tuple[Estimate, Estimate]:
    """Return ``E_plus`` and ``E_minus``, the integrals of ``|lambda|^exponent`` over ``pm lambda > resolution``.

    The intervals are the bounds of the distribution function and two standard errors of the probes. Needs a measure
    made from a tridiagonal; below its noise floor the resolution is raised to it.

    Raises
    ------
    ProblemError
        If the measure is bare, or ``exponent`` needs more moments than the Lanczos steps give.
    """
    if measure.tridiagonal is None:
        raise ProblemError("signed moments need the recurrence, got bare nodes; use SpectralMeasure.from_tridiagonal")
    _, _, corrected, of_matrix = _signed_moments(measure, exponent, _threshold(measure, resolution))
    plus, minus = corrected.middle()
    return Estimate(plus, *of_matrix.plus, BOUNDED), Estimate(minus, *of_matrix.minus, BOUNDED)


class _Interval(NamedTuple):
    low: float
    high: float

    def widened(self, margin: float) -> _Interval:
        return _Interval(max(0.0, self.low - margin), self.high + margin)

    def moved(self, distance: float) -> _Interval:
        return _Interval(self.low + distance, self.high + distance)

    def shifted(self, distance: float) -> _Interval:
        """Return the interval of a quantity that cannot be negative, moved."""
        return _Interval(max(0.0, self.low + distance), max(0.0, self.high + distance))

    def middle(self) -> float:
        return 0.5 * (self.low + self.high)


class _SignedMoments(NamedTuple):
    """What is known of ``E_plus`` and ``E_minus``: an interval for each, and one for their difference."""

    plus: _Interval
    minus: _Interval
    difference: _Interval

    def tightened(self) -> _SignedMoments:
        """Return the same set with the intervals of ``E_plus`` and ``E_minus`` cut to what the difference allows."""
        plus, minus, difference = self
        return _SignedMoments(
            _ordered(max(plus.low, minus.low + difference.low), min(plus.high, minus.high + difference.high)),
            _ordered(max(minus.low, plus.low - difference.high), min(minus.high, plus.high - difference.low)),
            difference,
        )

    def middle(self) -> tuple[float, float]:
        return self.plus.middle(), self.minus.middle()

    def corners(self) -> list[tuple[float, float]]:
        """Return the corners of the polygon of possible ``(E_plus, E_minus)``, without the origin.

        A ratio of linear functions is extreme at corners, and its supremum near the origin is taken at the others.
        """
        plus, minus, difference = self
        found: list[tuple[float, float]] = []
        for e in plus:
            low, high = max(minus.low, e - difference.high), min(minus.high, e - difference.low)
            found += [(e, f) for f in (low, high) if low <= high]
        for f in minus:
            low, high = max(plus.low, f + difference.low), min(plus.high, f + difference.high)
            found += [(e, f) for e in (low, high) if low <= high]
        return [corner for corner in found if corner != (0.0, 0.0)]

    def k_mass(self, values: tuple[float, float], method: str) -> Estimate:
        ends = [_ratio(f, e) for e, f in self.corners()]
        return _enclose(_ratio(values[1], values[0]), ends, (0.0, math.inf), method)

    def balance(self, values: tuple[float, float], method: str) -> Estimate:
        return _enclose(_balance(*values), [_balance(e, f) for e, f in self.corners()], (-1.0, 1.0), method)


def _signed_moments(
    measure: SpectralMeasure, exponent: float, threshold: float
) -> tuple[Estimate, _SignedMoments, _SignedMoments, _SignedMoments]:
    """Return the unresolved mass, and what is known of ``E_plus`` and ``E_minus``.

    First of the probes; then with the settled eigenvalues' part made exact; then of the matrix, with two standard
    errors of what is not settled.
    """
    tridiagonal = measure.tridiagonal
    if tridiagonal is not None and not tridiagonal.breakdown and exponent > tridiagonal.steps:
        raise ProblemError(
            f"mass_exponent={exponent:g} needs the moment of order {2 * exponent:g}, got {tridiagonal.steps} steps, "
            f"which give the moments up to {2 * tridiagonal.steps}; take more steps"
        )
    bands = [cdf_band(jacobi, threshold, exponent) for jacobi in measure.jacobi]
    sides = (bands, [band.reflected() for band in bands])
    squares = [_mean([band.tail_moment(threshold, 2.0 * exponent) for band in side]).high for side in sides]

    below, above = (bounds.tolist() for bounds in measure.cdf_bounds([-threshold, threshold]))
    if exponent == 1.0:
        # x = (x - threshold) + threshold wherever x > threshold
        hinges = [[hinge_bounds(jacobi, threshold) for jacobi in measure.jacobi]]
        hinges += [[hinge_bounds(jacobi.reflected(), threshold) for jacobi in measure.jacobi]]
        masses = [(1.0 - above[1], 1.0 - below[1]), (below[0], above[0])]
        plus, minus = (
            _Interval(hinge.low + threshold * least, hinge.high + threshold * most)
            for hinge, (least, most) in zip(map(_mean, hinges), masses, strict=True)
        )
    else:
        plus, minus = (_mean([band.tail_moment(threshold, exponent) for band in side]) for side in sides)
    inside = _Interval(max(0.0, below[1] - above[0]), max(0.0, min(1.0, above[1] - below[0])))
    # A share and its complement have the same variance.
    inside_error = _two_standard_errors(measure, min(inside.high, 1.0 - inside.low), 1.0)
    unresolved = Estimate(
        inside.middle(),
        max(0.0, inside.low - inside_error),
        min(1.0, inside.high + inside_error),
        BOUNDED,
    )

    settled = measure.settled
    if exponent != 1.0 or settled is None:
        most = max(measure.lambda_max.high, -measure.lambda_min.low) ** exponent
        errors = [_two_standard_errors(measure, square, most) for square in squares]
        of_probes = _SignedMoments(plus, minus, _Interval(-math.inf, math.inf))
        of_matrix = _SignedMoments(plus.widened(errors[0]), minus.widened(errors[1]), of_probes.difference)
        return unresolved, of_probes, of_probes, of_matrix

    # The mean is exact, but what lies within the threshold adds to it and not to E_plus - E_minus.
    slack = threshold * inside.high + measure.mean_rounding
    difference = _Interval(measure.mean() - slack, measure.mean() + slack)
    of_probes = _SignedMoments(plus, minus, difference).tightened()
    shifts = [settled.correction(part) for part in (_above(threshold), _below(-threshold), _outside(threshold))]
    corrected = _SignedMoments(
        of_probes.plus.shifted(shifts[0]), of_probes.minus.shifted(shifts[1]), difference.moved(shifts[2])
    ).tightened()
    difference_error = measure.mean_error + threshold * (unresolved.high - inside.high)
    # What is not settled has a square of at most either bound: that of its side, or that of all that is not settled.
    rest, most = measure.unsettled_square_bound(), _largest_unsettled(measure, settled)
    errors = [
        _two_standard_errors(measure, min(square, rest), most) + settled.uncertainty(part)
        for square, part in zip(squares, (_above(threshold), _below(-threshold)), strict=True)
    ]
    of_matrix = _SignedMoments(
        corrected.plus.widened(errors[0]),
        corrected.minus.widened(errors[1]),
        _Interval(corrected.difference.low - difference_error, corrected.difference.high + difference_error),
    ).tightened()
    return unresolved, of_probes, corrected, of_matrix


def _above(threshold: float) -> Callable[[Array], Array]:
    return lambda x: np.where(x > threshold, x, 0.0)


def _below(threshold: float) -> Callable[[Array], Array]:
    return lambda x: np.where(x < threshold, -x, 0.0)


def _outside(threshold: float) -> Callable[[Array], Array]:
    return lambda x: np.where(np.abs(x) > threshold, x, 0.0)


def _largest_unsettled(measure: SpectralMeasure, settled: Settled) -> float:
    """Return the largest magnitude of an eigenvalue that is not settled, hidden ones included."""
    candidates = [0.0, *np.abs(measure.nodes[0][~settled.mask])]
    for end, extreme in ((0, -measure.lambda_min.low), (-1, measure.lambda_max.high)):
        if not settled.mask[end]:
            candidates.append(extreme)
    return float(max(candidates))


def _two_standard_errors(measure: SpectralMeasure, square: float, most: float) -> float:
    """Return two standard errors of the integral of ``f``, given the integral of ``f^2`` and ``max |f|``.

    Probes that miss an outlier also miss its share of the variance. Two standard errors of the integral of ``f^2``,
    which follow from ``f^4 <= max|f|^2 f^2``, are therefore added to it.
    """
    return 2.0 * measure.sampling_error(square + 2.0 * most * measure.sampling_error(square))


def _extreme_ratio(measure: SpectralMeasure, threshold: float) -> Estimate:
    """Return ``|lambda_min / lambda_max|`` with the interval that the extreme Ritz values leave."""
    smallest, largest = measure.lambda_min, measure.lambda_max
    negative = _Interval(max(0.0, -smallest.high), max(0.0, -smallest.low))
    positive = _Interval(max(0.0, largest.low), max(0.0, largest.high))
    method = "intervals of the extreme eigenvalues"
    if smallest.value >= -threshold:
        high = _ratio(negative.high, positive.low) if largest.value > threshold else math.inf
        return Estimate(0.0, 0.0, high, method + "; no negative value is resolved")
    if largest.value <= threshold:
        low = _ratio(negative.low, positive.high)
        return Estimate(math.inf, low, math.inf, method + "; no positive value is resolved")
    value = -smallest.value / largest.value
    return Estimate(value, negative.low / positive.high, _ratio(negative.high, positive.low), method)


def _k_hn_over_steps(
    measure: SpectralMeasure, tridiagonal: BlockTridiagonal, exponent: float, threshold: float
) -> Estimate:
    """Return K_Hn with its range over step counts, probes, and signs of the nodes within the threshold."""
    steps = tridiagonal.steps
    value = float(np.mean(_k_hn(measure, exponent, 0.0, 0.0)))
    if measure.largest_magnitude <= threshold:
        return Estimate(0.0, 0.0, math.inf, "no node above the resolution")
    ends = [value]
    for count in sorted({round(x) for x in np.linspace(max(1, math.ceil(steps / 2)), steps, STEP_COUNTS)}):
        shorter = measure if count == steps else SpectralMeasure.from_tridiagonal(tridiagonal.truncated(count))
        for shift in (-threshold, threshold):
            spread = _spread(_k_hn(shorter, exponent, threshold, shift), 0.0, math.inf)
            ends += [spread.low, spread.high]
    method = "range over step counts, two standard errors over the probes; not a bound"
    return Estimate(value, min(ends), max(ends), method)


def _k_hn(measure: SpectralMeasure, exponent: float, threshold: float, shift: float) -> list[float]:
    """Return K_Hn of each probe, nodes within the threshold counted on the side that ``shift`` points to."""
    values = []
    for x, w in zip(measure.nodes, measure.weights, strict=True):
        terms = (np.abs(x) * w) ** exponent
        sign = np.sign(np.where(np.abs(x) <= threshold, shift, x)) if threshold > 0.0 else np.sign(x)
        values.append(_ratio(float(terms[sign < 0].sum()), float(terms[sign > 0].sum())))
    return values


def _signed_sums(nodes: Array, weights: Array, exponent: float, threshold: float) -> tuple[float, float]:
    terms = weights * np.abs(nodes) ** exponent
    return float(terms[nodes > threshold].sum()), float(terms[nodes < -threshold].sum())


def _threshold(measure: SpectralMeasure, resolution: float) -> float:
    """Return the larger of the resolution and the noise floor; never zero, so that a zero spectrum is within it."""
    return max(measure.noise, resolution, float(np.finfo(np.float64).tiny))


def _ratio(negative: float, positive: float) -> float:
    """Return ``negative / positive``: 0 when both are zero, infinite when only the divisor is."""
    if negative == 0.0:
        return 0.0
    return negative / positive if positive > 0.0 else math.inf


def _balance(plus: float, minus: float) -> float:
    return (plus - minus) / (plus + minus) if plus + minus > 0.0 else 0.0


def _spread(values: Sequence[float], least: float, most: float) -> Estimate:
    """Return the mean and two standard errors of the values of a criterion, one per probe."""
    if not all(math.isfinite(value) for value in values):
        return Estimate(math.inf, min(values), math.inf, BARE)
    mean = float(np.mean(values))
    margin = 2.0 * standard_error(values)
    return Estimate(mean, min(mean, max(least, mean - margin)), max(mean, min(most, mean + margin)), BARE)


def _enclose(value: float, ends: Sequence[float], everything: tuple[float, float], method: str) -> Estimate:
    """Return the range of the ends, or everything there can be when nothing is known."""
    if not ends:
        return Estimate(value, *everything, method)
    return Estimate(value, min(value, *ends), max(value, *ends), method)


def _mean(intervals: Sequence[tuple[float, float]]) -> _Interval:
    low, high = np.mean(intervals, axis=0).tolist()
    return _Interval(low, high)


def _ordered(low: float, high: float) -> _Interval:
    """Return an interval, closed to its middle where rounding has crossed its ends."""
    middle = 0.5 * (low + high)
    return _Interval(low, high) if low <= high else _Interval(middle, middle)
