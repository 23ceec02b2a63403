"""The Hessian of a problem's loss."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch
from torch import Tensor

from hesd_fast.choices import is_one_of
from hesd_fast.errors import HESDWarning, OperatorError
from hesd_fast.hvp import ALL_STRATEGIES, DoubleBackward, Strategy
from hesd_fast.hvp.base import Vectors, vectors_of
from hesd_fast.hvp.derivative_check import DerivativeCheck, warn_of_wrong_derivatives
from hesd_fast.hvp.planner import ProductPlan, choose, give_up
from hesd_fast.hvp.wide_loss import Parts, WideLoss
from hesd_fast.operators.base import ProblemOperator
from hesd_fast.problem.loss_term import LossTerm
from hesd_fast.problem.problem import Problem

S = TypeVar("S", bound=Strategy)

PANELS = 100
"""Panels that "auto" plans for by default."""


class HessianOperator(ProblemOperator):
    """The Hessian of the loss with respect to the selected parameters, one column per parameter element.

    The problem is prepared at the first product. Each call borrows the model and gives it back; a caller with many
    products may hold ``problem.session()`` around them, which saves that.

    Parameters
    ----------
    problem : Problem
        The loss to differentiate.
    compensated : bool
        Carry the rounding errors of adding up the batches (two-sum); costs a panel of memory.
    hvp : str
        How products are made: one of ``hesd_fast.hvp.STRATEGIES``, all exact; "auto" for the one that is fastest on
        this problem, found by trying them at the first product; or "finite_differences".
    panels : int
        Number of panels that "auto" plans for.
    memory_limit : int, optional
        Bytes that may be kept from one product to the next; None for no limit.

    Attributes
    ----------
    strategy : Strategy
        What makes the products; for "auto" set at the first one.
    plan : ProductPlan or None
        What "auto" found.

    Examples
    --------
    >>> import torch
    >>> import hesd_fast as hesd
    >>> data = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.zeros(2, 1)
    >>> loss = hesd.losses.supervised(torch.nn.MSELoss())
    >>> problem = hesd.Problem(torch.nn.Linear(2, 1, bias=False), loss, data)
    >>> hesd.HessianOperator(problem).matvec(torch.ones(2))
    tensor([1., 4.])
    """

    def __init__(
        self,
        problem: Problem,
        compensated: bool = False,
        hvp: str = "double_backward",
        panels: int = PANELS,
        memory_limit: int | None = None,
    ) -> None:
        super().__init__(problem)
        check_hvp(hvp)
        self.hvp = hvp
        self.panels = panels
        self.strategy: Strategy = ALL_STRATEGIES.get(hvp, DoubleBackward)(compensated, memory_limit)
        self.plan: ProductPlan | None = None
        self._is_prepared = False

    @property
    def method(self) -> str:
        """Return the name of the strategy."""
        return self.strategy.name

    @property
    def derivatives(self) -> DerivativeCheck | None:
        """Whether products are derivatives of gradients; None before the first one, and for finite differences."""
        return self.prepared.finding(DerivativeCheck) if self._is_prepared and self.strategy.exact else None

    def _multiply(self, panel: Tensor, out: Tensor) -> None:
        with self.prepared.session():
            if not self._is_prepared:
                self._prepare(len(panel))
            self.strategy = multiply_or_fall_back(self.strategy, self.hvp, lambda by: by.apply(panel, out))

    def release(self) -> None:
        """Let go of what is kept from one product to the next."""
        self.strategy.release()

    @property
    def not_comparable(self) -> str | None:
        """Why a comparison in another precision says nothing: finite differences have measured their larger errors."""
        return None if self.strategy.exact else "products are finite differences, see the check of these"

    def products_of(self, term: LossTerm, panel: Tensor) -> Tensor:
        """Return a batch's part of the products with the rows of a panel, by the run's strategy, in a session."""
        return self.strategy.products_alone(term, vectors_of(self.prepared, panel))

    def wide_products(self, loss: WideLoss, term: LossTerm, rows: Vectors) -> tuple[float, float, Iterator[Parts]]:
        """Return a batch's loss in a wide precision, its weight, and its products with some vectors."""
        return hessian_products(loss, term, rows)

    def _multiply_anew(self, panel: Tensor, out: Tensor) -> None:
        plain = DoubleBackward()
        plain.problem = self.prepared
        plain.apply(panel, out)

    def _prepare(self, block_size: int) -> None:
        if self.hvp == "auto":
            self.strategy, self.plan = choose(
                self.prepared,
                block_size,
                self.panels,
                compensated=self.strategy.compensated,
                memory_limit=self.strategy.memory_limit,
            )
        else:
            self.strategy.prepare(self.prepared)
        if self.strategy.exact:
            warn_of_wrong_derivatives(self.prepared)
        self._is_prepared = True


def hessian_products(loss: WideLoss, term: LossTerm, rows: Vectors) -> tuple[float, float, Iterator[Parts]]:
    """Return a batch's loss in a wide precision, its weight, and the products of its Hessian with some vectors."""
    value = loss.evaluate(term)
    gradient = loss.gradient(value, create_graph=True)

    def products() -> Iterator[Parts]:
        for j, row in enumerate(rows):
            yield loss.multiply(gradient, row, keep_graph=j + 1 < len(rows))

    return float(value.detach()), term.weight, products()


def multiply_or_fall_back(strategy: S, hvp: str, multiply: Callable[[S | DoubleBackward], None]) -> S | DoubleBackward:
    """Multiply by a strategy and return it; where "auto" chose it and it refuses a batch, by plain double backward.

    Trials see the first batch only. Whatever is wrong with the problem itself shows again.
    """
    try:
        multiply(strategy)
        return strategy
    except (OperatorError, torch.cuda.OutOfMemoryError) as error:
        if hvp != "auto" or strategy.name == DoubleBackward.name:
            raise
        reason = str(error)
    give_up(strategy)  # after the error, whose frames hold what the product had made
    plain = DoubleBackward(strategy.compensated)
    plain.prepare(strategy.problem)
    multiply(plain)
    warnings.warn(f"products are made by {plain.name!r} from here on: {reason}", HESDWarning, stacklevel=5)
    return plain


def check_hvp(hvp: str) -> None:
    """Raise an OperatorError for a strategy that does not exist."""
    if not is_one_of(hvp, ("auto", *ALL_STRATEGIES)):
        raise OperatorError(f"hvp is {hvp!r}; wanted 'auto' or one of {', '.join(map(repr, ALL_STRATEGIES))}")
