"""The names that options take. What they stand for needs PyTorch; ``hesd --help`` does not."""

from __future__ import annotations

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
