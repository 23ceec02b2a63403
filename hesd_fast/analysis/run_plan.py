"""What a run will take, decided before it begins; the run takes it from here."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from hesd_fast.analysis.settings import RunOptions
from hesd_fast.engine import kernels
from hesd_fast.engine.memory import one_look, peak_memory
from hesd_fast.errors import ProblemError
from hesd_fast.hvp.planner import ProductPlan, choose
from hesd_fast.lanczos.basis_storage import BasisPlan
from hesd_fast.lanczos.memory_budget import MemoryBudget, plan_memory
from hesd_fast.lanczos.options import LanczosSettings
from hesd_fast.operators.linearity_check import CHECK_VECTORS
from hesd_fast.problem.problem import Problem


@dataclass(frozen=True)
class RunPlan:
    """What :func:`~hesd_fast.analyze` does with the same options; :func:`~hesd_fast.plan` makes one.

    Attributes
    ----------
    settings : LanczosSettings
        Probes, steps, reorthogonalization, seed.
    memory : MemoryBudget
        Where the Lanczos vectors lie, and what is left for products.
    hvps, panels : int
        Hessian-vector products at most, and the panels that they come in.
    products : ProductPlan or None
        How products would be made, and the strategies tried; None where nothing was tried.
    peak_bytes : int or None
        Predicted peak of the process's memory, with what the process holds already; None where nothing was tried or the
        system does not say. A basis on disk is not counted: its pages are in memory as long as nothing else needs the
        space.

    Examples
    --------
    >>> import torch, hesd_fast as hesd
    >>> problem = hesd.Problem(torch.nn.Linear(20, 1), lambda model, x: model(x).square().mean(), torch.ones(8, 20))
    >>> run = hesd.plan(problem, max_steps=5)
    >>> run.hvps, run.basis.place, run.basis.rows
    (20, 'memory', 12)
    """

    settings: LanczosSettings
    memory: MemoryBudget
    hvps: int
    panels: int
    products: ProductPlan | None = None
    peak_bytes: int | None = None

    @property
    def basis(self) -> BasisPlan:
        """Where the Lanczos vectors lie that are not at work."""
        return self.memory.basis

    @property
    def working_bytes(self) -> int:
        """Of the blocks at work."""
        return self.memory.working_bytes

    @property
    def seconds(self) -> float:
        """Predicted for all products, NaN where nothing was tried; orthogonalization comes on top."""
        return float("nan") if self.products is None else self.products.seconds

    def __str__(self) -> str:
        basis = f"{self.basis.rows} vectors, {self.basis.bytes / 2**20:.4g} MiB of {self.basis.place}"
        lines = [f"basis: {basis}, and {self.working_bytes / 2**20:.4g} MiB for the blocks at work"]
        if self.products is not None:
            lines.insert(0, str(self.products))
        if self.peak_bytes is not None:
            lines.append(f"peak memory of the process: about {self.peak_bytes / 2**20:.4g} MiB")
        return "\n".join(lines)


def plan_run(
    problem: Problem,
    settings: LanczosSettings,
    sizes: Sequence[int],
    basis: str | os.PathLike[str],
    basis_dtype: str | torch.dtype,
) -> RunPlan:
    """Return the plan of a run for groups of so many parameters, one of all or several; tries no products.

    Errors are those of :func:`plan`.
    """
    kernels.require_device(problem.device)
    memory = plan_memory(settings, sum(sizes), problem.dtype, problem.device, basis, basis_dtype)
    hvps = sum(settings.for_size(size).most_products(size) for size in sizes)
    return RunPlan(settings, memory, hvps, max(settings.for_size(size).most_panels(size) for size in sizes))


@one_look()
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
    ProblemError, OperatorError, EngineError
        If the problem or an option cannot be used.
    PlanError
        If the basis does not fit.

    Examples
    --------
    >>> import torch, hesd_fast as hesd
    >>> problem = hesd.Problem(torch.nn.Linear(20, 1), lambda model, x: model(x).square().mean(), torch.ones(8, 20))
    >>> run = hesd.plan(problem, block_size=2, max_steps=10)
    >>> run.hvps, run.products.strategy in hesd.hvp.STRATEGIES, len(str(run).splitlines()) > 2
    (20, True, True)
    """
    if not isinstance(problem, Problem):
        raise ProblemError(f"plan got {type(problem).__name__}; give a Problem, as in Problem(model, loss, data)")
    settings = RunOptions(block_size, max_steps, reorthogonalization, protocol).settings(problem.size)
    untried = plan_run(problem, settings, [problem.size], basis, basis_dtype)
    strategy, products = choose(
        problem, settings.block_size, untried.panels, memory_limit=untried.memory.products_bytes
    )
    strategy.release()
    return replace(untried, products=products, peak_bytes=_peak_bytes(products, untried.memory, problem))


def _peak_bytes(products: ProductPlan, memory: MemoryBudget, problem: Problem) -> int | None:
    """Return the predicted peak: when the basis is full, or before, when strategies are tried and products checked."""
    if products.peak_bytes is None:
        return None
    in_memory = memory.basis.bytes if memory.basis.place == "memory" else 0
    first = CHECK_VECTORS * problem.size * problem.dtype.itemsize
    return max(products.peak_bytes + memory.working_bytes + max(in_memory, first), peak_memory())
