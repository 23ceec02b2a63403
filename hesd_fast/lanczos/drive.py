"""The one loop of every run: multiply, advance, until finished."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hesd_fast.engine import kernels
from hesd_fast.engine.memory import one_look
from hesd_fast.errors import ProblemError
from hesd_fast.lanczos.block_tridiagonal import BlockTridiagonal
from hesd_fast.lanczos.lanczos_run import LanczosRun
from hesd_fast.lanczos.memory_budget import plan_memory
from hesd_fast.lanczos.options import LanczosSettings
from hesd_fast.operators import as_operator
from hesd_fast.operators.base import CurvatureOperator

Panels = Mapping[str, Tensor]
Multiply = Callable[[Panels, Panels], object]
"""Takes panels and where their products belong, both by the name of the run."""


@dataclass(frozen=True)
class LanczosProgress:
    """What a progress callback is told after each step.

    Attributes
    ----------
    step, steps : int
        Steps done, and how many there are at most.
    products : int
        Vectors multiplied so far.

    Examples
    --------
    >>> import torch, hesd_fast as hesd
    >>> run = hesd.block_lanczos(torch.diag(torch.arange(9.0)), 2, 3, on_step=print)
    LanczosProgress(step=1, steps=2, products=3)
    LanczosProgress(step=2, steps=2, products=6)
    """

    step: int
    steps: int
    products: int


def drive(
    runs: Mapping[str, LanczosRun],
    multiply: Multiply,
    *,
    on_products: Callable[[Panels, Panels], object] | None = None,
    on_step: Callable[[LanczosProgress], object] | None = None,
    stop: Callable[[str, LanczosRun], bool] | None = None,
) -> None:
    """Take all runs to their end, a step of each at a time.

    Parameters
    ----------
    runs : mapping of str to LanczosRun
        By name. They may differ in length and in how many steps they take.
    multiply : callable
        Called once a step, for the panels of all runs that are not finished.
    on_products : callable, optional
        Told the panels and products of a step before the runs take them; it must leave both as they are.
    on_step : callable, optional
        Told the progress of all runs together after each step.
    stop : callable, optional
        Asked after each step, for every run that could take another, whether it is not to.
    """
    active = {name: run for name, run in runs.items() if not run.finished}
    while active:
        panels = {name: run.panel for name, run in active.items()}
        products = {name: run.product for name, run in active.items()}
        multiply(panels, products)
        if on_products is not None:
            on_products(panels, products)
        for run in active.values():
            run.take_step()
        if on_step is not None:
            on_step(_progress(runs))
        active = {name: run for name, run in active.items() if not run.finished}
        if stop is not None:
            active = {name: run for name, run in active.items() if not stop(name, run)}


def _progress(runs: Mapping[str, LanczosRun]) -> LanczosProgress:
    return LanczosProgress(
        max(run.step for run in runs.values()),
        max(run.most_steps for run in runs.values()),
        sum(run.products for run in runs.values()),
    )


def multiply_by(operator: CurvatureOperator) -> Multiply:
    """Return the products of an operator for runs that all have its matrix."""

    def multiply(panels: Panels, products: Panels) -> None:
        for name, panel in panels.items():
            result = operator.matmat(panel, out=products[name])
            if result is not products[name]:  # an operator of the user's own may have made a panel of its own
                products[name].copy_(result)

    return multiply


@one_look()
def block_lanczos(
    operator: CurvatureOperator | Any,
    steps: int = 25,
    block_size: int = 4,
    *,
    seed: int = 0,
    reorthogonalization: str = "full",
    window: int = 10,
    probe_kind: str = "sphere",
    probes: Tensor | None = None,
    basis: str | os.PathLike[str] = "auto",
    basis_dtype: str | torch.dtype = "auto",
    on_step: Callable[[LanczosProgress], object] | None = None,
) -> BlockTridiagonal:
    """Run block Lanczos from random probes: m b products, and up to 3 m^2 b n / 2 elements of basis read.

    Parameters
    ----------
    operator : CurvatureOperator or symmetric matrix (n, n)
        Multiplies panels; see :func:`hesd_fast.operators.as_operator`.
    steps, block_size, seed : int
        Block steps m, fewer where the Krylov space becomes invariant; probes b <= n; what chooses them, below 2**64.
    reorthogonalization, window : {"full", "partial", "window", "none"}, int
        Against all vectors (memory (m + 1) b n elements); against the last two blocks, and against older ones only
        where an estimate of the overlaps passes the square root of epsilon (the same memory and spectrum for fewer
        reads); against the last ``window`` vectors, two blocks or more; or the three-term recurrence alone (3 b n
        elements), where converged Ritz values reappear as copies that share their weight.
    probe_kind, probes : {"sphere", "gaussian", "rademacher"}, tensor (b, n)
        Distribution of random probes, by default uniform on the sphere of radius sqrt(n), for which every stated risk
        holds (signs miss an eigenvector on two equal coordinates with probability 1/2); or the probes themselves, for
        results without a sampling error.
    basis, basis_dtype
        Where and in what precision vectors are kept that are not at work: see :func:`~hesd_fast.lanczos.basis_storage.
        plan_basis`.
    on_step : callable, optional
        Called with a :class:`LanczosProgress` after each step.

    Raises
    ------
    ProblemError, PlanError, OperatorError, EngineError
        For options that cannot be used; a basis that does not fit; products that are not finite or not those of a
        symmetric matrix; a device without kernels.

    References
    ----------
    Golub and Underwood, 1977. Golub and Meurant, *Matrices, Moments and Quadrature with Applications*, 2010, 4.7.

    Examples
    --------
    >>> import torch, hesd_fast as hesd
    >>> round(hesd.block_lanczos(torch.diag(torch.arange(50.0)), steps=20, block_size=2).top(1)[0].value, 3)
    49.0
    """
    operator = as_operator(operator)
    kind = probe_kind if probes is None else "given"
    width = block_size if probes is None else _number_of(probes, operator.size)
    settings = LanczosSettings(width, steps, reorthogonalization, window, seed, kind)
    run = start_run(operator, settings, basis, basis_dtype, probes)
    drive({"": run}, multiply_by(operator), on_step=on_step)
    return run.result()


def start_run(
    operator: CurvatureOperator,
    settings: LanczosSettings,
    basis: str | os.PathLike[str] = "auto",
    basis_dtype: str | torch.dtype = "auto",
    probes: Tensor | None = None,
) -> LanczosRun:
    """Return a run that has taken no step yet; errors are those of :func:`block_lanczos`."""
    settings = settings.checked(operator.size)
    kernels.require_device(operator.device)
    budget = plan_memory(settings, operator.size, operator.dtype, operator.device, basis, basis_dtype)
    return LanczosRun(operator, settings, budget.basis, probes)


def _number_of(probes: Tensor, n: int) -> int:
    """Return how many probes were given; a ProblemError for what are none."""
    if not isinstance(probes, Tensor) or probes.ndim != 2 or probes.shape[1] != n or not probes.is_floating_point():
        got = f"{tuple(probes.shape)} {probes.dtype}" if isinstance(probes, Tensor) else type(probes).__name__
        raise ProblemError(f"probes is {got}; wanted a floating-point tensor of shape (b, {n})")
    if not bool(torch.isfinite(probes).all()):
        raise ProblemError("probes holds a number that is not finite; wanted finite vectors")
    return len(probes)
