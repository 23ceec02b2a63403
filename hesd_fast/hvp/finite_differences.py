"""Products from differences of gradients: not exact, so the error is measured before the first one."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from hesd_fast.autograd_graph import graph_nodes
from hesd_fast.errors import OperatorError
from hesd_fast.hvp.base import Parts, Strategy, Vectors, vectors_of, with_row
from hesd_fast.hvp.second_derivatives import Gradient, check_second_derivatives
from hesd_fast.problem import LossTerm, Problem

TOLERANCE = 0.01
"""Largest measured error, relative to the norm of the product, at which finite differences are used."""

STEPS = tuple(10.0**exponent for exponent in (-1, -1.5, -2, -2.5, -3, -3.5, -4, -5, -6, -7))
"""Lengths of steps tried, relative to the norm of the weights."""


class FiniteDifferences(Strategy):
    """Central differences, H v = (g(w + h v) - g(w - h v)) / 2 h: two gradients a vector.

    Only for smooth losses, and for models without a second derivative. The step is the one of :data:`STEPS` with the
    smallest error on the first batch, against an exact product or, where there is none, against the step before. What
    is divided by is the step that rounding has left. For weights that all have one dtype; memory: two copies of them.

    Attributes
    ----------
    step : float
        Length of the steps, relative to the norm of the weights.
    error : float
        What was measured, relative to the norm of the product.
    """

    name = "finite_differences"
    exact = False

    def prepare(self, problem: Problem) -> None:
        """Prepare the problem and choose the step.

        Raises
        ------
        ProblemError
            If the problem cannot be used.
        OperatorError
            If the smallest error is above the tolerance.
        """
        problem.prepare()
        self.problem = problem
        self.step, self.error = 0.0, float("inf")
        with problem.session():
            term = self.first_term()
            generator = torch.Generator().manual_seed(0)
            # An arbitrary direction has next to no curvature; that of the gradient has much, and differences see it.
            gradient = Gradient.first_order(problem, term.evaluate())
            noise = torch.randn(problem.size, dtype=problem.dtype, generator=generator, device="cpu")
            noise = noise.to(problem.device)
            direction = gradient / _norm(gradient) + noise / _norm(noise) if _norm(gradient) > 0 else noise
            exact = self._exact(term, direction)
            previous: Tensor | None = None
            for step in STEPS:
                found = self._difference(term, direction, step)
                reference = exact if exact is not None else previous
                previous = found
                if reference is None or not bool(torch.isfinite(found).all()):
                    continue
                scale = _norm(reference)
                error = _norm(found - reference) / scale if scale > 0 else 0.0
                if error < self.error:
                    self.step, self.error = step, error
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

    def _difference(self, term: LossTerm, direction: Tensor, relative: float) -> Tensor:
        parameters = [parameter.detach() for parameter in self.problem.parameters.values()]
        weights = self.problem.flatten(parameters)
        length = _norm(direction)
        if length == 0.0:
            return torch.zeros_like(direction)
        step = relative * max(_norm(weights), 1.0) / length
        ends = []
        for sign in self._signs():
            moved = [
                w.clone() if sign == 0.0 else (w.to(v.dtype) + sign * step * v).to(w.dtype)
                for w, v in zip(parameters, self.problem.unflatten(direction), strict=True)
            ]
            ends.append((self.problem.flatten(moved), self._gradient(term, moved, at_rest=sign == 0.0)))
        (start, gradient), (end, other) = ends
        # Rounding to the weights' precision has turned the step; its part along the direction is what was gone.
        realised = float(torch.dot((end - start).double(), direction.double())) / length**2
        if realised == 0.0:
            return torch.full_like(direction, torch.nan)
        return (other - gradient) / realised

    def _signs(self) -> tuple[float, float]:
        return -1.0, 1.0

    def _gradient(self, term: LossTerm, weights: list[Tensor], at_rest: bool) -> Tensor:  # noqa: ARG002
        leaves = [weight.requires_grad_() for weight in weights]
        loss = term.evaluate_at(leaves)
        selected = {id(parameter) for parameter in self.problem.parameters.values()}
        for node in graph_nodes([loss.grad_fn]):
            if id(getattr(node, "variable", None)) in selected:
                raise OperatorError(
                    f"hvp={self.name!r} cannot move the weights of this model: it reaches a selected parameter by "
                    "another way than its module's attribute, as through a list; use hvp='double_backward'"
                )
        return Gradient.first_order(self.problem, loss, leaves)

    def _exact(self, term: LossTerm, direction: Tensor) -> Tensor | None:
        try:
            check_second_derivatives(self.problem, term)
        except OperatorError:
            return None
        (vector,) = vectors_of(self.problem, direction[None])
        parts = dict(Gradient.of(self.problem, term.evaluate()).multiply(vector, False))
        zeros = (torch.zeros_like(part) for part in vector)
        return self.problem.flatten([parts.get(i, zero).to_dense() for i, zero in enumerate(zeros)])


class ForwardDifferences(FiniteDifferences):
    """One-sided differences, H v = (g(w + h v) - g(w)) / h, with g(w) kept: one gradient a vector.

    Half the work of :class:`FiniteDifferences`, and an error that falls with h instead of its square. Memory: one
    gradient a batch.
    """

    name = "forward_differences"
    family = "forward_differences"

    def _signs(self) -> tuple[float, float]:
        return 0.0, 1.0

    def _gradient(self, term: LossTerm, weights: list[Tensor], at_rest: bool) -> Tensor:
        if not at_rest:
            return super()._gradient(term, weights, at_rest)
        if term.index in self._kept:
            kept: Tensor = self._kept[term.index]
            return kept
        gradient = super()._gradient(term, weights, at_rest)
        if self.may_keep(term, [gradient]):
            self._kept[term.index] = gradient
        return gradient


def _norm(vector: Tensor) -> float:
    return float(torch.linalg.vector_norm(vector, dtype=torch.float64))
