"""Whether PyTorch's second derivative of a loss is the derivative of its first, which nothing else would notice.

A function that keeps an intermediate result of its forward pass, a kernel whose backward pass leaves no graph, or a
hook has right first derivatives and second ones that are not theirs, symmetric to the last bit. So the product with one
vector is compared with differences of gradients of one batch, parameter by parameter.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from hesd_fast.engine import cuda
from hesd_fast.engine.memory import MemoryWatch, available_memory, resident_memory
from hesd_fast.errors import HESDWarning, OperatorError, first_line
from hesd_fast.hvp.derivative_causes import Kinks, causes_of_wrong_derivatives, kinks_in, listed
from hesd_fast.hvp.differences import central_difference, lengths_of_weights, unit_step
from hesd_fast.hvp.second_derivatives import product_along_gradient
from hesd_fast.hvp.wide_loss import Parts, WideLoss, wide_bytes, widened
from hesd_fast.problem.loss_term import LossTerm
from hesd_fast.problem.parameters import norm_of
from hesd_fast.problem.prepared_problem import PreparedProblem

STEPS_IN_FLOAT64 = (1e-9, 1e-8, 1e-7)
"""Lengths of steps in float64, relative to the norm of the weights.

So short that hardly a unit passes its kink, and rounding is still far below the differences.
"""

LONG_STEPS = (3e-3, 1e-3, 3e-4)
"""The same where float64 cannot be had."""

ROUNDING = 16.0
"""Product along a vector of the weights' length, in machine epsilons of the loss, that is nothing but rounding."""

GRADIENT_ROUNDING = 64.0
"""Error of a gradient that is rounding, in machine epsilons of its norm."""

ALLOWED_IN_FLOAT64, ALLOWED_WITH_LONG_STEPS = (2e-5, 1e-6), (2e-2, 1e-3)
"""Deviation relative to a parameter's part of the product, and to the whole product, that is no deviation."""

CONSISTENT = 1e-2
"""Difference of two steps' results, relative to how far both are from the product, at which the product is wrong."""

CLEARLY_WRONG = 0.1
"""The same of steps in float32, and how far the product must be off there, relative to its norm."""

LEAST_COARSE = 1e-3
"""Relative difference of a loss in float64 from that in the model's precision that says nothing."""


@dataclass(frozen=True)
class DerivativeCheck:
    """What the comparison found.

    Attributes
    ----------
    agrees : bool or None
        Whether products are derivatives of gradients; None where it could not be told, as among many kinks in float32.
    detail : str
        What was compared, and how far apart it is; where they disagree, likely causes and what to do.
    """

    agrees: bool | None
    detail: str


@dataclass(frozen=True)
class GraphBytes:
    """What the graph of the first batch takes in the model's own precision, as far as the system tells."""

    bytes: int


class _WarningGiven:
    """That a warning of wrong derivatives has been given."""


def check_derivatives(problem: PreparedProblem) -> DerivativeCheck:
    """Compare the product of the first batch's Hessian and one vector with differences of gradients, once a problem.

    Cost: a product and two to six gradients of one batch in float64.

    Raises
    ------
    OperatorError
        If an operation of model or loss has no second derivative.
    """
    found = problem.finding(DerivativeCheck)
    if found is None:
        term = problem.first_term()
        with MemoryWatch() as watch:
            before = resident_memory() or 0
            direction, product = product_along_gradient(problem, term)
            graph_bytes = max((watch.peak() or before) - before, 0)
        with _without_warnings():
            found = _Comparison(problem, term, direction, problem.unflatten(product), graph_bytes).run()
        problem.keep_finding(found)
        problem.keep_finding(GraphBytes(graph_bytes))
    return found


def warn_of_wrong_derivatives(problem: PreparedProblem) -> None:
    """Warn, once a problem, where second derivatives are not those of the first ones; the check must have been made."""
    found = problem.finding(DerivativeCheck)
    if found is not None and found.agrees is False and problem.finding(_WarningGiven) is None:
        problem.keep_finding(_WarningGiven())
        warnings.warn(found.detail, HESDWarning, stacklevel=2)


class _Comparison:
    """Compares a product with differences of gradients, in float64 whatever the model's precision, if that can be."""

    def __init__(
        self, problem: PreparedProblem, term: LossTerm, direction: Tensor, product: Parts, graph_bytes: int
    ) -> None:
        self.problem, self.term, self.direction, self.product = problem, term, direction, product
        self.graph_bytes = graph_bytes
        self.unit = unit_step(lengths_of_weights(problem), problem.unflatten(direction))

    def run(self) -> DerivativeCheck:
        """Return what is found; whatever fails where weights are moved or precision is another one says nothing."""
        if self.unit == 0.0:
            return DerivativeCheck(None, "every parameter is a row of padding, which has no derivative")
        if not all(bool(torch.isfinite(part).all()) for part in self.product):
            return DerivativeCheck(None, "the product is not finite")  # the operator names the place
        try:
            found = self._in_float64()
            if isinstance(found, DerivativeCheck):
                return found
            cuda.runtime.release_unused()  # after the error, whose frames hold what was made
            return self._with_long_steps(found)
        except Exception as error:
            return DerivativeCheck(
                None, f"the loss cannot be computed where the weights are moved a little: {first_line(error)}"
            )

    def _difference(self, step: float) -> Parts:
        found = central_difference(self.problem, self.term, self.direction, step * self.unit)
        return self.problem.unflatten(found)

    def _is_rounding(self, found: Parts) -> bool:
        """Whether a product and a difference are both so small that they may be nothing but rounding of the loss."""
        loss = abs(self.term.first_value)
        noise = ROUNDING * self.problem.epsilon * loss / (self.unit * self.unit * norm_of([self.direction]))
        return norm_of(self.product) + norm_of(found) <= noise

    def _in_float64(self) -> DerivativeCheck | str:
        """Compare in float64; or return why that cannot be done."""
        try:
            wide = _LossAlong(self.problem, self.term, self.direction, self.unit, self.graph_bytes)
            found = wide.difference(STEPS_IN_FLOAT64[0])
            if self._is_rounding(found):
                return _agreement(self.product, found, "float64")
            return self._with_short_steps(wide, wide.product(self.product), found)
        except Exception as error:  # whatever code says that takes its own precision only
            return first_line(error)

    def _with_short_steps(self, wide: _LossAlong, product: Parts, found: Parts) -> DerivativeCheck:
        """One step that agrees decides; two that agree with each other, and not with the product, condemn it."""
        for step in (None, *STEPS_IN_FLOAT64[1:]):
            previous, found = found, found if step is None else wide.difference(step)
            off = _deviating(product, found, *ALLOWED_IN_FLOAT64)
            off = {i for i in off if norm_of([found[i] - product[i]]) > wide.rounding}
            if not off:
                return _agreement(product, found, "float64")
            # A unit that sits on its kink has another derivative on either side, whatever the step.
            consistent = _consistent(previous, found, product, CONSISTENT)
            consistent &= _consistent(*wide.sides, product, CONSISTENT)
            if step is not None and off & consistent:
                return self._disagreement(product, found, previous, off & consistent)
        return DerivativeCheck(
            None,
            "differences of gradients do not settle to anything to compare products with, as where a batch sits on "
            "kinks of the loss",
        )

    def _with_long_steps(self, reason: str) -> DerivativeCheck:
        """Compare in the model's own precision, where only smooth losses can be told from wrong derivatives."""
        unclear = DerivativeCheck(None, f"products could not be compared with gradients in float64: {reason}")
        kinks = kinks_in(self.term)
        if self.problem.epsilon > torch.finfo(torch.float32).eps or kinks is Kinks.SOME:
            return unclear
        found = [self._difference(step) for step in LONG_STEPS]
        if max(norm_of(one) for one in (self.product, *found)) < torch.finfo(torch.float32).tiny / self.problem.epsilon:
            return DerivativeCheck(None, "the numbers are near underflow; multiply the loss by a power of two")
        if any(not _deviating(self.product, one, *ALLOWED_WITH_LONG_STEPS) for one in found):
            return _agreement(self.product, found[-1], "float32")
        suspects = _deviating(self.product, found[1], CLEARLY_WRONG, CLEARLY_WRONG)
        for one, other in itertools.pairwise(found):
            suspects &= _consistent(one, other, self.product, CLEARLY_WRONG)
        if kinks is Kinks.UNKNOWN:  # where many average out; but a product of zero is one that was lost
            suspects = {i for i in suspects if not bool(self.product[i].any())}
        if not suspects or not _distance(found[1], found[0]) <= CLEARLY_WRONG:
            return unclear
        return self._disagreement(self.product, found[1], found[0], suspects)

    def _disagreement(self, product: Parts, found: Parts, other: Parts, suspects: set[int]) -> DerivativeCheck:
        names = listed(repr(name) for i, name in enumerate(self.problem.parameters) if i in suspects)
        causes = causes_of_wrong_derivatives(self.problem, self.term)
        return DerivativeCheck(
            False,
            f"PyTorch's second derivative of this loss is not the derivative of its first: on batch {self.term.index} "
            f"a product is {_distance(found, product):.2g} of its norm away from differences of gradients, which agree "
            f"with each other within {_distance(found, other):.1g} at two steps (in {names}). {causes} "
            "hvp='finite_differences' follows the first derivatives instead, where they are those of one function",
        )


def _agreement(product: Parts, found: Parts, precision: str) -> DerivativeCheck:
    return DerivativeCheck(
        True,
        f"a product is within {_distance(product, found):.2g} of its norm of differences of gradients, in {precision}",
    )


def _distance(wanted: Parts, found: Parts) -> float:
    """Return the distance of two vectors relative to the norm of the first, or of the other where that is zero."""
    norm = norm_of(wanted) or norm_of(found)
    return norm_of([a - b for a, b in zip(wanted, found, strict=True)]) / norm if norm else 0.0


def _deviating(product: Parts, found: Parts, own: float, whole: float) -> set[int]:
    """Return the positions of the parameters whose parts differ; what is not finite differs."""
    floor = whole * norm_of(product)
    return {
        i
        for i, (a, b) in enumerate(zip(product, found, strict=True))
        if not norm_of([a - b]) <= own * max(norm_of([a]), norm_of([b])) + floor
    }


def _consistent(one: Parts, other: Parts, product: Parts, share: float) -> set[int]:
    """Return the positions where two differences are much nearer to each other than to the product."""
    return {
        i
        for i, (a, b, p) in enumerate(zip(one, other, product, strict=True))
        if norm_of([a - b]) <= share * min(norm_of([a - p]), norm_of([b - p]))
    }


class _LossAlong:
    """One batch's loss in float64, at weights that are moved along a direction.

    Raises
    ------
    OperatorError
        If the memory does not suffice, or the loss or its product is another one then.
    """

    def __init__(
        self, problem: PreparedProblem, term: LossTerm, direction: Tensor, unit: float, graph_bytes: int
    ) -> None:
        available = available_memory(problem.device)
        if available is not None and wide_bytes(problem, graph_bytes) > available // 2:
            raise OperatorError("there is not enough memory for that")
        self.wide, self.term, self.unit = WideLoss(problem), term, unit
        self.direction = [widened(part) for part in problem.unflatten(direction)]
        self._coarse = max(problem.epsilon**0.5, LEAST_COARSE)

    def difference(self, step: float) -> Parts:
        """Return the central difference of the gradient along the direction."""
        self._ends = [self._gradient(sign * step * self.unit) for sign in (-1.0, 1.0)]
        self._length = step * self.unit
        return [(ahead - behind) / (2.0 * self._length) for behind, ahead in zip(*self._ends, strict=True)]

    @property
    def rounding(self) -> float:
        """What the rounding of gradients may do to the last difference."""
        return GRADIENT_ROUNDING * torch.finfo(torch.float64).eps * max(map(norm_of, self._ends)) / self._length

    @property
    def sides(self) -> tuple[Parts, Parts]:
        """Return the two one-sided differences of the last step; the product must have been made."""
        behind, ahead = self._ends
        return (
            [(here - there) / self._length for here, there in zip(self._at_rest, behind, strict=True)],
            [(there - here) / self._length for here, there in zip(self._at_rest, ahead, strict=True)],
        )

    def product(self, coarse: Parts) -> Parts:
        """Return the exact product, that of the model's own precision being ``coarse``."""
        gradient = self._gradient(0.0, create_graph=True)
        product = self.wide.multiply(gradient, self.direction)
        self._at_rest = [entry.detach() for entry in gradient]
        if _distance(product, [widened(part) for part in coarse]) > 16 * self._coarse:
            raise OperatorError("the product is another one then")
        return product

    def _gradient(self, step: float, create_graph: bool = False) -> Parts:
        self.wide.move([step * part for part in self.direction] if step else None)
        loss, term = self.wide.evaluate(self.term), self.term
        gradient = self.wide.gradient(loss, create_graph)
        value, wanted = float(loss.detach()), term.first_value
        if step == 0.0 and not abs(value - wanted) <= self._coarse * abs(wanted) + self._coarse**2:
            raise OperatorError(f"the loss of batch {term.index} is {value!r} then, and not {wanted!r}")
        return gradient


@contextmanager
def _without_warnings() -> Iterator[None]:
    """Leave out warnings of the user's code, which the run itself gives."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
