"""Criteria of generalization read off a spectral measure, each with the interval it is known to.

References
----------
``r_e`` and ``k_hn``: Gabdullin, arXiv 2412.10146 and 2504.17618. ``k_mass`` and ``balance`` are extensions of ours.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from hesd_fast.errors import ProblemError
from hesd_fast.estimate import Estimate
from hesd_fast.lanczos.block_tridiagonal import Array
from hesd_fast.methodology.signed_moments import BOUNDED, Interval, balance, ratio, signed_moments
from hesd_fast.spectrum.sampling_error import standard_error_of_mean
from hesd_fast.spectrum.spectral_measure import SpectralMeasure

STEP_COUNTS = 4
"""How many step counts K_Hn is computed at, the last and the smaller ones down to half of it."""

BARE = "the measure as given, two standard errors over its probes"
PROBES_ONLY = "tightest bounds from the moments, for these probes"


@dataclass(frozen=True)
class Criteria:
    """The criteria of one spectral measure.

    The intervals described are those of a measure made from a tridiagonal. A bare measure is taken as it is: each
    criterion is computed per probe and averaged, with two standard errors over the probes, and the value of ``r_e`` is
    the plain ratio of its extreme nodes.

    A spectrum without anything above the resolution has ``r_e``, ``k_mass``, ``k_hn`` and ``balance`` of value 0 with
    intervals ``[0, inf]`` and ``[-1, 1]``, for nothing is known of its sign; a criterion without a positive part, but
    with a negative one, is infinite.

    Attributes
    ----------
    r_e : Estimate
        ``|lambda_min / lambda_max|``: 0 when no negative value is resolved, infinite when no positive one is. Its
        interval follows from those of the extreme eigenvalues.
    k_hn : Estimate
        ``sum over theta_i < 0 of (|theta_i| w_i)^exponent``, divided by the same sum over ``theta_i > 0``. It depends
        on the number of Lanczos steps and is there to compare with published values. Its interval is the range over 4
        step counts from ``m/2`` to ``m``, each with two standard errors over the probes, and over both signs of the
        nodes within the resolution: a spread, not a bound.
    k_mass : Estimate
        ``E_minus / E_plus`` with ``E_pm`` the integral of ``|lambda|^mass_exponent`` over ``pm lambda > resolution``.
        It does not depend on how the measure is split into nodes. Its interval and those below follow from the tightest
        bounds that the moments allow, which are rigorous for the probes' measure, and two standard errors of the
        probes. The value is the middle of what the bounds leave for ``E_plus`` and ``E_minus`` before the standard
        errors, so no node of arbitrary sign decides it.
    e_plus, e_minus : Estimate
        ``E_plus`` and ``E_minus`` themselves, means over the eigenvalues: n times as much is a sum over them.
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

    Examples
    --------
    >>> import hesd_fast as hesd
    >>> found = hesd.criteria(hesd.SpectralMeasure([-1.0, 0.0, 3.0], [0.25, 0.5, 0.25]))
    >>> found.balance.value, found.unresolved_mass.value, found.exponent
    (0.5, 0.5, 0.5)
    """

    r_e: Estimate
    k_hn: Estimate
    k_mass: Estimate
    e_plus: Estimate
    e_minus: Estimate
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
    """Return the criteria of a spectral measure; `Criteria` says what their intervals cover.

    Costs some tridiagonal eigenproblems of order ``m + 1`` per probe, and for K_Hn three of at most order ``k``. An
    exponent of the mass other than 1 takes about 160 more of order ``m + 1`` per probe.

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
        `BlockTridiagonal.noise`, is used when it is larger, or when nothing is passed.

    Raises
    ------
    ProblemError
        If an exponent is not positive, the resolution is negative, or ``mass_exponent`` needs more moments than the
        Lanczos steps give.

    Examples
    --------
    >>> import hesd_fast as hesd
    >>> found = hesd.criteria(hesd.SpectralMeasure([-1.0, 0.0, 4.0], [0.25, 0.5, 0.25]))
    >>> found.r_e.value, found.k_hn.value, found.k_mass.value
    (0.25, 0.5, 0.25)
    """
    for name, value in (("exponent", exponent), ("mass_exponent", mass_exponent)):
        if not (value > 0.0 and math.isfinite(value)):
            raise ProblemError(f"{name} must be positive and finite, got {value!r}; the published exponent is 0.5")
    if resolution is not None and not (resolution >= 0.0 and math.isfinite(resolution)):
        raise ProblemError(f"resolution must be finite and not negative, got {resolution!r}; leave it out if unknown")
    threshold = max(resolution_of(measure), resolution or 0.0)
    of_measure = _of_runs if measure.runs else _of_bare_measure
    found = of_measure(measure, exponent, mass_exponent, threshold)
    return Criteria(exponent=exponent, mass_exponent=mass_exponent, resolution=threshold, **found)


def resolution_of(measure: SpectralMeasure) -> float:
    """Return the magnitude below which an eigenvalue is noise; never zero, so that a zero spectrum is within it."""
    return max(measure.noise, float(np.finfo(np.float64).tiny))


def _of_bare_measure(
    measure: SpectralMeasure, exponent: float, mass_exponent: float, threshold: float
) -> dict[str, Estimate]:
    parts = [_signed_sums(x, w, mass_exponent, threshold) for x, w in measure.pairs]
    balances = _mean_of_probes([balance(plus, minus) for plus, minus in parts], -1.0, 1.0)
    return {
        "r_e": _mean_of_probes([ratio(abs(float(x[0])), abs(float(x[-1]))) for x in measure.nodes], 0.0, math.inf),
        "k_hn": _mean_of_probes(_k_hn(measure, exponent, 0.0, 0.0), 0.0, math.inf),
        "k_mass": _mean_of_probes([ratio(minus, plus) for plus, minus in parts], 0.0, math.inf),
        "e_plus": _mean_of_probes([plus for plus, _ in parts], 0.0, math.inf),
        "e_minus": _mean_of_probes([minus for _, minus in parts], 0.0, math.inf),
        "balance": balances,
        "probe_balance": balances,
        "unresolved_mass": _mean_of_probes([float(w @ (np.abs(x) <= threshold)) for x, w in measure.pairs], 0.0, 1.0),
    }


def _of_runs(measure: SpectralMeasure, exponent: float, mass_exponent: float, threshold: float) -> dict[str, Estimate]:
    published = {
        "r_e": extreme_ratio(measure, threshold),
        "k_hn": _k_hn_over_steps(measure, exponent, threshold),
    }
    moments = signed_moments(measure, mass_exponent, threshold)
    # Between bounds that hold nothing but rounding there is no value in the middle.
    resolved = measure.largest_magnitude > threshold
    values, of_probes = (s.middle() if resolved else (0.0, 0.0) for s in (moments.corrected, moments.of_probes))
    return {
        **published,
        "k_mass": moments.of_matrix.k_mass(values, BOUNDED),
        "e_plus": _estimate(moments.of_matrix.plus, values[0]),
        "e_minus": _estimate(moments.of_matrix.minus, values[1]),
        "balance": moments.of_matrix.balance(values, BOUNDED),
        "probe_balance": moments.of_probes.balance(of_probes, PROBES_ONLY),
        "unresolved_mass": moments.unresolved,
    }


def _estimate(interval: Interval, value: float) -> Estimate:
    """Return an interval with its value, which a bound of the other sign's moment may have moved beyond an end."""
    return Estimate(min(max(value, interval.low), interval.high), *interval, BOUNDED)


def extreme_ratio(measure: SpectralMeasure, threshold: float) -> Estimate:
    """Return ``|lambda_min / lambda_max|`` with the interval that the extreme Ritz values leave."""
    smallest, largest = measure.lambda_min, measure.lambda_max
    negative = Interval(max(0.0, -smallest.high), max(0.0, -smallest.low))
    positive = Interval(max(0.0, largest.low), max(0.0, largest.high))
    method = "intervals of the extreme eigenvalues"
    if smallest.value >= -threshold:
        high = ratio(negative.high, positive.low) if largest.value > threshold else math.inf
        return Estimate(0.0, 0.0, high, method + "; no negative value is resolved")
    if largest.value <= threshold:
        low = ratio(negative.low, positive.high)
        return Estimate(math.inf, low, math.inf, method + "; no positive value is resolved")
    value = -smallest.value / largest.value
    return Estimate(value, negative.low / positive.high, ratio(negative.high, positive.low), method)


def _k_hn_over_steps(measure: SpectralMeasure, exponent: float, threshold: float) -> Estimate:
    """Return K_Hn with its range over step counts, probes, and signs of the nodes within the threshold."""
    steps = max(tridiagonal.steps for tridiagonal in measure.tridiagonals)
    value = float(np.mean(_k_hn(measure, exponent, 0.0, 0.0)))
    if measure.largest_magnitude <= threshold:
        return Estimate(0.0, 0.0, math.inf, "no node above the resolution")
    ends = [value]
    for count in sorted({round(x) for x in np.linspace(max(1, math.ceil(steps / 2)), steps, STEP_COUNTS)}):
        shorter = measure if count == steps else _after(measure, count)
        for shift in (-threshold, threshold):
            spread = _mean_of_probes(_k_hn(shorter, exponent, threshold, shift), 0.0, math.inf)
            ends += [spread.low, spread.high]
    method = "range over step counts, two standard errors over the probes; not a bound"
    return Estimate(value, min(ends), max(ends), method)


def _after(measure: SpectralMeasure, steps: int) -> SpectralMeasure:
    """Return the measure as it was after so many steps of each run, or all of a shorter one."""
    rules = [(one.probes, *one.quadrature(min(steps, one.steps))) for one in measure.tridiagonals]
    return SpectralMeasure(
        [nodes for probes, nodes, _ in rules for _ in range(probes)], [row for *_, weights in rules for row in weights]
    )


def _k_hn(measure: SpectralMeasure, exponent: float, threshold: float, shift: float) -> list[float]:
    """Return K_Hn of each probe, nodes within the threshold counted on the side that ``shift`` points to."""
    values = []
    for x, w in measure.pairs:
        terms = (np.abs(x) * w) ** exponent
        sign = np.sign(np.where(np.abs(x) <= threshold, shift, x)) if threshold > 0.0 else np.sign(x)
        values.append(ratio(float(terms[sign < 0].sum()), float(terms[sign > 0].sum())))
    return values


def _signed_sums(nodes: Array, weights: Array, exponent: float, threshold: float) -> tuple[float, float]:
    terms = weights * np.abs(nodes) ** exponent
    return float(terms[nodes > threshold].sum()), float(terms[nodes < -threshold].sum())


def _mean_of_probes(values: Sequence[float], least: float, most: float) -> Estimate:
    """Return the mean of a number that each probe gives, from ``least`` to ``most``, and two standard errors of it."""
    if not all(math.isfinite(value) for value in values):
        return Estimate(math.inf, min(values), math.inf, BARE)
    mean = float(np.mean(values))
    margin = 2.0 * standard_error_of_mean(values)
    return Estimate(mean, min(mean, max(least, mean - margin)), max(mean, min(most, mean + margin)), BARE)
