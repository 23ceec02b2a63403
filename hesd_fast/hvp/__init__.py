"""Strategies: ways to multiply a panel by the Hessian of a problem."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from hesd_fast.hvp.double_backward import DoubleBackward
from hesd_fast.problem import Problem

__all__ = ["DoubleBackward", "Strategy"]


class Strategy(Protocol):
    """One way to compute Hessian-vector products.

    Attributes
    ----------
    name : str
        How reports call the strategy.
    """

    name: str

    def prepare(self, problem: Problem) -> None:
        """Check, before any long work, that the strategy can serve the problem; called once."""

    def apply(self, panel: Tensor, out: Tensor) -> None:
        """Overwrite row j of ``out`` (b, n) by H times row j of ``panel`` (b, n)."""
