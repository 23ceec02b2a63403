"""The diagonal of a matrix that is only known by its products, and the trace of each of its diagonal blocks."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hesd_fast.engine import kernels
from hesd_fast.engine.memory import one_look
from hesd_fast.estimators.deflated_sampling import WIDTH, DeflatedSampling
from hesd_fast.estimators.deflation import new_panel
from hesd_fast.estimators.sampled_estimate import (
    FEWEST_SAMPLES,
    MATRIX,
    ROUNDING,
    Request,
    SampledEstimate,
    estimate_of,
    quantile,
    sums_by_part,
    warn_of_width,
)
from hesd_fast.operators.base import CurvatureOperator, ProblemOperator

LONG_VECTORS = 6 + WIDTH
"""Vectors of at most float64 beside those of the trace: what is certain, mean and spread, copies, probes as drawn."""


@dataclass(frozen=True)
class DiagonalEstimate:
    """The diagonal of a matrix, with a standard error for each element.

    Attributes
    ----------
    values : tensor (n,), float64
        The elements.
    standard_errors : tensor (n,), float64
        Of each; 0 where they were computed exactly.
    trace : SampledEstimate
        Their sum, with a 95 % interval; the sums of the parameters are in ``block_traces``.
    block_traces : mapping of str to SampledEstimate
        Trace of the diagonal block of each parameter tensor, with a 95 % interval of its own; over the number of
        elements it is the mean curvature that mixed-precision quantization ranks layers by.
    by_parameter : mapping of str to tensor
        The elements in the shape of each parameter. Of a complex parameter, the real part belongs to its real parts and
        the imaginary part to its imaginary parts.
    rounding : float
        What rounding may add to the error of an element.

    Examples
    --------
    >>> import torch, hesd_fast as hesd
    >>> data = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.zeros(2, 1)
    >>> loss = hesd.losses.supervised(torch.nn.MSELoss())
    >>> found = hesd.diagonal(hesd.Problem(torch.nn.Linear(2, 1), loss, data))
    >>> found.by_parameter["weight"]
    tensor([[1., 4.]], dtype=torch.float64)
    >>> print(found.block_traces["weight"])
    5 [5, 5]
    """

    values: Tensor
    standard_errors: Tensor
    trace: SampledEstimate
    block_traces: Mapping[str, SampledEstimate]
    by_parameter: Mapping[str, Tensor]
    rounding: float

    @property
    def products(self) -> int:
        """Vectors that the matrix was multiplied with."""
        return self.trace.products

    @property
    def method(self) -> str:
        """One phrase saying what the intervals account for."""
        return self.trace.method

    @property
    def half_widths(self) -> Tensor:
        """Half the width of the 95 % interval of each element, (n,), float64."""
        wide = quantile(self.trace.samples) if self.trace.samples else 0.0
        return self.standard_errors * wide + self.rounding

    @property
    def low(self) -> Tensor:
        """Lower ends of the 95 % intervals of the elements, (n,), float64."""
        return self.values - self.half_widths

    @property
    def high(self) -> Tensor:
        """Upper ends of the 95 % intervals of the elements, (n,), float64."""
        return self.values + self.half_widths


@one_look()
def diagonal(
    operator: Any,
    tolerance: float | None = 0.1,
    *,
    max_products: int = 200,
    seed: int = 0,
) -> DiagonalEstimate:
    """Estimate the diagonal of a symmetric matrix, and the trace of each diagonal block.

    Costs as many products as the tolerance takes, at most ``max_products``; from n on, n products, for the exact
    diagonal. Memory: as :func:`trace`, and 14 vectors of float64.

    Parameters
    ----------
    operator : Problem, CurvatureOperator or symmetric matrix (n, n)
        A problem stands for its Hessian; see :func:`hesd_fast.operators.as_operator` for matrices.
    tolerance : float or None
        Root of the sum of squares of the standard errors, over the norm of the diagonal, at which to stop; None to use
        all of ``max_products``.
    max_products : int
        Vectors to multiply at most, 2 or more.
    seed : int
        What chooses the probes, below 2**64.

    Returns
    -------
    DiagonalEstimate
        Elements and their standard errors. Large eigenvalues are taken out as in :func:`trace`, and Rademacher probes
        estimate what they leave: ``z * (A (I - P) z)``, averaged, has the diagonal of ``A (I - P)`` as its mean.
        Rows of zeros come out as zero.

    Warns
    -----
    ToleranceWarning
        Where ``max_products`` do not reach the tolerance.

    Raises
    ------
    ProblemError, PlanError, OperatorError, EngineError
        As :func:`trace`.

    References
    ----------
    Bekas, Kokiopoulou, Saad, Appl. Numer. Math. 57, 2007. Baston and Nakatsukasa, arXiv 2201.10684, 2022 (with
    deflation). Dong et al., NeurIPS 2020 (HAWQ-V2: layers by their mean curvature).

    Examples
    --------
    >>> import torch, hesd_fast as hesd
    >>> hesd.diagonal(torch.diag(torch.tensor([3.0, -1.0]))).values
    tensor([ 3., -1.], dtype=torch.float64)
    """
    request = Request.checked(operator, tolerance, max_products, seed)
    with request.session():
        return _exact(request) if request.is_exact else _sampled(request)


class _Elements:
    """Mean and spread of what each probe says of every element, and the part that is certain."""

    def __init__(self, operator: CurvatureOperator, seed: int) -> None:
        self._operator, self._seed = operator, seed
        self.count = 0
        self.certain, self._mean, self._squares = (
            torch.zeros(operator.size, dtype=torch.float64, device=operator.device) for _ in range(3)
        )

    def add_basis(self, directions: Tensor, images: Tensor) -> None:
        """Add a part in which the matrix is known."""
        for direction, image in zip(directions, images, strict=True):
            self.certain.addcmul_(direction.double(), image.double())

    def add_probes(self, first: int, products: Tensor) -> None:
        """Add what some probes say, from the products with their parts outside of the basis."""
        probe = new_panel(self._operator, 1)
        for i, product in enumerate(products):
            kernels.fill_probes(probe, self._seed, first_probe=first + i)
            sample = (probe[0] * product).double()
            self.count += 1
            before = sample - self._mean
            self._mean.add_(before, alpha=1.0 / self.count)
            self._squares.addcmul_(before, sample.sub_(self._mean))  # Welford's sum of squared deviations

    def with_pending(self, first: int, products: Tensor) -> _Elements:
        """Return the same with probes that may still change."""
        found = _Elements.__new__(_Elements)
        found.__dict__.update(self.__dict__)
        found._mean, found._squares = self._mean.clone(), self._squares.clone()
        found.add_probes(first, products)
        return found

    @property
    def values(self) -> Tensor:
        """The elements."""
        return self.certain + self._mean

    @property
    def standard_errors(self) -> Tensor:
        """Of each element."""
        return (self._squares / (max(self.count - 1, 1) * max(self.count, 1))).sqrt_()

    @property
    def relative_error(self) -> float:
        """The error that is expected of the whole diagonal, over its norm."""
        error, norm = float(self.standard_errors.norm()), float(self.values.norm())
        return error / norm if norm else (0.0 if error == 0.0 else math.inf)


def _sampled(request: Request) -> DiagonalEstimate:
    operator = request.operator
    budget = request.budget(LONG_VECTORS * operator.size * 8)
    elements = _Elements(operator, request.seed)
    sampling = DeflatedSampling(
        operator,
        budget,
        sums_by_part(request.parts),
        "rademacher",
        request.seed,
        fewest=FEWEST_SAMPLES,
        on_probes=elements.add_probes,
        on_basis=elements.add_basis,
    )

    def wanted() -> float:
        if request.tolerance is None:
            return math.inf
        pending = sampling.pending
        seen = elements if pending is None else elements.with_pending(sampling.drawn - len(pending), pending)
        return (seen.relative_error / request.tolerance) ** 2

    sampling.run(wanted)
    error = elements.relative_error
    if request.tolerance is not None and error > request.tolerance:
        warn_of_width("diagonal", error, (error / request.tolerance) ** 2, request, sampling)
    parts = {name: estimate_of(sampling, request.epsilon, i) for i, name in enumerate(request.parts)}
    largest = float(elements.values.abs().max())
    return _estimate(
        request,
        elements.values,
        elements.standard_errors,
        estimate_of(sampling, request.epsilon),
        parts,
        ROUNDING * request.epsilon * largest,
    )


def _exact(request: Request) -> DiagonalEstimate:
    operator = request.operator
    values = torch.zeros(operator.size, dtype=torch.float64, device=operator.device)
    scale = torch.zeros_like(values)
    for first, vectors, products in request.unit_vectors():
        last = first + len(vectors)
        values[first:last] = products[:, first:last].diagonal()
        scale[first:last] = torch.linalg.vector_norm(products, dim=1, dtype=torch.float64)
    rounding = ROUNDING * request.epsilon * scale

    def estimate(part: slice) -> SampledEstimate:
        value, half = float(values[part].sum()), float(rounding[part].sum())
        method = f"exact from {operator.size} unit vectors, but for rounding"
        return SampledEstimate(value, value - half, value + half, method, products=operator.size)

    parts = {name: estimate(part) for name, part in request.parts.items()}
    whole = estimate(slice(0, operator.size))
    return _estimate(request, values, torch.zeros_like(values), whole, parts, float(rounding.max()))


def _estimate(
    request: Request,
    values: Tensor,
    errors: Tensor,
    whole: SampledEstimate,
    parts: Mapping[str, SampledEstimate],
    rounding: float,
) -> DiagonalEstimate:
    operator = request.operator
    named: dict[str, Tensor] = {}
    if isinstance(operator, ProblemOperator):
        named = dict(zip(operator.problem.parameters, operator.problem.unflatten(values), strict=True))
    traces = {} if MATRIX in parts else dict(parts)
    return DiagonalEstimate(values, errors, whole, traces, named, rounding)
