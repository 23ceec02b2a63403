"""Strategies: ways to multiply a panel by the Hessian of a problem."""

from hesd_fast.hvp.base import Strategy
from hesd_fast.hvp.compiled import Compiled
from hesd_fast.hvp.finite_differences import FiniteDifferences, ForwardDifferences
from hesd_fast.hvp.forward_over_reverse import ForwardOverReverse
from hesd_fast.hvp.reverse_over_reverse import DoubleBackward, DoubleBackwardBatched, KeptGraph, KeptGraphBatched

STRATEGIES: dict[str, type[Strategy]] = {
    strategy.name: strategy
    for strategy in (
        DoubleBackward,
        DoubleBackwardBatched,
        KeptGraph,
        KeptGraphBatched,
        ForwardOverReverse,
        Compiled,
    )
}
"""Every exact strategy by name."""

ALL_STRATEGIES: dict[str, type[Strategy]] = STRATEGIES | {
    strategy.name: strategy for strategy in (FiniteDifferences, ForwardDifferences)
}
"""The exact ones, and those that measure their error."""

__all__ = ["ALL_STRATEGIES", "STRATEGIES", "DoubleBackward", "Strategy"]
