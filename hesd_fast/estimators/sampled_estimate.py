"""Estimates that come from random probes: how they are asked for, and what they say of themselves."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import scipy.special
import torch
from torch import Tensor

from hesd_fast.engine import kernels
from hesd_fast.engine.memory import available_memory
from hesd_fast.errors import PlanError, ProblemError, ToleranceWarning
from hesd_fast.estimate import Estimate
from hesd_fast.estimators.deflated_sampling import WIDTH, Budget, DeflatedSampling, Sums
from hesd_fast.estimators.deflation import BLOCK, Array, multiply, new_panel
from hesd_fast.operators import HessianOperator, as_operator
from hesd_fast.operators.base import CurvatureOperator, ProblemOperator
from hesd_fast.problem.problem import Problem

RISK = 0.04
"""Of the truth being outside of an interval of Student's t; ending where the spread is small takes it to 0.05."""

FEWEST_SAMPLES = 16
"""Samples from which their spread is trusted to end a run."""

ROUNDING = 8.0
"""Rounding error of a sum, in machine epsilons of the magnitudes in it."""

MEMORY_SHARE = 0.5
"""Part of the memory that can be had which vectors may take; products need some too."""

MATRIX = ""
"""The one part of a matrix whose columns have no names."""

_CHUNK = 1 << 20  # columns that are worked on together


@dataclass(frozen=True)
class SampledEstimate(Estimate):
    """An estimate from random probes, with its 95 % interval.

    Attributes
    ----------
    value, low, high, method
        As in :class:`~hesd_fast.Estimate`.
    standard_error : float
        Of the value; 0 where it was computed exactly.
    products : int
        Vectors that the matrix was multiplied with.
    samples : int
        Probes; 0 where the value was computed exactly.
    deflated : int
        Directions in which the matrix is known exactly.
    by_parameter : mapping of str to Estimate
        The part of each parameter tensor, with a 95 % interval of its own; empty for a matrix whose columns have no
        names.

    Examples
    --------
    >>> import torch, hesd_fast as hesd
    >>> found = hesd.trace(torch.diag(torch.arange(50.0)))
    >>> found.value, found.products, found.samples
    (1225.0, 50, 0)
    """

    standard_error: float = 0.0
    products: int = 0
    samples: int = 0
    deflated: int = 0
    by_parameter: Mapping[str, Estimate] = field(default_factory=dict)


@dataclass(frozen=True)
class Request:
    """What was asked for, checked: an operator, and how long to go on.

    Attributes
    ----------
    operator : CurvatureOperator
        The matrix.
    tolerance : float or None
        Half the width of the interval over the value at which to stop; None to use all products.
    max_products, seed : int
        Vectors to multiply at most; what chooses the probes.
    """

    operator: CurvatureOperator
    tolerance: float | None
    max_products: int
    seed: int

    @classmethod
    def checked(cls, operator: Any, tolerance: float | None, max_products: int, seed: int) -> Request:
        """Return the request; a ProblemError, OperatorError or EngineError for what cannot be used."""
        for name, value, least in (("max_products", max_products, 2), ("seed", seed, 0)):
            if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
                raise ProblemError(f"{name} is {value!r}; wanted an integer")
            if value < least:
                raise ProblemError(f"{name} is {value}; wanted at least {least}")
        if seed >= 2**64:
            raise ProblemError(f"seed is {seed}; wanted an integer in [0, 2**64)")
        if tolerance is not None:
            is_number = isinstance(tolerance, (int, float, np.number)) and not isinstance(tolerance, bool)
            if not is_number or not 0.0 < tolerance < math.inf:
                raise ProblemError(
                    f"tolerance is {tolerance!r}; wanted a number above 0, the half-width of the interval relative to "
                    "the value, or None to use max_products"
                )
            tolerance = float(tolerance)
        if isinstance(operator, Problem):
            panels = math.ceil(min(max_products, operator.size) / BLOCK)
            operator = HessianOperator(operator, hvp="auto", panels=panels)
        operator = as_operator(operator)
        kernels.require_device(operator.device)
        return cls(operator, tolerance, int(max_products), int(seed))

    @property
    def is_exact(self) -> bool:
        """Whether there are products enough for every unit vector."""
        return self.max_products >= self.operator.size

    @property
    def parts(self) -> dict[str, slice]:
        """Return the columns of each parameter tensor by name, or all of them under `MATRIX`."""
        if not isinstance(self.operator, ProblemOperator):
            return {MATRIX: slice(0, self.operator.size)}
        problem = self.operator.problem
        ends = [*problem.offsets[1:], problem.size]
        columns = zip(problem.parameters, problem.offsets, ends, strict=True)
        return {name: slice(start, end) for name, start, end in columns}

    @property
    def epsilon(self) -> float:
        """Machine epsilon of the coarsest arithmetic that the products work in."""
        return max(torch.finfo(self.operator.dtype).eps, getattr(self.operator, "epsilon", 0.0))

    def budget(self, more_bytes: int = 0) -> Budget:
        """Return the products and the memory for vectors, with some bytes needed for other things.

        Where memory is short, fewer vectors are kept to deflate with, then fewer probes multiplied together.

        Raises
        ------
        PlanError
            Where not even one probe, its product and what is asked for fit.
        """
        width = min(WIDTH, max(2, self.max_products // 3), self.operator.size)
        rows = max(self.max_products - width, 0)
        available = available_memory(self.operator.device)
        if available is None:
            return Budget(self.max_products, rows, width)
        vector = self.operator.size * self.operator.dtype.itemsize
        while True:
            left = int(available * MEMORY_SHARE) - more_bytes - (2 * width + BLOCK) * vector
            if left >= 0 or width == 1:
                break
            width //= 2
        if left < 0:
            raise PlanError(
                f"two vectors of {self.operator.size} {self.operator.dtype} for each of {width} probes and {BLOCK} more"
                f" take {((2 * width + BLOCK) * vector + more_bytes) / 2**30:.1f} GiB with what is kept of them, but "
                f"{available * MEMORY_SHARE / 2**30:.1f} GiB may be taken of the memory that is available; select "
                "fewer parameters"
            )
        fitting = left // vector
        return Budget(self.max_products, min(rows, fitting) if fitting >= 2 * BLOCK else 0, width)

    @contextmanager
    def session(self) -> Iterator[None]:
        """Borrow the model of a problem meanwhile, once for all products."""
        if not isinstance(self.operator, ProblemOperator):
            yield
            return
        try:
            with self.operator.problem.session():
                yield
        finally:
            self.operator.release()

    def unit_vectors(self, width: int = WIDTH) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Yield panels of all unit vectors, each with the number of its first, and the products with them."""
        vectors, products = new_panel(self.operator, width), new_panel(self.operator, width)
        for first in range(0, self.operator.size, width):
            count = min(width, self.operator.size - first)
            vectors.zero_()
            vectors[:count, first : first + count].fill_diagonal_(1.0)
            multiply(self.operator, vectors[:count], products[:count])
            yield first, vectors[:count], products[:count]


def sums_by_part(parts: Mapping[str, slice], *, squares: bool = False) -> Sums:
    """Return what sums up vectors times products, or the squares of products, over the columns of each part."""

    def sums(vectors: Tensor, products: Tensor) -> Array:
        found = np.zeros((len(products), len(parts)))
        for column, part in enumerate(parts.values()):
            for start in range(part.start, part.stop, _CHUNK):
                chunk = slice(start, min(start + _CHUNK, part.stop))
                factor = products if squares else vectors
                terms = factor[:, chunk].double() * products[:, chunk]
                found[:, column] += terms.sum(dim=1).cpu().numpy()
        return found

    return sums


def quantile(samples: int) -> float:
    """Return how many standard errors of a mean its 95 % interval goes to either side (Student's t)."""
    return float(scipy.special.stdtrit(samples - 1, 1.0 - RISK / 2.0)) if samples > 1 else math.inf


def estimate_of(sampling: DeflatedSampling, epsilon: float, parts: slice | int = slice(None)) -> SampledEstimate:
    """Return the estimate of a sum, or of all sums together, that the samples so far give."""
    samples = sampling.samples[:, parts].reshape(len(sampling.samples), -1).sum(axis=1)
    inside, magnitude = float(np.sum(sampling.inside[parts])), float(np.sum(sampling.rounded[parts]))
    count = len(samples)
    error = float(samples.std(ddof=1)) / math.sqrt(count) if count > 1 else math.inf
    value = inside + float(samples.mean())
    half = quantile(count) * error + ROUNDING * epsilon * (magnitude + float(np.abs(samples).mean()))
    return SampledEstimate(
        value,
        value - half,
        value + half,
        _method(sampling),
        standard_error=error,
        products=sampling.products,
        samples=count,
        deflated=len(sampling.deflation.basis),
    )


def samples_wanted(estimate: SampledEstimate, tolerance: float | None) -> float:
    """Return how many times as many samples would make an interval narrow enough; at most 1 where it is."""
    if tolerance is None:
        return math.inf
    half, allowed = (estimate.high - estimate.low) / 2.0, tolerance * abs(estimate.value)
    if half == 0.0:
        return 0.0
    return (half / allowed) ** 2 if allowed > 0.0 and half / allowed < math.inf else math.inf


def warn_of_width(what: str, error: float, factor: float, request: Request, sampling: DeflatedSampling) -> None:
    """Give a ToleranceWarning that an interval is wider than was asked for, and say what it would take."""
    assert request.tolerance is not None
    needed = sampling.deflation.products + math.ceil(sampling.drawn * min(factor, 1e12))
    cure = f"about {needed} products would do" if factor < 1e6 else "more products would hardly help"
    warnings.warn(
        f"the {what} is known to {error:.2g} of its value after {sampling.products} products, wanted "
        f"{request.tolerance:.2g}; {cure}: give max_products, or a wider tolerance (parts of both signs that cancel "
        "leave a value that is small next to them)",
        ToleranceWarning,
        stacklevel=5,
    )


def _method(sampling: DeflatedSampling) -> str:
    deflated = len(sampling.deflation.basis)
    name = f"Hutch++ with {deflated} directions deflated" if deflated else "Girard-Hutchinson, nothing deflated"
    if sampling.budget.rows < sampling.budget.products - sampling.budget.width:
        name += f" (memory for {sampling.budget.rows})"
    return f"95 % interval from {len(sampling.samples)} probes (Student's t) and rounding; {name}"
