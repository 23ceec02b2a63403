"""The Hessian of a problem's loss."""

from __future__ import annotations

import torch
from torch import Tensor

from hesd_fast.errors import OperatorError
from hesd_fast.hvp import DoubleBackward
from hesd_fast.operators.base import OperatorBase
from hesd_fast.problem import Problem


class HessianOperator(OperatorBase):
    """The exact Hessian of the loss with respect to the selected parameters, one column per parameter element.

    The problem is prepared at the first product. Each call borrows the model and gives it back; a caller with many
    products may hold ``problem.session()`` around them, which saves that.

    Parameters
    ----------
    problem : Problem
        The loss to differentiate.
    compensated : bool
        Carry the rounding errors of adding up the batches (two-sum); costs a panel of memory.
    """

    def __init__(self, problem: Problem, compensated: bool = False) -> None:
        if not isinstance(problem, Problem):
            raise OperatorError(
                f"HessianOperator got {type(problem).__name__}; give a Problem, as in Problem(model, loss, data)"
            )
        super().__init__(problem.size, problem.dtype, problem.device)
        self.problem = problem
        self.strategy = DoubleBackward(compensated)
        self._is_prepared = False

    @property
    def epsilon(self) -> float:
        """Machine epsilon of the coarsest selected parameter, which limits the accuracy of the products."""
        return max(torch.finfo(parameter.dtype).eps for parameter in self.problem.parameters.values())

    def describe(self, column: int) -> str:
        """Return the name of the parameter that a column belongs to."""
        return f"column {column} (parameter {self.problem.describe(column)!r})"

    def _multiply(self, panel: Tensor, out: Tensor) -> None:
        with self.problem.session():
            if not self._is_prepared:
                self.strategy.prepare(self.problem)
                self._is_prepared = True
            self.strategy.apply(panel, out)
