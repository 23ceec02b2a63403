"""Trace and Frobenius norm of a matrix that is only known by its products."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from hesd_fast.engine.memory import one_look
from hesd_fast.estimators.deflated_sampling import DeflatedSampling
from hesd_fast.estimators.sampled_estimate import (
    FEWEST_SAMPLES,
    MATRIX,
    ROUNDING,
    Request,
    SampledEstimate,
    estimate_of,
    samples_wanted,
    sums_by_part,
    warn_of_width,
)

Transform = Callable[[SampledEstimate, float], SampledEstimate]
"""Makes the estimate that was asked for of that of a sum; takes what of the sum is certain, too."""


SKEWNESS = 1.25
"""How much further up than down the interval of a sum of squares goes, on a logarithmic scale; so that it holds."""

FEWEST_SAMPLES_OF_SQUARES = 32
"""Samples from which the spread of squares is trusted to end a run."""


@one_look()
def trace(
    operator: Any,
    tolerance: float | None = 0.05,
    *,
    max_products: int = 200,
    seed: int = 0,
) -> SampledEstimate:
    """Estimate the trace of a symmetric matrix, and the part of each parameter tensor.

    Costs as many products as the tolerance takes, at most ``max_products``; from n on, n products, for the exact trace.
    Memory: up to ``max_products`` vectors of length n and 20 more, or the 20 alone where that is too much.

    Parameters
    ----------
    operator : Problem, CurvatureOperator or symmetric matrix (n, n)
        A problem stands for its Hessian; see :func:`hesd_fast.operators.as_operator` for matrices.
    tolerance : float or None
        Half the width of the interval over the value, at which to stop; None to use all of ``max_products``.
    max_products : int
        Vectors to multiply at most, 2 or more.
    seed : int
        What chooses the probes, below 2**64.

    Returns
    -------
    SampledEstimate
        With a 95 % interval. ``by_parameter`` has the trace of each diagonal block. Large eigenvalues are taken out by
        block Lanczos as long as that pays, and Gaussian probes, set to one length, estimate the rest.

    Warns
    -----
    ToleranceWarning
        Where ``max_products`` do not reach the tolerance.

    Raises
    ------
    ProblemError, PlanError, OperatorError, EngineError
        For options that cannot be used; vectors that do not fit; products that are not finite or not those of a
        symmetric matrix; a device without kernels.

    References
    ----------
    Meyer, Musco, Musco, Woodruff, SOSA 2021 (Hutch++). Chen and Hallman, SIMAX 44(3), 2023. Epperly, Tropp, Webber,
    SIMAX 45(1), 2024, section 2.3 (probes of one length).

    Examples
    --------
    >>> import torch, hesd_fast as hesd
    >>> eigenvalues = torch.arange(1.0, 1001.0, dtype=torch.float64) ** -2
    >>> found = hesd.trace(torch.diag(eigenvalues), tolerance=0.01)
    >>> found.low < float(eigenvalues.sum()) < found.high, found.products < 100
    (True, True)
    """
    request = Request.checked(operator, tolerance, max_products, seed)
    return _estimated("trace", request, squares=False, transform=lambda estimate, _: estimate)


@one_look()
def frobenius_norm(
    operator: Any,
    tolerance: float | None = 0.05,
    *,
    max_products: int = 200,
    seed: int = 0,
) -> SampledEstimate:
    """Estimate the Frobenius norm of a symmetric matrix, and the part of each parameter tensor.

    Parameters, cost, warnings and errors are those of :func:`trace`.

    Parameters
    ----------
    operator : Problem, CurvatureOperator or symmetric matrix (n, n)
        As in :func:`trace`.
    tolerance, max_products, seed
        As in :func:`trace`.

    Returns
    -------
    SampledEstimate
        With a 95 % interval whose lower end is not below what the deflated directions alone have. ``by_parameter`` has
        the norm of each parameter's rows, of all n columns; their squares add up to the square of the whole.

    Raises
    ------
    ProblemError, PlanError, OperatorError, EngineError
        As :func:`trace`.

    Examples
    --------
    >>> import torch, hesd_fast as hesd
    >>> print(hesd.frobenius_norm(torch.tensor([[3.0, 0.0], [0.0, 4.0]])))
    5 [5, 5]
    """
    request = Request.checked(operator, tolerance, max_products, seed)
    return _estimated("Frobenius norm", request, squares=True, transform=_root_of)


def _estimated(what: str, request: Request, *, squares: bool, transform: Transform) -> SampledEstimate:
    with request.session():
        if request.is_exact:
            return _exact(request, squares=squares, transform=transform)
        fewest = FEWEST_SAMPLES_OF_SQUARES if squares else FEWEST_SAMPLES
        sums = sums_by_part(request.parts, squares=squares)
        sampling = DeflatedSampling(
            request.operator, request.budget(), sums, "gaussian", request.seed, fewest=fewest, of_squares=squares
        )

        def estimate(part: slice | int = slice(None)) -> SampledEstimate:
            return transform(estimate_of(sampling, request.epsilon, part), float(np.sum(sampling.inside[part])))

        sampling.run(lambda: samples_wanted(estimate(), request.tolerance))
    found, parts = estimate(), {name: estimate(i) for i, name in enumerate(request.parts)}
    factor = samples_wanted(found, request.tolerance)
    if request.tolerance is not None and factor > 1.0:
        error = (found.high - found.low) / 2.0 / abs(found.value) if found.value else math.inf
        warn_of_width(what, error, factor, request, sampling)
    return replace(found, by_parameter=_named(parts))


def _exact(request: Request, *, squares: bool, transform: Transform) -> SampledEstimate:
    """Return the sums over all unit vectors."""
    parts = request.parts
    sums, totals, scale = sums_by_part(parts, squares=squares), np.zeros(len(parts)), 0.0
    for _, vectors, products in request.unit_vectors():
        totals += sums(vectors, products).sum(axis=0)
        scale += float(torch.linalg.vector_norm(products, dim=1, dtype=torch.float64).sum())

    def estimate(value: float) -> SampledEstimate:
        magnitude = abs(value) if squares else scale  # an element is rounded as the largest of its column are
        half = ROUNDING * request.epsilon * magnitude
        method = f"exact from {request.operator.size} unit vectors, but for rounding"
        exact = SampledEstimate(value, value - half, value + half, method, products=request.operator.size)
        return transform(exact, value - half)

    found = {name: estimate(float(total)) for name, total in zip(parts, totals, strict=True)}
    return replace(estimate(float(totals.sum())), by_parameter=_named(found))


def _named(parts: Mapping[str, SampledEstimate]) -> dict[str, SampledEstimate]:
    return {} if MATRIX in parts else dict(parts)


def _root_of(square: SampledEstimate, certain: float) -> SampledEstimate:
    """Return the estimate of a norm from that of its square, of which some is certain.

    Squares are skewed: few probes have much of the largest eigenvalues, and those that have not are alike. So the rest
    is between multiples of the estimate and not at distances from it, the upper one being raised to `SKEWNESS`.
    """
    value, rest = math.sqrt(max(square.value, 0.0)), square.value - certain
    low, high = max(square.low, certain, 0.0), max(square.high, 0.0)
    if square.samples and rest > 0.0:
        multiple = math.exp(min((square.high - square.value) / rest, 500.0))
        low, high = certain + rest / multiple, certain + rest * multiple**SKEWNESS
    error = square.standard_error / (2.0 * value) if value else 0.0
    return replace(square, value=value, low=min(math.sqrt(low), value), high=math.sqrt(high), standard_error=error)
