"""Spectra of several groups of parameters from one pass over the data per step."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from hesd_fast.analysis.run_plan import plan_run
from hesd_fast.analysis.run_sequence import Goal
from hesd_fast.analysis.settings import RunOptions, as_problem
from hesd_fast.analysis.spectra import Names, spectra_of
from hesd_fast.analysis.stopping import Tolerance, is_default
from hesd_fast.engine.memory import one_look
from hesd_fast.errors import ProblemError
from hesd_fast.operators.hessian_blocks import GroupedHessianOperator, Groups
from hesd_fast.problem.description import Loss
from hesd_fast.problem.model_state import alone
from hesd_fast.problem.parameters import select_parameters
from hesd_fast.problem.problem import Problem
from hesd_fast.problem.term_counts import Count
from hesd_fast.report.report import Report


@one_look()
def analyze_groups(
    model: nn.Module | Problem,
    loss: Loss | None = None,
    data: Any = None,
    *,
    groups: Groups,
    mode: str | None = None,
    count: Count | None = None,
    block_size: int | str = "auto",
    max_steps: int | None = None,
    tolerance: Tolerance = "auto",
    reorthogonalization: str | None = None,
    basis: str | os.PathLike[str] = "auto",
    basis_dtype: str | torch.dtype = "auto",
    hvp: str = "auto",
    protocol: str | None = None,
    seed: int = 0,
    progress: bool = True,
) -> dict[str, Report]:
    """Compute the spectral density of the Hessian's diagonal block of each group of parameters, such as each layer.

    The block of a group is the Hessian of the loss as a function of its parameters, the others held where they are. All
    groups go through the data together, a step each, and share the forward pass and the gradient of every batch: with
    G groups, m b G products by blocks, each of at most 6 forward passes, and 2 G that check the operator. Memory: that
    of G bases, each of vectors as long as its group.

    Parameters
    ----------
    model, loss, data, mode, count, block_size, max_steps, tolerance, ..., progress
        As in :func:`~hesd_fast.analyze`; each group stops when its own intervals are as narrow as wanted. A group of no
        more than ``block_size`` parameters has an exact spectrum.
    groups : mapping of str to selection, "modules" or "parameters"
        By name: selections as in :class:`~hesd_fast.Problem`, which may overlap; or the parameters that each module
        owns itself; or every parameter by itself.
    hvp : {"auto", "double_backward", "kept_graph"}
        As in :class:`~hesd_fast.GroupedHessianOperator`.

    Returns
    -------
    dict of str to Report
        In the order of the groups; ``cost.seconds`` of each are those of the whole run up to it.

    Examples
    --------
    >>> import torch, hesd_fast as hesd
    >>> loss, data = hesd.losses.supervised(torch.nn.MSELoss()), (torch.eye(2), torch.ones(2, 1))
    >>> reports = hesd.analyze_groups(torch.nn.Linear(2, 1), loss, data, groups="parameters")
    >>> {name: round(report.lambda_max.value, 6) for name, report in reports.items()}
    {'weight': 1.0, 'bias': 2.0}
    """
    problem = _problem(model, loss, data, groups, mode, count)
    started = time.perf_counter()
    options = RunOptions(block_size, max_steps, reorthogonalization, protocol, seed, tolerance)
    settings, goal = options.settings(problem.size), Goal(options.wanted(), not is_default(tolerance))
    operator = GroupedHessianOperator(problem, groups, hvp=hvp)
    run = plan_run(operator.problem, settings, [block.size for block in operator.blocks.values()], basis, basis_dtype)
    operator.strategy.memory_limit = run.memory.products_bytes
    names = Names("hessian", hvp, protocol)
    return spectra_of(operator.problem, operator.blocks, operator.matmats, run, names, goal, progress, started)


@alone
def _problem(
    model: nn.Module | Problem, loss: Loss | None, data: Any, groups: Groups, mode: str | None, count: Count | None
) -> Problem:
    """Return the problem of all parameters in some group; frozen ones can be named in a group as in a Problem."""
    names = None
    if isinstance(model, nn.Module) and isinstance(groups, Mapping) and groups:
        names = [name for selection in groups.values() for name in select_parameters(model, selection)]
    elif not isinstance(model, nn.Module | Problem):
        raise ProblemError(f"model is of type {type(model).__name__}; give a torch.nn.Module, or a Problem alone")
    return as_problem(model, loss, data, names, mode, count)
