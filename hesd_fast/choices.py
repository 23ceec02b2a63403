"""The names that options take. What they stand for needs PyTorch; ``hesd --help`` does not."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

REORTHOGONALIZATIONS = ("full", "partial", "window", "none")
GROUPINGS = ("modules", "parameters")
OPERATORS = ("hessian", "gauss_newton", "empirical_fisher")
PROTOCOLS = ("lla",)
BASIS_DTYPES = ("float64", "float32", "bfloat16", "float16")
STRATEGIES = (
    "double_backward",
    "double_backward_batched",
    "kept_graph",
    "kept_graph_batched",
    "forward_over_reverse",
    "compiled",
    "finite_differences",
    "forward_differences",
)


def is_one_of(value: Any, names: Iterable[str]) -> bool:
    """Whether an option is one of some names, also where it is of a type that cannot be looked up."""
    return isinstance(value, str) and value in names
