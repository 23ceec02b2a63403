"""What a run will take, before it begins."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

from hesd_fast.analysis.whole_spectrum import basis_for, memory_for_products, most_panels, most_products, settings
from hesd_fast.engine.memory import peak_memory
from hesd_fast.errors import ProblemError
from hesd_fast.hvp.planner import ProductPlan, choose
from hesd_fast.lanczos.basis_storage import BasisPlan
from hesd_fast.lanczos.lanczos_run import WORKING_BLOCKS
from hesd_fast.lanczos.options import check_options
from hesd_fast.operators.linearity_check import CHECK_VECTORS
from hesd_fast.problem.problem import Problem


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
    peak_bytes : int or None
        Predicted peak of the process's memory, with what the process holds already; None where the system does not say.
        A basis on disk is not counted: its pages are in memory as long as nothing else needs the space.
    """

    products: ProductPlan
    hvps: int
    basis: BasisPlan
    working_bytes: int
    peak_bytes: int | None

    @property
    def seconds(self) -> float:
        """Predicted for all products; orthogonalization comes on top."""
        return self.products.seconds

    def __str__(self) -> str:
        basis = f"{self.basis.rows} vectors, {self.basis.bytes / 2**20:.4g} MiB of {self.basis.place}"
        lines = [f"{self.products}", f"basis: {basis}, and {self.working_bytes / 2**20:.4g} MiB for the blocks at work"]
        if self.peak_bytes is not None:
            lines.append(f"peak memory of the process: about {self.peak_bytes / 2**20:.4g} MiB")
        return "\n".join(lines)


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
    block = int(chosen.block_size)
    where = basis_for(problem, problem.size, chosen, basis, basis_dtype)
    strategy, products = choose(
        problem.prepare(),
        block,
        most_panels(problem.size, chosen),
        memory_limit=memory_for_products(problem, where, block),
    )
    strategy.release()
    hvps = most_products(problem.size, chosen)
    working = WORKING_BLOCKS * block * problem.size * problem.dtype.itemsize
    return RunPlan(products, hvps, where, working, _peak_bytes(products, where, working, problem))


def _peak_bytes(products: ProductPlan, basis: BasisPlan, working: int, problem: Problem) -> int | None:
    """Return the predicted peak: when the basis is full, or before, when strategies are tried and products checked."""
    if products.peak_bytes is None:
        return None
    in_memory = basis.bytes if basis.place == "memory" else 0
    first = CHECK_VECTORS * problem.size * problem.dtype.itemsize
    return max(products.peak_bytes + working + max(in_memory, first), peak_memory())
