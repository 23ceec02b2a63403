"""What a run will take, before it begins."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

from hesd_fast.analyze import memory_for_products, settings
from hesd_fast.basis import BasisPlan
from hesd_fast.errors import ProblemError
from hesd_fast.hvp.planner import ProductPlan, choose
from hesd_fast.lanczos import check_options, plan_blocks
from hesd_fast.problem import Problem
from hesd_fast.tridiagonal import ORTHOGONAL_MODES


@dataclass(frozen=True)
class RunPlan:
    """What :func:`~hesd_fast.analyze` would do.

    Attributes
    ----------
    products : ProductPlan
        How products would be made, and the strategies tried.
    hvps : int
        Hessian-vector products at most.
    basis : BasisPlan
        Where the Lanczos vectors would lie.
    working_bytes : int
        Of the blocks at work.
    """

    products: ProductPlan
    hvps: int
    basis: BasisPlan
    working_bytes: int

    @property
    def seconds(self) -> float:
        """Predicted for all products; orthogonalization comes on top."""
        return self.products.seconds

    def __str__(self) -> str:
        basis = f"{self.basis.rows} vectors, {self.basis.bytes / 2**20:.4g} MiB of {self.basis.place}"
        return f"{self.products}\nbasis: {basis}, and {self.working_bytes / 2**20:.4g} MiB for the blocks at work"


def plan(
    problem: Problem,
    *,
    block_size: int | str = "auto",
    max_steps: int | None = None,
    reorthogonalization: str | None = None,
    basis: str | os.PathLike[str] = "auto",
    basis_dtype: str | torch.dtype = "auto",
    protocol: str | None = None,
) -> RunPlan:
    """Predict the products, seconds and bytes of :func:`~hesd_fast.analyze` with the same options.

    Strategies for products are tried on the first batch; that takes about a twentieth of the predicted run. Nothing is
    kept of it.

    Raises
    ------
    ProblemError, OperatorError
        If the problem or an option cannot be used.
    PlanError
        If the basis does not fit.
    """
    if not isinstance(problem, Problem):
        raise ProblemError(f"plan got {type(problem).__name__}; give a Problem, as in Problem(model, loss, data)")
    chosen = settings(problem.size, block_size, max_steps, reorthogonalization, protocol)
    check_options(problem.size, chosen.max_steps, chosen.block_size, chosen.reorthogonalization, seed=0)
    steps, block = int(chosen.max_steps), int(chosen.block_size)
    where = plan_blocks(problem, steps, block, chosen.reorthogonalization, chosen.window, basis, basis_dtype)
    strategy, products = choose(
        problem, block, steps, memory_limit=memory_for_products(problem, chosen, where.dtype.itemsize)
    )
    strategy.release()
    hvps = steps * block
    if chosen.reorthogonalization in ORTHOGONAL_MODES:
        hvps = min(hvps, problem.size)
    return RunPlan(products, hvps, where, 3 * block * problem.size * problem.dtype.itemsize)
