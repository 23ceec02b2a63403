"""The pipeline: from operators of one problem to a report of each."""

from __future__ import annotations

import time
import warnings
from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from hesd_fast.analysis.checks import checks_of_run
from hesd_fast.analysis.progress import ProductProgress
from hesd_fast.analysis.run_plan import RunPlan
from hesd_fast.engine import _engine, cuda
from hesd_fast.engine.memory import peak_memory
from hesd_fast.errors import HESDWarning
from hesd_fast.lanczos.block_tridiagonal import BlockTridiagonal
from hesd_fast.lanczos.drive import Multiply, drive
from hesd_fast.lanczos.lanczos_run import LanczosRun
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


WHOLE = ""
"""The name of the one run that is of all parameters; no group is called so."""


def spectra_of(
    problem: Problem,
    operators: Mapping[str, ProblemOperator],
    multiply: Multiply,
    plan: RunPlan,
    names: Names,
    progress: bool,
    started: float,
) -> dict[str, Report]:
    """Return the report of each operator, by the name of its group; all are multiplied together, a step at a time.

    Called by functions that the user calls: warnings name the line of that call.
    """
    problem.prepare()
    for operator in operators.values():
        _ = operator.problem.fingerprint  # of the weights as they are now
    with problem.session():
        runs = {name: _run_of(operator, plan, name) for name, operator in operators.items()}
        check = LinearityCheck(multiply)
        with ProductProgress(plan.hvps, enabled=progress) as bar:
            drive(runs, multiply, on_products=check, on_step=bar.update)
        precisions = {name: check_precision(operator, plan.hvps) for name, operator in operators.items()}
    for operator in operators.values():
        operator.release()
    reports = {}
    for name, operator in operators.items():
        tridiagonal = with_error(runs.pop(name).result(), precisions[name].precision)  # one basis less
        settings = _settings_of(plan, tridiagonal, names, name)
        reports[name] = _report_of(operator, tridiagonal, check.found[name], precisions[name], settings, started)
        _warn_of_failures(reports[name], name)
    return reports


def with_error(tridiagonal: BlockTridiagonal, precision: ProductPrecision | None) -> BlockTridiagonal:
    """Return a run's matrix with what a comparison in a wider precision has found of its products."""
    if precision is None:
        return tridiagonal
    return replace(tridiagonal, product_error=precision.error)


def _run_of(operator: ProblemOperator, plan: RunPlan, group: str) -> LanczosRun:
    settings = plan.settings.for_size(operator.size)
    probes = _probes_of_all(operator, settings.block_size)
    basis = plan.memory.basis if group == WHOLE else plan.memory.basis_of(settings, operator.size)
    return LanczosRun(operator, settings, basis, probes)


def _probes_of_all(operator: ProblemOperator, block_size: int) -> Tensor | None:
    """Return unit vectors as long as random ones where there are not more than probes: so few signs often span less."""
    if operator.size > block_size:
        return None
    return torch.eye(operator.size, dtype=operator.dtype, device=operator.device).mul_(operator.size**0.5)


def _settings_of(plan: RunPlan, tridiagonal: BlockTridiagonal, names: Names, group: str) -> RunSettings:
    """Return the settings of a run as reports keep them."""
    return RunSettings(
        operator=names.operator,
        block_size=tridiagonal.probes,
        max_steps=plan.settings.max_steps,
        reorthogonalization=plan.settings.reorthogonalization,
        basis=tridiagonal.basis_place,
        basis_dtype=tridiagonal.basis_dtype,
        hvp=names.hvp,
        protocol=names.protocol,
        seed=plan.settings.seed,
        group=None if group == WHOLE else group,
    )


def _report_of(
    operator: ProblemOperator,
    tridiagonal: BlockTridiagonal,
    deviations: Deviations,
    precision: PrecisionCheck,
    settings: RunSettings,
    started: float,
) -> Report:
    """Return what a run has found: measure, criteria, type and checks."""
    problem = operator.problem
    facts = _facts_of(problem)
    measure = SpectralMeasure.from_tridiagonal(tridiagonal)
    found = criteria(measure)
    hesd_type, evidence = classify(
        measure, found, loss_value=facts.loss, parameter_norm_squared=facts.parameter_norm_squared
    )
    checks = checks_of_run(tridiagonal, measure, deviations, precision, operator, problem)
    cost = Cost(
        hvps=tridiagonal.products,
        seconds=time.perf_counter() - started,
        peak_bytes=_peak_bytes(problem),
        strategy=operator.method,
        plan=str(getattr(operator, "plan", None) or ""),
    )
    versions = _versions(problem.device)
    return Report(
        hesd_type, evidence, found, measure, facts, cost, checks, settings, versions, precision=precision.precision
    )


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


def _warn_of_failures(report: Report, group: str) -> None:
    """Give a HESDWarning for each check that failed."""
    for check in report.checks:
        if not check.passed and check.name != "derivatives":  # of which the operator has warned
            which = f" of group {group!r}" if group != WHOLE else ""
            text = printable(f"the check of {check.name}{which} failed: {check.detail}")
            warnings.warn(text, HESDWarning, stacklevel=5)  # past the look at the memory


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
