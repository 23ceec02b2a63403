"""The integrals of ``|lambda|^p`` over the positive and the negative eigenvalues, as intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from hesd_fast.errors import ProblemError
from hesd_fast.estimate import Estimate
from hesd_fast.lanczos.block_tridiagonal import Array
from hesd_fast.spectrum.moment_bounds import cdf_band, greatest_square_beyond, hinge_bounds
from hesd_fast.spectrum.spectral_measure import SpectralMeasure

BOUNDED = "tightest bounds from the moments and two standard errors of the probes"


class Interval(NamedTuple):
    """All values between two ends."""

    low: float
    high: float

    def widened(self, margin: float) -> Interval:
        """Return the interval of a quantity that cannot be negative, with a margin on both sides."""
        return Interval(max(0.0, self.low - margin), self.high + margin)

    def shifted(self, distance: float) -> Interval:
        """Return the interval of a quantity that cannot be negative, moved."""
        return Interval(max(0.0, self.low + distance), max(0.0, self.high + distance))

    def middle(self) -> float:
        """Return the value half way between the ends."""
        return 0.5 * (self.low + self.high)


class SignedIntervals(NamedTuple):
    """What is known of ``E_plus`` and ``E_minus``: an interval for each, and one for their difference."""

    plus: Interval
    minus: Interval
    difference: Interval

    def tightened(self) -> SignedIntervals:
        """Return the same set with the intervals of ``E_plus`` and ``E_minus`` cut to what the difference allows."""
        plus, minus, difference = self
        return SignedIntervals(
            _ordered(max(plus.low, minus.low + difference.low), min(plus.high, minus.high + difference.high)),
            _ordered(max(minus.low, plus.low - difference.high), min(minus.high, plus.high - difference.low)),
            difference,
        )

    def middle(self) -> tuple[float, float]:
        """Return the middles of the intervals of ``E_plus`` and ``E_minus``."""
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
        """Return ``E_minus / E_plus`` with the value that ``(E_plus, E_minus)`` has at ``values``."""
        ends = [ratio(minus, plus) for plus, minus in self.corners()]
        return _enclose(ratio(values[1], values[0]), ends, (0.0, math.inf), method)

    def balance(self, values: tuple[float, float], method: str) -> Estimate:
        """Return ``(E_plus - E_minus) / (E_plus + E_minus)`` in the same way."""
        return _enclose(balance(*values), [balance(*corner) for corner in self.corners()], (-1.0, 1.0), method)


class SignedMoments(NamedTuple):
    """What is known of the moments of either sign, and of what has none.

    Attributes
    ----------
    unresolved : Estimate
        Share of the eigenvalues in ``[-threshold, threshold]``.
    of_probes : SignedIntervals
        Bounds for the measure of the run's probes.
    corrected : SignedIntervals
        The same with the part of the converged eigenvalues made exact.
    of_matrix : SignedIntervals
        The last with two standard errors of the other eigenvalues.
    """

    unresolved: Estimate
    of_probes: SignedIntervals
    corrected: SignedIntervals
    of_matrix: SignedIntervals


def signed_moments(measure: SpectralMeasure, exponent: float, threshold: float) -> SignedMoments:
    """Return ``E_plus`` and ``E_minus``, the integrals of ``|lambda|^exponent`` over ``pm lambda > threshold``.

    The threshold is positive and not below the measure's noise.

    Raises
    ------
    ProblemError
        If the measure is bare, or ``exponent`` needs more moments than the Lanczos steps give.
    """
    if not measure.runs:
        raise ProblemError("signed moments need the recurrence, got bare nodes; use SpectralMeasure.from_tridiagonal")
    for tridiagonal in measure.tridiagonals:
        if not tridiagonal.breakdown and exponent > tridiagonal.steps:
            raise ProblemError(
                f"mass_exponent={exponent:g} needs the moment of order {2 * exponent:g}, got {tridiagonal.steps} "
                f"steps, which give the moments up to {2 * tridiagonal.steps}; take more steps"
            )
    low, high = (bounds.tolist() for bounds in measure.cdf_bounds([-threshold, threshold]))
    inside = Interval(max(0.0, low[1] - high[0]), max(0.0, min(1.0, high[1] - low[0])))
    unresolved = measure.share_between(-threshold, threshold)
    if exponent == 1.0:
        masses = Interval(1.0 - high[1], 1.0 - low[1]), Interval(low[0], high[0])
        of_probes = _first_moments(measure, threshold, masses, inside)
        mirrored = [jacobi.reflected() for jacobi in measure.jacobi]
        squares = [
            float(np.mean([greatest_square_beyond(jacobi, threshold) for jacobi in side]))
            for side in (measure.jacobi, mirrored)
        ]
        slack = threshold * (unresolved.high - inside.high)
        return SignedMoments(unresolved, of_probes, *_of_matrix(measure, of_probes, threshold, squares, slack))
    bands = [cdf_band(jacobi, threshold, exponent) for jacobi in measure.jacobi]
    sides = (bands, [band.reflected() for band in bands])
    squares = [_mean([band.tail_moment(threshold, 2.0 * exponent) for band in side]).high for side in sides]
    plus, minus = (_mean([band.tail_moment(threshold, exponent) for band in side]) for side in sides)
    largest = max(measure.lambda_max.high, -measure.lambda_min.low)
    shift = _shift_of_powers(measure.shift.average, largest, exponent)
    errors = [measure.sampling.two_standard_errors(square, largest**exponent) + shift for square in squares]
    anything = Interval(-math.inf, math.inf)
    of_probes = SignedIntervals(plus, minus, anything)
    of_matrix = SignedIntervals(plus.widened(errors[0]), minus.widened(errors[1]), anything)
    return SignedMoments(unresolved, of_probes, of_probes, of_matrix)


def _shift_of_powers(average: float, largest: float, exponent: float) -> float:
    """Return how far the mean of ``|lambda|^exponent`` can move where eigenvalues move by so much on average."""
    if exponent < 1.0:
        return math.pow(average, exponent)  # |a^p - b^p| <= |a - b|^p, and Jensen
    return exponent * math.pow(largest, exponent - 1.0) * average


def _first_moments(
    measure: SpectralMeasure, threshold: float, masses: Sequence[Interval], inside: Interval
) -> SignedIntervals:
    """Return the first moments of the probes' measure, given its masses above, below and within the threshold."""
    # x = (x - threshold) + threshold wherever x > threshold
    hinges = [_mean([hinge_bounds(jacobi, threshold) for jacobi in measure.jacobi])]
    hinges += [_mean([hinge_bounds(jacobi.reflected(), threshold) for jacobi in measure.jacobi])]
    plus, minus = (
        Interval(hinge.low + threshold * mass.low, hinge.high + threshold * mass.high)
        for hinge, mass in zip(hinges, masses, strict=True)
    )
    # The mean is exact, but what lies within the threshold adds to it and not to E_plus - E_minus.
    slack = threshold * inside.high + measure.mean_rounding
    return SignedIntervals(plus, minus, Interval(measure.mean() - slack, measure.mean() + slack)).tightened()


def _of_matrix(
    measure: SpectralMeasure, of_probes: SignedIntervals, threshold: float, squares: Sequence[float], slack: float
) -> tuple[SignedIntervals, SignedIntervals]:
    """Return the first moments with converged eigenvalues exact, and with two standard errors of the others as well.

    ``squares`` bound the second moments of either side, ``slack`` what eigenvalues within the threshold add to the
    error of the difference.
    """

    def above(x: Array) -> Array:
        return np.where(x > threshold, x, 0.0)

    def below(x: Array) -> Array:
        return np.where(x < -threshold, -x, 0.0)

    def outside(x: Array) -> Array:
        return np.where(np.abs(x) > threshold, x, 0.0)

    converged = measure.converged
    moved = converged.correction(outside)
    plus, minus, difference = corrected = SignedIntervals(
        of_probes.plus.shifted(converged.correction(above)),
        of_probes.minus.shifted(converged.correction(below)),
        Interval(of_probes.difference.low + moved, of_probes.difference.high + moved),
    ).tightened()
    # What has not converged has a square of at most either bound: that of its side, or that of all of it.
    rest, largest = measure.unconverged_square_bound, measure.largest_unconverged
    errors = [
        measure.sampling.two_standard_errors(min(square, rest), largest)
        + converged.uncertainty(part)
        + measure.shift.average
        for square, part in zip(squares, (above, below), strict=True)
    ]
    error = measure.mean_error + slack
    return corrected, SignedIntervals(
        plus.widened(errors[0]), minus.widened(errors[1]), Interval(difference.low - error, difference.high + error)
    ).tightened()


def ratio(negative: float, positive: float) -> float:
    """Return ``negative / positive``: 0 when both are zero, infinite when only the divisor is."""
    if negative == 0.0:
        return 0.0
    return negative / positive if positive > 0.0 else math.inf


def balance(plus: float, minus: float) -> float:
    """Return ``(plus - minus) / (plus + minus)``, 0 when both are zero."""
    return (plus - minus) / (plus + minus) if plus + minus > 0.0 else 0.0


def _enclose(value: float, ends: Sequence[float], everything: tuple[float, float], method: str) -> Estimate:
    """Return the range of the ends, or everything there can be when nothing is known."""
    if not ends:
        return Estimate(value, *everything, method)
    return Estimate(value, min(value, *ends), max(value, *ends), method)


def _mean(intervals: Sequence[tuple[float, float]]) -> Interval:
    low, high = np.mean(intervals, axis=0).tolist()
    return Interval(low, high)


def _ordered(low: float, high: float) -> Interval:
    """Return an interval, closed to its middle where rounding has crossed its ends."""
    middle = 0.5 * (low + high)
    return Interval(low, high) if low <= high else Interval(middle, middle)
