"""The pipeline: from operators of one problem to a report of each."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch

from hesd_fast.analysis.checks import checks_of_run
from hesd_fast.analysis.progress import ProductProgress
from hesd_fast.analysis.run_plan import RunPlan
from hesd_fast.analysis.run_sequence import WHOLE, Goal, RunSequence
from hesd_fast.analysis.stopping import Findings, outcome
from hesd_fast.engine import _engine, cuda
from hesd_fast.engine.memory import peak_memory
from hesd_fast.errors import HESDWarning, ToleranceWarning
from hesd_fast.lanczos.block_tridiagonal import BlockTridiagonal
from hesd_fast.lanczos.drive import Multiply, Panels, drive
from hesd_fast.methodology.generalization_criteria import criteria
from hesd_fast.methodology.hesd_type import classify
from hesd_fast.operators.base import ProblemOperator
from hesd_fast.operators.linearity_check import Deviations, LinearityCheck
from hesd_fast.operators.precision_check import PrecisionCheck, ProductPrecision, check_precision
from hesd_fast.problem.parameters import as_real
from hesd_fast.problem.problem import Problem
from hesd_fast.report.facts import Cost, ProblemFacts, RunSettings
from hesd_fast.report.report import Report
from hesd_fast.spectrum.spectral_measure import SpectralMeasure
from hesd_fast.terminal import printable


class Names(NamedTuple):
    """What the user called the matrix, its products and the protocol, for the report."""

    operator: str
    hvp: str
    protocol: str | None


def spectra_of(
    problem: Problem,
    operators: Mapping[str, ProblemOperator],
    multiply: Multiply,
    plan: RunPlan,
    names: Names,
    goal: Goal,
    progress: bool,
    started: float,
) -> dict[str, Report]:
    """Return the report of each operator, by the name of its group; all are multiplied together, a step at a time.

    Called by functions that the user calls: warnings name the line of that call.
    """
    problem.prepare()
    for operator in operators.values():
        _ = operator.problem.fingerprint  # of the weights as they are now
    multiply = _in_parts(multiply, plan.settings.block_size)
    with problem.session():
        sequences = {name: RunSequence(operator, plan, name, goal) for name, operator in operators.items()}
        check = LinearityCheck(multiply)
        with ProductProgress(plan.hvps, enabled=progress) as bar:
            while runs := {name: run for name, one in sequences.items() if (run := one.next_run()) is not None}:
                drive(
                    runs,
                    multiply,
                    on_products=check,
                    on_step=lambda _: bar.update(sum(one.products for one in sequences.values())),
                    stop=lambda name, _: sequences[name].is_enough(),
                )
                del runs
                for one in sequences.values():
                    one.end_run()
        precisions = {
            name: check_precision(operator, sequences[name].products)
            for name, operator in operators.items()
            if name in check.found
        }
    for operator in operators.values():
        operator.release()
    reports = {}
    for name, operator in operators.items():
        runs_of_one = sequences.pop(name)
        settings = _settings_of(plan, runs_of_one.done, names, goal, name)
        found = Comparisons(check.found[name], precisions[name]) if name in check.found else None
        reports[name] = _report_of(operator, runs_of_one, found, settings, goal, started)
        _warn_of_failures(reports[name], goal, name)
    return reports


class Comparisons(NamedTuple):
    """What products were compared with."""

    deviations: Deviations
    precision: PrecisionCheck


def _in_parts(multiply: Multiply, rows: int) -> Multiply:
    """Return the products of panels of any width, by as many vectors at a time as they were planned for."""

    def in_parts(panels: Panels, products: Panels) -> None:
        for begin in range(0, max(map(len, panels.values())), rows):
            part = slice(begin, begin + rows)
            names = [name for name, panel in panels.items() if len(panel) > begin]
            multiply({name: panels[name][part] for name in names}, {name: products[name][part] for name in names})

    return in_parts


def with_error(runs: Sequence[BlockTridiagonal], precision: ProductPrecision | None) -> tuple[BlockTridiagonal, ...]:
    """Return the matrices of runs with what a comparison in a wider precision has found of their products."""
    error = None if precision is None else precision.error
    return tuple(replace(run, product_error=error) for run in runs)


def _settings_of(plan: RunPlan, runs: Sequence[BlockTridiagonal], names: Names, goal: Goal, group: str) -> RunSettings:
    """Return the settings of the runs as reports keep them; of runs continued with fewer steps, those they have."""
    tridiagonal = runs[0]
    steps = math.ceil(sum(sum(run.block_sizes) for run in runs) / tridiagonal.probes)
    return RunSettings(
        operator=names.operator,
        block_size=tridiagonal.probes,
        max_steps=steps if goal.earlier is not None and not goal.wanted else max(plan.settings.max_steps, steps),
        reorthogonalization=plan.settings.reorthogonalization,
        basis=tridiagonal.basis_place,
        basis_dtype=tridiagonal.basis_dtype,
        hvp=names.hvp,
        protocol=names.protocol,
        seed=plan.settings.seed,
        tolerance=goal.wanted or None,
        group=None if group == WHOLE else group,
    )


def _report_of(
    operator: ProblemOperator,
    runs: RunSequence,
    compared: Comparisons | None,
    settings: RunSettings,
    goal: Goal,
    started: float,
) -> Report:
    """Return what the runs have found: measure, criteria, type and checks."""
    problem = operator.problem
    facts = _facts_of(problem)
    earlier = goal.earlier
    of_earlier = None if earlier is None else earlier.precision
    precision = of_earlier if compared is None else compared.precision.precision
    done = with_error(runs.done, precision)
    measure = SpectralMeasure.from_tridiagonal(*done)
    found = criteria(measure)
    hesd_type, evidence = classify(
        measure, found, loss_value=facts.loss, parameter_norm_squared=facts.parameter_norm_squared
    )
    if compared is None:  # nothing was multiplied that the earlier report has no checks of
        checks = () if earlier is None else earlier.checks
    else:
        checks = checks_of_run(_worst_of(done), measure, compared.deviations, compared.precision, operator, problem)
    cost = Cost(
        hvps=runs.products,
        seconds=time.perf_counter() - started + (0.0 if earlier is None else earlier.cost.seconds),
        peak_bytes=_peak_bytes(problem),
        strategy=operator.method,
        plan=str(getattr(operator, "plan", None) or ""),
        unmet=outcome(Findings(measure, found), goal.wanted),
    )
    versions = _versions(problem.device)
    first = runs.first_run
    return Report(hesd_type, evidence, found, measure, facts, cost, checks, settings, versions, precision, first)


def _worst_of(runs: Sequence[BlockTridiagonal]) -> BlockTridiagonal:
    """Return the first run with the largest errors of all of them."""
    errors = [run.recurrence_error for run in runs if run.recurrence_error is not None]
    overlaps = [run.orthogonality for run in runs if run.orthogonality is not None]
    return replace(runs[0], recurrence_error=max(errors, default=None), orthogonality=max(overlaps, default=None))


def _facts_of(problem: Problem) -> ProblemFacts:
    return ProblemFacts(
        model=type(problem.model).__name__,
        size=problem.size,
        parameters=tuple(problem.parameters),
        shapes=tuple(tuple(as_real(parameter.detach()).shape) for parameter in problem.parameters.values()),
        mode=problem.mode,
        precision=str(problem.dtype).removeprefix("torch."),
        loss=problem.loss_value,
        parameter_norm_squared=problem.parameter_norm_squared,
        batches=problem.batch_count,
        terms=problem.total_count,
        weights=problem.weights,
        fingerprint=problem.fingerprint,
        function=problem.loss_description,
        replaced_operations=problem.replaced_operations,
    )


def _warn_of_failures(report: Report, goal: Goal, group: str) -> None:
    """Give a HESDWarning for each check that failed, and one for a tolerance that was asked for and is not met."""
    which = f" of group {group!r}" if group != WHOLE else ""
    for check in report.checks:
        if not check.passed and check.name != "derivatives":  # of which the operator has warned
            text = printable(f"the check of {check.name}{which} failed: {check.detail}")
            warnings.warn(text, HESDWarning, stacklevel=5)  # past the look at the memory
    if report.cost.unmet and goal.is_asked_for:
        text = printable(f"the tolerance{which} is not met after {report.run_length}: {'; '.join(report.cost.unmet)}")
        warnings.warn(text, ToleranceWarning, stacklevel=5)


def _versions(device: torch.device) -> dict[str, str]:
    build = _engine.build_info()
    return {
        **({"device": cuda.runtime.name(device)} if cuda.runtime.is_cuda(device) else {}),
        "hesd_fast": build["version"],
        "torch": torch.__version__,
        "numpy": np.__version__,
        "cpu_target": build["cpu_target"],
        "threads": str(build["threads"]),
    }


def _peak_bytes(problem: Problem) -> int:
    """Return the peak memory of this process so far: on the device of the problem, or resident."""
    if cuda.runtime.is_cuda(problem.device):
        return cuda.runtime.peak_memory(problem.device)
    return peak_memory()
