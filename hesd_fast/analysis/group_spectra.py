"""Spectra of several groups of parameters from one pass over the data per step."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from hesd_fast.analysis.progress import ProductProgress
from hesd_fast.analysis.whole_spectrum import (
    as_problem,
    basis_for,
    memory_for_products,
    most_products,
    probes_of_all,
    report_of,
    run_options,
    settings,
)
from hesd_fast.errors import ProblemError
from hesd_fast.lanczos.basis_storage import TILE_COLUMNS
from hesd_fast.lanczos.lanczos_run import LanczosProgress, LanczosRun
from hesd_fast.lanczos.options import check_options
from hesd_fast.operators.hessian_blocks import GroupedHessianOperator, Groups
from hesd_fast.operators.linearity_check import Deviations, combination_of, deviations
from hesd_fast.problem.description import Loss
from hesd_fast.problem.model_state import alone
from hesd_fast.problem.parameters import select_parameters
from hesd_fast.problem.problem import Problem
from hesd_fast.problem.term_counts import Count
from hesd_fast.report.report import Report


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
    reorthogonalization: str | None = None,
    basis: str | os.PathLike[str] = "auto",
    basis_dtype: str | torch.dtype = "auto",
    hvp: str = "auto",
    protocol: str | None = None,
    seed: int = 0,
    progress: bool = True,
) -> dict[str, Report]:
    """Compute the spectral density of the Hessian's diagonal block of each group of parameters, such as each layer.

    The block of a group is the Hessian of the loss as a function of its parameters, the others held where they are:
    what :func:`~hesd_fast.analyze` finds with ``parameters=`` that group. Here all groups go through the data
    together, each step once, and share the forward pass and the gradient of every batch.

    Parameters
    ----------
    model, loss, data
        A model, ``loss(model, batch)`` and the data; or a :class:`~hesd_fast.Problem` alone.
    groups : mapping of str to selection, "modules" or "parameters"
        The groups by name; a selection is a regular expression that must match a whole name, names, or a predicate, as
        in :class:`~hesd_fast.Problem`. Groups may overlap. "modules": the parameters that each module owns itself;
        "parameters": every parameter by itself.
    mode, count
        As in :class:`~hesd_fast.Problem`; not together with one.
    block_size, max_steps, reorthogonalization, basis, basis_dtype, protocol, seed, progress
        As in :func:`~hesd_fast.analyze`. A group of no more than ``block_size`` parameters takes the unit vectors
        as probes, and its spectrum is exact.
    hvp : {"auto", "double_backward", "kept_graph"}
        See :class:`~hesd_fast.GroupedHessianOperator`.

    Returns
    -------
    dict of str to Report
        In the order of the groups. Cost: with G groups, m b G products by blocks, each of at most 6 forward passes
        over the data and of less for groups near the output, and 2 G that check the operator. ``cost.seconds`` of
        every report are those of the whole run. Memory: that of G bases, each of vectors as long as its group.

    Raises
    ------
    ProblemError, OperatorError, PlanError, EngineError
        As :func:`~hesd_fast.analyze`, and for groups that cannot be used.
    """
    problem = _problem(model, loss, data, groups, mode, count)
    started = time.perf_counter()
    chosen = settings(problem.size, block_size, max_steps, reorthogonalization, protocol)
    check_options(problem.size, chosen.max_steps, chosen.block_size, chosen.reorthogonalization, seed)
    operator = GroupedHessianOperator(problem, groups, hvp=hvp)
    problem = operator.problem
    blocks = operator.blocks
    chosen_for = {
        name: replace(chosen, block_size=min(int(chosen.block_size), block.size)) for name, block in blocks.items()
    }
    size = sum(block.size for block in blocks.values())
    steps, width = int(chosen.max_steps), int(chosen.block_size)
    kind, window = chosen.reorthogonalization, chosen.window
    where = basis_for(problem, size, chosen, basis, basis_dtype)
    operator.strategy.memory_limit = memory_for_products(problem, where, width)
    problem.prepare()
    for block in blocks.values():
        _ = block.problem.fingerprint  # of the weights as they are now
    with problem.session():
        runs = {
            name: LanczosRun(
                block,
                steps,
                chosen_for[name].block_size,
                seed=seed,
                probes=probes_of_all(block.problem, chosen_for[name].block_size),
                reorthogonalization=kind,
                window=window,
                # Tiles of a basis on disk are wider than a small group.
                basis="memory" if block.size < TILE_COLUMNS else where.directory or where.place,
                basis_dtype=basis_dtype,
            )
            for name, block in blocks.items()
        }
        expected = sum(most_products(block.size, chosen_for[name]) for name, block in blocks.items())
        found: dict[str, Deviations] = {}
        with ProductProgress(expected, enabled=progress) as bar:
            while active := {name: run for name, run in runs.items() if not run.finished}:
                operator.matmats(
                    {name: run.panel for name, run in active.items()},
                    {name: run.product for name, run in active.items()},
                )
                if not found:
                    found = _check(operator, active)
                for run in active.values():
                    run.advance()
                done = LanczosProgress(
                    max(run.progress.step for run in runs.values()), steps, sum(run.products for run in runs.values())
                )
                bar.update(done)
    operator.strategy.release()
    reports = {}
    for name, block in blocks.items():
        tridiagonal = runs.pop(name).result()
        options = run_options("hessian", chosen_for[name], tridiagonal, hvp, protocol, seed)
        reports[name] = report_of(block.problem, tridiagonal, block, found[name], {**options, "group": name}, started)
    return reports


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


def _check(operator: GroupedHessianOperator, runs: Mapping[str, LanczosRun]) -> dict[str, Deviations]:
    """Return how far from linear, and from the same twice, the products of each group's first panel are."""
    combinations = {name: combination_of(run.panel) for name, run in runs.items()}
    first, second = operator.matmats(combinations), operator.matmats(combinations)
    return {name: deviations(run.product, first[name], second[name], combinations[name]) for name, run in runs.items()}
