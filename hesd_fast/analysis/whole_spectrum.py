"""The spectrum of one matrix of a problem, from the options to the report."""

from __future__ import annotations

import os
import time
from typing import Any

import torch
from torch import nn

from hesd_fast.analysis.run_plan import RunPlan, plan_run
from hesd_fast.analysis.run_sequence import WHOLE, Goal
from hesd_fast.analysis.settings import RunOptions, as_problem, continued
from hesd_fast.analysis.spectra import Names, spectra_of
from hesd_fast.analysis.stopping import Tolerance, is_default
from hesd_fast.choices import is_one_of
from hesd_fast.engine.memory import one_look
from hesd_fast.errors import OperatorError
from hesd_fast.lanczos.drive import Multiply, multiply_by
from hesd_fast.operators import EmpiricalFisherOperator, GaussNewtonOperator, HessianOperator
from hesd_fast.operators.base import ProblemOperator
from hesd_fast.operators.hessian import check_hvp
from hesd_fast.problem.description import Loss
from hesd_fast.problem.parameters import Selection
from hesd_fast.problem.problem import Problem
from hesd_fast.problem.term_counts import Count
from hesd_fast.report.report import Report

OPERATORS: dict[str, type[ProblemOperator]] = {
    "hessian": HessianOperator,
    "gauss_newton": GaussNewtonOperator,
    "empirical_fisher": EmpiricalFisherOperator,
}
"""Curvature matrices by name."""


@one_look()
def analyze(
    model: nn.Module | Problem,
    loss: Loss | None = None,
    data: Any = None,
    *,
    parameters: Selection = None,
    mode: str | None = None,
    count: Count | None = None,
    operator: str = "hessian",
    block_size: int | str = "auto",
    max_steps: int | None = None,
    tolerance: Tolerance = "auto",
    reorthogonalization: str | None = None,
    basis: str | os.PathLike[str] = "auto",
    basis_dtype: str | torch.dtype = "auto",
    hvp: str = "auto",
    protocol: str | None = None,
    seed: int = 0,
    keep_run: bool = False,
    continue_from: Report | None = None,
    progress: bool = True,
) -> Report:
    """Compute the Hessian eigenvalue spectral density of a model, its type and its criteria.

    Costs at most m b Hessian products over all the data, two that check the operator, and a few in a wider precision.

    Parameters
    ----------
    model, loss, data, parameters, mode, count
        As in :class:`~hesd_fast.Problem`; or a Problem alone, as ``model``.
    operator : {"hessian", "gauss_newton", "empirical_fisher"}
        The matrix; the others are :class:`~hesd_fast.GaussNewtonOperator`, :class:`~hesd_fast.EmpiricalFisherOperator`.
    block_size, max_steps, seed : int
        Probes b, 4 by default (unit vectors if b = n), block steps m of all runs, 100 by default; picks the probes.
    tolerance : float, mapping of str to float, "auto" or None
        How narrow intervals are to be, see :func:`~hesd_fast.analysis.stopping.tolerances`; runs with fresh probes
        follow as needed. Not met: a ToleranceWarning; "auto", 0.02, has none. None: one run of all its steps.
    reorthogonalization, basis, basis_dtype, hvp : str
        As in :func:`~hesd_fast.block_lanczos`; one of ``hesd_fast.hvp.ALL_STRATEGIES``, "auto" being the fastest exact.
    protocol : {"lla"}, optional
        Published settings, those of Loss Landscape Analysis.
    keep_run, continue_from : bool, Report
        Keep the first run's vectors. Go on from a report: its first run, if kept, to its ``max_steps``; new probes.

    Raises
    ------
    ProblemError, OperatorError, PlanError, EngineError
        Before any long work where it can; the model is as it was in every case.

    Examples
    --------
    >>> import torch, hesd_fast as hesd
    >>> loss = hesd.losses.supervised(torch.nn.MSELoss())
    >>> print(hesd.analyze(torch.nn.Linear(2, 1, bias=False), loss, (torch.eye(2), torch.ones(2, 1))).lambda_max)
    1 [1, 1]
    """
    problem = as_problem(model, loss, data, parameters, mode, count)
    options = RunOptions(block_size, max_steps, reorthogonalization, protocol, seed, tolerance)
    names, goal = Names(operator, hvp, protocol), (keep_run, continue_from, progress)
    return spectra_of(*_prepared(problem, names, options, (basis, basis_dtype), *goal))[WHOLE]


def _prepared(
    problem: Problem,
    names: Names,
    options: RunOptions,
    basis: tuple[str | os.PathLike[str], str | torch.dtype],
    keep_run: bool,
    earlier: Report | None,
    progress: bool,
) -> tuple[Problem, dict[str, ProblemOperator], Multiply, RunPlan, Names, Goal, bool, float]:
    """Return what `spectra_of` takes: operator, plan and goal of a checked request."""
    _check_operator(names.operator, names.hvp)
    if earlier is not None:
        options = continued(options, earlier, problem, names.operator)
    run = plan_run(problem, options.settings(problem.size), [problem.size], *basis)
    goal = Goal(options.wanted(), not is_default(options.tolerance), keep_run, earlier)
    matrix, started = _operator_of(problem, names.operator, names.hvp, run), time.perf_counter()
    return problem, {WHOLE: matrix}, multiply_by(matrix), run, names, goal, progress, started


def _check_operator(operator: str, hvp: str) -> None:
    if not is_one_of(operator, OPERATORS):
        raise OperatorError(f"operator is {operator!r}; wanted one of {', '.join(map(repr, OPERATORS))}")
    check_hvp(hvp)
    if operator != "hessian" and hvp != "auto":
        raise OperatorError(
            f"hvp={hvp!r} says how products with the Hessian are made, and operator={operator!r} has its own way; "
            "leave hvp out"
        )


def _operator_of(problem: Problem, operator: str, hvp: str, run: RunPlan) -> ProblemOperator:
    if operator == "hessian":
        return HessianOperator(problem, hvp=hvp, panels=run.panels, memory_limit=run.memory.products_bytes)
    return OPERATORS[operator](problem)
