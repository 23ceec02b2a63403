"""Products from differences of gradients: not exact, so the error is measured before the first one."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from hesd_fast.errors import OperatorError
from hesd_fast.hvp.base import Parts, Strategy, Vectors, with_row
from hesd_fast.hvp.derivative_check import check_derivatives
from hesd_fast.hvp.differences import Moved, gradient_at, lengths_of_weights, quotient, unit_step
from hesd_fast.hvp.second_derivatives import (
    Gradient,
    clear_padding,
    direction_with,
    padded_rows,
    padding_with_other_uses,
    product_along_gradient,
    product_with,
)
from hesd_fast.problem.loss_term import LossTerm
from hesd_fast.problem.parameters import norm_of
from hesd_fast.problem.prepared_problem import PreparedProblem

TOLERANCE = 0.01
"""Largest measured error, relative to the norm of the product, at which finite differences are used."""

STEPS = tuple(10.0**exponent for exponent in (-1, -1.5, -2, -2.5, -3, -3.5, -4, -5, -6, -7))
"""Lengths of steps tried, relative to the norm of the weights."""

STEP_RATIO = 10.0**0.5
"""A longer step to compare with, where there is no exact product."""


class FiniteDifferences(Strategy):
    """Central differences, H v = (g(w + h v) - g(w - h v)) / 2 h: two gradients a vector.

    Only for smooth losses, and for models without a second derivative, or one that is not that of their gradients. The
    step is the one of :data:`STEPS` with the smallest error on the first batch, against an exact product or, where
    there is none to be trusted, against the step before. What is divided by is the step that rounding has left. The
    weights are moved where they lie, and put back bit for bit. Memory: a copy of the weights and two gradients.

    Attributes
    ----------
    step : float
        Length of the steps, relative to the norm of the weights.
    error : float
        What was measured, relative to the norm of the product.
    """

    name = "finite_differences"
    exact = False

    def prepare(self, problem: PreparedProblem) -> None:
        """Take a problem and choose the step.

        Raises
        ------
        OperatorError
            If the smallest error is above the tolerance.
        """
        self.problem = problem
        if (tied := padding_with_other_uses(problem)) is not None:
            raise OperatorError(
                f"finite differences cannot hold the row of padding of {tied!r} in the embedding and move it in the "
                "other layer that has this weight; use hvp='double_backward', or leave it out of the selection"
            )
        self._lengths, self._padded = lengths_of_weights(problem), padded_rows(problem)
        self.step, self.error = 0.0, float("inf")
        with problem.session():
            term = problem.first_term()
            direction, exact = self._direction_and_product(term)
            previous, any_curvature = exact, False
            for step in STEPS:
                found = self._difference(term, direction, step)
                any_curvature = any_curvature or bool(found.any())
                if previous is not None and (error := _relative_error(found, previous)) < self.error:
                    self.step, self.error = step, error
                previous = found if exact is None else exact
            if not any_curvature and (exact is None or not bool(exact.any())):
                self.step, self.error = STEPS[-1], 0.0
            if self.error <= TOLERANCE:
                self.error = max(self.error, self._error_elsewhere(term, direction, exact is not None))
        if not self.error <= TOLERANCE:
            against = "an exact product" if exact is not None else "a second step size"
            raise OperatorError(
                f"finite differences are off by {self.error:.2g} of the product's norm at their best step, against "
                f"{against}; at most {TOLERANCE:g} is allowed. Use hvp='double_backward' where the model has second "
                "derivatives, float64, or smooth activations"
            )

    def products(self, term: LossTerm, rows: Vectors) -> Iterator[tuple[int, Parts]]:
        """Yield one product after the other."""
        for j, row in enumerate(rows):
            product = self._difference(term, self.problem.flatten(row), self.step)
            yield j, with_row(list(enumerate(self.problem.unflatten(product))))

    def _direction_and_product(self, term: LossTerm) -> tuple[Tensor, Tensor | None]:
        """Return what steps are tried along, and the exact product with it, if there is one that can be trusted."""
        try:
            direction, product = product_along_gradient(self.problem, term)
        except OperatorError:
            return direction_with(self.problem, Gradient.first_order(self.problem, term.evaluate())), None
        trusted = bool(torch.isfinite(product).all()) and check_derivatives(self.problem).agrees is not False
        return direction, product if trusted else None

    def _error_elsewhere(self, term: LossTerm, direction: Tensor, trusted: bool) -> float:
        """Return the error along an arbitrary direction, relative to the curvature along the one that steps were tried.

        Where kinks are passed, differences may be right along one direction and not along another.
        """
        other = direction_with(self.problem, torch.zeros_like(direction))
        found = self._difference(term, other, self.step)
        if trusted:
            reference = product_with(self.problem, term, other)
        else:
            reference = self._difference(term, other, self.step * STEP_RATIO)
        scale = norm_of([self._difference(term, direction, self.step)]) * norm_of([other]) / norm_of([direction])
        difference = norm_of([found - reference])
        if scale == 0.0:
            return 0.0 if difference == 0.0 else float("inf")
        return difference / scale

    def _difference(self, term: LossTerm, direction: Tensor, relative: float) -> Tensor:
        # To autograd a row of padding is a constant, which differences must not move.
        direction = clear_padding(self.problem, direction.clone(), self._padded)
        if not bool(direction.any()):
            return torch.zeros_like(direction)
        if not math.isfinite(norm_of([direction])):
            return torch.full_like(direction, torch.nan)  # the operator names the place
        step = relative * unit_step(self._lengths, self.problem.unflatten(direction))
        behind, ahead = (self._gradient(term, direction, sign * step) for sign in self._signs())
        return quotient(behind, ahead)

    def _signs(self) -> tuple[float, float]:
        return -1.0, 1.0

    def _gradient(self, term: LossTerm, direction: Tensor, step: float) -> Moved:
        return gradient_at(self.problem, term, direction, step)


class ForwardDifferences(FiniteDifferences):
    """One-sided differences, H v = (g(w + h v) - g(w)) / h, with g(w) kept: one gradient a vector.

    Half the work of :class:`FiniteDifferences`, and an error that falls with h instead of its square. Memory: one
    gradient a batch.
    """

    name = "forward_differences"
    family = "forward_differences"

    def _signs(self) -> tuple[float, float]:
        return 0.0, 1.0

    def _gradient(self, term: LossTerm, direction: Tensor, step: float) -> Moved:
        if step != 0.0:
            return super()._gradient(term, direction, step)
        if term.index not in self._kept:
            gradient = Gradient.first_order(self.problem, term.evaluate())
            if not self.may_keep(term, [gradient]):
                return Moved(gradient, 0.0)
            self._kept[term.index] = gradient
        return Moved(self._kept[term.index], 0.0)


def _relative_error(found: Tensor, reference: Tensor) -> float:
    """Return how far a product is from another, relative to that one's norm; infinite where this says nothing.

    Two zeros say nothing: both steps may be so long that the loss is flat there.
    """
    scale = norm_of([reference])
    error = norm_of([found - reference]) / scale if scale > 0.0 else float("inf")
    return error if error == error else float("inf")  # not a number
