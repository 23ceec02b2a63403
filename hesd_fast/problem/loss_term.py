"""One batch's part of a loss."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

from torch import Tensor

from hesd_fast.problem.evaluation import ProblemEvaluation


class LossTerm:
    """One batch's part of the loss, which is L = sum over terms of ``weight`` times ``evaluate()``.

    Parameters
    ----------
    problem : ProblemEvaluation
        What evaluates it.
    check : callable, optional
        Is given index and value as soon as there is one.

    Attributes
    ----------
    index : int
        Position of the batch in the data.
    batch : Any
        The batch itself.
    weight : float
        Share of the batch: count / total count for a mean loss, 1 / total count for a ``(sum, count)`` loss.
    first_value : float
        The batch's loss at the first pass.
    value : tensor or None
        The last one, without its graph.
    """

    def __init__(
        self,
        problem: ProblemEvaluation,
        index: int,
        batch: Any,
        weight: float,
        first_value: float,
        check: Callable[[list[tuple[int, Tensor]]], None] | None = None,
    ) -> None:
        self._problem = problem
        self._check = check
        self.index = index
        self.batch = batch
        self.weight = weight
        self.first_value = first_value
        self.value: Tensor | None = None

    def evaluate(self) -> Tensor:
        """Return the batch's loss, a scalar with its graph; cost: one forward pass.

        Raises
        ------
        OperatorError
            If the loss is not that of the first pass: now for a term of :meth:`PreparedProblem.first_term`, else at
            the end of the pass.
        """
        loss = self.evaluate_moved()
        self.note(loss)
        return loss

    def note(self, value: Tensor) -> None:
        """Take a value of the loss that was computed in another way, to be compared with that of the first pass."""
        self.value = value.detach()
        if self._check is not None:
            self._check([(self.index, self.value)])

    def evaluate_moved(self) -> Tensor:
        """Return the batch's loss where the caller has moved the weights; it is not compared with that of before."""
        return self._problem.batch_loss(self.index, self.batch)[0]

    def evaluate_at(self, weights: Sequence[Tensor]) -> Tensor:
        """Return the batch's loss with other tensors in the place of the selected parameters.

        For function transforms of PyTorch, whose tensors must not outlive them: :meth:`note` is left to the caller. A
        loss that requires gradients outside of the transform has reached a parameter by another way than its module.
        """
        with self._problem.replaced(weights):
            return self.evaluate_moved()

    def outputs(self, weights: Sequence[Tensor] | None = None) -> Any:
        """Return what ``loss.outputs(model, batch)`` does, with other tensors as the selected parameters if given."""
        problem = self._problem
        with nullcontext() if weights is None else problem.replaced(weights):
            return problem.call(problem.loss.outputs, self.index, self.batch)  # type: ignore[attr-defined]
