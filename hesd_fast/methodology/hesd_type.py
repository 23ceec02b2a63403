"""The type of a Hessian eigenvalue spectral density, decided by intervals."""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass

from hesd_fast.errors import ProblemError
from hesd_fast.estimate import Estimate
from hesd_fast.methodology.generalization_criteria import Criteria
from hesd_fast.spectrum.spectral_measure import SpectralMeasure

MORE_STEPS = "take more Lanczos steps: the bounds of the distribution function are still wide"
MORE_PROBES = "take more probes: their sampling error is what is left"
BALANCED = "nothing that takes longer: both signs are certain to be as strong as that, as they are before training"
CONTRADICTORY = "nothing that takes longer: the balance and the extreme eigenvalues are certain, of opposite signs"
CONVERGE_EXTREMES = "take more Lanczos steps: the extreme eigenvalues have not converged"
LESS_NOISE = "compute the Hessian product in a higher precision: its noise is as large as what is to be told"

COARSE = 0.01
"""Noise relative to max|lambda| from which on more steps do not help: what is wide is the noise."""


class HESDType(enum.Enum):
    """The type of a spectral density.

    Examples
    --------
    >>> import hesd_fast as hesd
    >>> [f"{one.name}: {one}" for one in hesd.HESDType][:3]
    ['MP: mainly positive', 'MN: mainly negative', 'QS: quasi-singular']
    """

    MP = "mainly positive"
    MN = "mainly negative"
    QS = "quasi-singular"
    UNDETERMINED = "undetermined"

    def __str__(self) -> str:
        return self.value


@dataclass(frozen=True)
class TypeThresholds:
    """The numbers that the type rule depends on.

    They are our own choice and provisional, until a study of many trained networks has set them.

    Attributes
    ----------
    kappa : float
        Sharpness ``max|lambda| ||theta||^2 / L`` (no unit) below which the curvature is negligible.
    delta : float
        Least ``|balance|`` of a mainly positive or mainly negative spectrum.
    version : int
        Version of the rule and its numbers.

    Examples
    --------
    >>> import hesd_fast as hesd
    >>> hesd.TypeThresholds(delta=0.25)
    TypeThresholds(kappa=0.01, delta=0.25, version=1)
    """

    kappa: float = 1e-2
    delta: float = 0.1
    version: int = 1

    def __post_init__(self) -> None:
        if not (self.kappa >= 0.0 and math.isfinite(self.kappa)):
            raise ProblemError(f"kappa must be finite and not negative, got {self.kappa!r}; 0 switches its rule off")
        if not 0.0 < self.delta < 1.0:
            raise ProblemError(f"delta must lie between 0 and 1, got {self.delta!r}; the default is 0.1")


@dataclass(frozen=True)
class TypeEvidence:
    """What a type was decided from.

    Attributes
    ----------
    lambda_max, lambda_min, balance : Estimate
        The extreme eigenvalues and the signed balance.
    curvature : Estimate
        ``max(|lambda_max|, |lambda_min|)``.
    sharpness : Estimate or None
        ``curvature * ||theta||^2 / L``; None when the loss or the parameter norm is unknown, or the loss not positive.
    noise : float
        Magnitude below which an eigenvalue is noise of the Hessian product.
    thresholds : TypeThresholds
        The numbers of the rule, with its version.
    reason : str
        Why this type.
    advice : tuple of str
        What would decide an undetermined type, most useful first.

    Examples
    --------
    >>> import hesd_fast as hesd
    >>> measure = hesd.SpectralMeasure([-2.0, 2.0], [0.5, 0.5])
    >>> hesd_type, evidence = hesd.classify(measure, hesd.criteria(measure))
    >>> print(hesd_type.name, "of curvature", evidence.curvature)
    UNDETERMINED of curvature 2 [2, 2]
    >>> evidence.reason.split("; ")[0]
    'the balance 0 [0, 0] is neither at least 0.1 nor at most -0.1'
    """

    lambda_max: Estimate
    lambda_min: Estimate
    balance: Estimate
    curvature: Estimate
    sharpness: Estimate | None
    noise: float
    thresholds: TypeThresholds
    reason: str
    advice: tuple[str, ...] = ()


def classify(
    measure: SpectralMeasure,
    criteria: Criteria,
    *,
    loss_value: float | None = None,
    parameter_norm_squared: float | None = None,
    noise: float | None = None,
    thresholds: TypeThresholds | None = None,
) -> tuple[HESDType, TypeEvidence]:
    """Return the type of a spectral density and the evidence for it.

    1. Quasi-singular, if the upper end of the sharpness ``max|lambda| ||theta||^2 / L`` is below ``kappa``, or the
       upper end of ``max|lambda|`` does not exceed the noise.
    2. Undetermined, if only the lower end of either is.
    3. Mainly positive, if the lower end of the balance is at least ``delta`` and the interval of ``lambda_max`` lies
       above that of ``|lambda_min|``. Mainly negative, if that holds for ``-H``.
    4. Undetermined otherwise.

    The share of negative eigenvalues plays no part: next to zero it has no sign that could be computed.

    Parameters
    ----------
    measure, criteria : SpectralMeasure, Criteria
        The measure and its criteria.
    loss_value, parameter_norm_squared : float, optional
        ``L`` and ``||theta||^2``, passed together. Sharpness is not judged without them, or when ``L`` is not positive.
    noise : float, optional
        Measured noise of the Hessian product, in units of the eigenvalues. The resolution of the criteria by default.
    thresholds : TypeThresholds, optional
        The numbers of the rule.

    Raises
    ------
    ProblemError
        If only one of loss and parameter norm is passed, or a number is not finite or has the wrong sign.

    References
    ----------
    The types are those of Gabdullin, arXiv 2504.17618; this rule and its thresholds are ours.

    Examples
    --------
    >>> import hesd_fast as hesd
    >>> measure = hesd.SpectralMeasure([-1.0, 4.0], [0.5, 0.5])
    >>> hesd_type, evidence = hesd.classify(measure, hesd.criteria(measure))
    >>> print(hesd_type, evidence.balance)
    mainly positive 0.6 [0.6, 0.6]
    """
    thresholds = TypeThresholds() if thresholds is None else thresholds
    noise = criteria.resolution if noise is None else noise
    if not (noise >= 0.0 and math.isfinite(noise)):
        raise ProblemError(f"noise must be finite and not negative, got {noise!r}; leave it out if it was not measured")
    scale = loss_value, parameter_norm_squared
    return decide_type(measure.lambda_max, measure.lambda_min, criteria, scale, noise, thresholds)


def decide_type(
    largest: Estimate,
    smallest: Estimate,
    criteria: Criteria,
    scale: tuple[float | None, float | None],
    noise: float,
    thresholds: TypeThresholds,
) -> tuple[HESDType, TypeEvidence]:
    """Return what `classify` does, from the extreme eigenvalues in place of the measure.

    ``scale`` is the loss and the squared parameter norm. The same numbers give the same type and words everywhere.
    """
    balance = criteria.balance
    negated = -smallest
    curvature = Estimate(
        max(largest.value, negated.value, 0.0),
        max(largest.low, negated.low, 0.0),
        max(largest.high, negated.high, 0.0),
        "intervals of the extreme eigenvalues",
    )
    sharpness = _sharpness(curvature, *scale)

    def verdict(hesd_type: HESDType, reason: str, *advice: str) -> tuple[HESDType, TypeEvidence]:
        numbers = (largest, smallest, balance, curvature, sharpness, noise, thresholds)
        return hesd_type, TypeEvidence(*numbers, reason, advice)

    if curvature.high <= noise:
        return verdict(HESDType.QS, f"no eigenvalue exceeds the noise {noise:.3g}: max|lambda| is {curvature}")
    if sharpness is not None and sharpness.high < thresholds.kappa:
        return verdict(HESDType.QS, f"the curvature is negligible: sharpness {sharpness} is below {thresholds.kappa:g}")
    if curvature.low <= noise:
        reason = f"max|lambda| is {curvature}, which may or may not exceed the noise {noise:.3g}"
        return verdict(HESDType.UNDETERMINED, reason, LESS_NOISE, CONVERGE_EXTREMES)
    if sharpness is not None and sharpness.low < thresholds.kappa:
        reason = f"the sharpness {sharpness} may or may not be below {thresholds.kappa:g}"
        return verdict(HESDType.UNDETERMINED, reason, CONVERGE_EXTREMES)

    if balance.low >= thresholds.delta and largest.low > negated.high:
        reason = f"the balance {balance} is at least {thresholds.delta:g} and lambda_max {largest} exceeds |lambda_min|"
        return verdict(HESDType.MP, reason)
    if balance.high <= -thresholds.delta and negated.low > largest.high:
        reason = f"the balance {balance} is at most {-thresholds.delta:g} and |lambda_min| {negated} exceeds lambda_max"
        return verdict(HESDType.MN, reason)
    reasons, advice = _what_is_missing(largest, negated, criteria, thresholds.delta)
    if noise >= COARSE * curvature.value:
        advice = tuple(
            dict.fromkeys(LESS_NOISE if text in (MORE_STEPS, CONVERGE_EXTREMES) else text for text in advice)
        )
    return verdict(HESDType.UNDETERMINED, reasons, *advice)


def _sharpness(curvature: Estimate, loss_value: float | None, parameter_norm_squared: float | None) -> Estimate | None:
    if loss_value is None and parameter_norm_squared is None:
        return None
    if loss_value is None or parameter_norm_squared is None:
        raise ProblemError(
            f"sharpness needs both the loss and the squared parameter norm, got loss_value={loss_value!r} and "
            f"parameter_norm_squared={parameter_norm_squared!r}; pass both or neither"
        )
    if not math.isfinite(loss_value):
        raise ProblemError(f"loss_value must be finite, got {loss_value!r}; check the model on this data")
    if not (parameter_norm_squared >= 0.0 and math.isfinite(parameter_norm_squared)):
        raise ProblemError(f"parameter_norm_squared must be finite and not negative, got {parameter_norm_squared!r}")
    if loss_value <= 0.0:  # the scale of such a loss means nothing
        return None
    factor = parameter_norm_squared / loss_value
    ends = (curvature.value, curvature.low, curvature.high)
    value, low, high = (end * factor if end and factor else 0.0 for end in ends)  # 0 times an infinite end is 0
    return Estimate(value, low, high, curvature.method)


def _what_is_missing(
    largest: Estimate, negated: Estimate, criteria: Criteria, delta: float
) -> tuple[str, tuple[str, ...]]:
    """Return which conditions failed, and what would decide them."""
    balance, of_probes = criteria.balance, criteria.probe_balance
    reasons: list[str] = []
    advice: list[str] = []
    if balance.low < delta and balance.high > -delta:
        reasons.append(f"the balance {balance} is neither at least {delta:g} nor at most {-delta:g}")
        if balance.high >= delta or balance.low <= -delta:
            bounds = of_probes.high - of_probes.low
            sampling = (balance.high - balance.low) - bounds
            causes = sorted(((bounds, MORE_STEPS), (sampling, MORE_PROBES)), reverse=True)
            advice += [text for width, text in causes if width >= delta / 2] or [causes[0][1]]
    larger = balance.value >= 0.0
    above = largest.low > negated.high if larger else negated.low > largest.high
    if not above:
        names = ("lambda_max", "|lambda_min|") if larger else ("|lambda_min|", "lambda_max")
        ends = (largest, negated) if larger else (negated, largest)
        reasons.append(f"{names[0]} {ends[0]} does not lie above {names[1]} {ends[1]}")
        if max(largest.low, negated.low) <= min(largest.high, negated.high) and CONVERGE_EXTREMES not in advice:
            advice.append(CONVERGE_EXTREMES)
    certain = BALANCED if -delta < balance.low and balance.high < delta else CONTRADICTORY
    return "; ".join(reasons), tuple(advice) or (certain,)
