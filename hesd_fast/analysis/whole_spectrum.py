"""The corridor end to end: a problem in, its report out."""

from __future__ import annotations

import os
import time
import warnings
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hesd_fast.analysis.checks import checks_of_run
from hesd_fast.analysis.progress import ProductProgress
from hesd_fast.choices import is_one_of
from hesd_fast.engine import _engine, cuda, kernels
from hesd_fast.engine.memory import available_memory, peak_memory
from hesd_fast.errors import HESDWarning, OperatorError, ProblemError
from hesd_fast.lanczos.basis_storage import BasisPlan
from hesd_fast.lanczos.block_tridiagonal import ORTHOGONAL_MODES, BlockTridiagonal
from hesd_fast.lanczos.lanczos_run import block_lanczos, plan_blocks
from hesd_fast.lanczos.options import PROTOCOLS, LanczosSettings, check_options
from hesd_fast.methodology.generalization_criteria import criteria
from hesd_fast.methodology.hesd_type import classify
from hesd_fast.operators import EmpiricalFisherOperator, GaussNewtonOperator, HessianOperator
from hesd_fast.operators.base import ProblemOperator
from hesd_fast.operators.hessian import check_hvp
from hesd_fast.operators.linearity_check import CheckedOperator, Deviations
from hesd_fast.problem.description import Loss
from hesd_fast.problem.parameters import Selection, as_real
from hesd_fast.problem.problem import Problem
from hesd_fast.problem.term_counts import Count
from hesd_fast.report.report import Cost, ProblemFacts, Report
from hesd_fast.spectrum.spectral_measure import SpectralMeasure
from hesd_fast.terminal import printable

DEFAULT_BLOCK_SIZE = 4
DEFAULT_MAX_STEPS = 100


OPERATORS: dict[str, type[ProblemOperator]] = {
    "hessian": HessianOperator,
    "gauss_newton": GaussNewtonOperator,
    "empirical_fisher": EmpiricalFisherOperator,
}
"""Whose spectrum can be asked for."""


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
    reorthogonalization: str | None = None,
    basis: str | os.PathLike[str] = "auto",
    basis_dtype: str | torch.dtype = "auto",
    hvp: str = "auto",
    protocol: str | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Report:
    """Compute the Hessian eigenvalue spectral density of a model, its type and its criteria.

    Parameters
    ----------
    model, loss, data
        A model, ``loss(model, batch)`` and the data; or a :class:`~hesd_fast.Problem` alone.
    parameters, mode, count
        As in :class:`~hesd_fast.Problem`; not together with one.
    operator : {"hessian", "gauss_newton", "empirical_fisher"}
        The matrix whose spectrum is wanted: the Hessian; or :class:`~hesd_fast.GaussNewtonOperator` or
        :class:`~hesd_fast.EmpiricalFisherOperator`, which are positive semi-definite and need a loss that can be taken
        apart.
    block_size : int or "auto"
        Number of probes b; "auto" takes 4, or n if that is less. Where b = n, the unit vectors take the place of random
        probes.
    max_steps : int, optional
        Block steps m, 100 by default. Fewer are taken only when the Krylov space becomes invariant.
    reorthogonalization : {"full", "partial", "window", "none"}, optional
        See :func:`~hesd_fast.block_lanczos`; "full" by default.
    basis, basis_dtype
        Where and in what precision the Lanczos vectors are kept; see :func:`~hesd_fast.block_lanczos`.
    hvp : str
        How products are made. "auto" tries the exact strategies on the first batch, within 5 % of the predicted run,
        and takes the fastest that fits; which one that is depends on the machine and its load, and with it the last
        bits of the result. ``hesd_fast.hvp.ALL_STRATEGIES`` lists what can be named. For the Hessian alone.
    protocol : {"lla"}, optional
        A published protocol, which sets the three options before: numbers comparable with those of Loss Landscape
        Analysis.
    seed : int
        Chooses the probes.
    progress : bool
        Show a progress bar on a terminal.

    Returns
    -------
    Report
        Cost: m b exact Hessian-vector products over all of the data, and two that check the operator.

    Raises
    ------
    ProblemError, OperatorError, PlanError, EngineError
        Before any long work wherever the cause can be known by then. The model is as it was in every case.
    """
    problem = as_problem(model, loss, data, parameters, mode, count)
    chosen = settings(problem.size, block_size, max_steps, reorthogonalization, protocol)
    check_options(problem.size, chosen.max_steps, chosen.block_size, chosen.reorthogonalization, seed)
    _check_operator(operator, hvp)
    kernels.require_device(problem.device)
    where = basis_for(problem, problem.size, chosen, basis, basis_dtype)
    started = time.perf_counter()
    problem.prepare()
    _ = problem.fingerprint  # of the weights as they are now
    with problem.session():
        if operator == "hessian":
            matrix: ProblemOperator = HessianOperator(
                problem,
                hvp=hvp,
                panels=most_panels(problem.size, chosen),
                memory_limit=memory_for_products(problem, where, int(chosen.block_size)),
            )
        else:
            matrix = OPERATORS[operator](problem)
        expected = most_products(problem.size, chosen)
        checked = CheckedOperator(matrix)
        with ProductProgress(expected, enabled=progress) as bar:
            tridiagonal = block_lanczos(
                checked,
                chosen.max_steps,
                chosen.block_size,
                seed=seed,
                probes=probes_of_all(problem, int(chosen.block_size)),
                reorthogonalization=chosen.reorthogonalization,
                window=chosen.window,
                basis=basis,
                basis_dtype=basis_dtype,
                on_step=bar.update,
            )
    options = run_options(operator, chosen, tridiagonal, hvp, protocol, seed)
    return report_of(
        problem, tridiagonal, matrix, (checked.linearity, checked.repetition, checked.gain), options, started
    )


def run_options(
    operator: str, chosen: LanczosSettings, tridiagonal: BlockTridiagonal, hvp: str, protocol: str | None, seed: int
) -> dict[str, Any]:
    """Return the settings of a run as reports keep them."""
    return {
        "operator": operator,
        "block_size": int(chosen.block_size),
        "max_steps": int(chosen.max_steps),
        "reorthogonalization": chosen.reorthogonalization,
        "basis": tridiagonal.basis_place,
        "basis_dtype": tridiagonal.basis_dtype,
        "hvp": hvp,
        "protocol": protocol,
        "seed": int(seed),
    }


def report_of(
    problem: Problem,
    tridiagonal: BlockTridiagonal,
    matrix: ProblemOperator,
    deviations: Deviations,
    options: dict[str, Any],
    started: float,
) -> Report:
    """Return what a run has found: measure, criteria, type and checks; a HESDWarning for each check that failed."""
    facts = ProblemFacts(
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
    measure = SpectralMeasure.from_tridiagonal(tridiagonal)
    found = criteria(measure)
    hesd_type, evidence = classify(
        measure, found, loss_value=facts.loss, parameter_norm_squared=facts.parameter_norm_squared
    )
    checks = checks_of_run(tridiagonal, measure, deviations, matrix, problem)
    for check in checks:
        if not check.passed and check.name != "derivatives":  # of which the operator has warned
            group = f" of group {options['group']!r}" if "group" in options else ""
            text = printable(f"the check of {check.name}{group} failed: {check.detail}")
            warnings.warn(text, HESDWarning, stacklevel=3)
    cost = Cost(
        hvps=tridiagonal.products,
        seconds=time.perf_counter() - started,
        peak_bytes=_peak_bytes(problem),
        strategy=matrix.method,
        plan=str(getattr(matrix, "plan", None) or ""),
    )
    return Report(hesd_type, evidence, found, measure, facts, cost, checks, options, _versions(problem.device))


def _check_operator(operator: str, hvp: str) -> None:
    if not is_one_of(operator, OPERATORS):
        raise OperatorError(f"operator is {operator!r}; wanted one of {', '.join(map(repr, OPERATORS))}")
    check_hvp(hvp)
    if operator != "hessian" and hvp != "auto":
        raise OperatorError(
            f"hvp={hvp!r} says how products with the Hessian are made, and operator={operator!r} has its own way; "
            "leave hvp out"
        )


def as_problem(
    model: nn.Module | Problem,
    loss: Loss | None,
    data: Any,
    parameters: Selection,
    mode: str | None,
    count: Count | None = None,
) -> Problem:
    """Return the problem that was given, as such or in parts; a ProblemError where it is both or neither."""
    if isinstance(model, Problem):
        options = {"loss": loss, "data": data, "parameters": parameters, "mode": mode, "count": count}
        given = [name for name, value in options.items() if value is not None]
        if given:
            raise ProblemError(f"analyze got a Problem and also {', '.join(given)}; give them to the Problem")
        return model
    if loss is None or data is None:
        missing = "loss" if loss is None else "data"
        raise ProblemError(f"analyze got no {missing}; call analyze(model, loss, data) or analyze(Problem(...))")
    return Problem(model, loss, data, parameters=parameters, mode=mode or "eval", count=count)


def settings(
    size: int, block_size: int | str, max_steps: int | None, reorthogonalization: str | None, protocol: str | None
) -> LanczosSettings:
    """Return what the options of a run say, with their defaults; a ProblemError for what does not fit together."""
    if protocol is not None:
        if not is_one_of(protocol, PROTOCOLS):
            raise ProblemError(f"protocol is {protocol!r}; wanted None or one of {', '.join(map(repr, PROTOCOLS))}")
        if block_size != "auto" or max_steps is not None or reorthogonalization is not None:
            raise ProblemError(
                f"protocol={protocol!r} sets block_size, max_steps and reorthogonalization; "
                "leave them out, or the protocol"
            )
        return PROTOCOLS[protocol]
    if isinstance(block_size, str):
        if block_size != "auto":
            raise ProblemError(f"block_size is {block_size!r}; wanted an integer or 'auto'")
        block_size = min(DEFAULT_BLOCK_SIZE, size)
    steps = DEFAULT_MAX_STEPS if max_steps is None else max_steps
    mode = "full" if reorthogonalization is None else reorthogonalization
    return LanczosSettings(block_size, steps, mode)


def probes_of_all(problem: Problem, block_size: int) -> Tensor | None:
    """Return unit vectors as long as random ones where there are not more than probes: so few signs often span less."""
    if problem.size > block_size:
        return None
    return torch.eye(problem.size, dtype=problem.dtype, device=problem.device).mul_(problem.size**0.5)


def most_products(size: int, settings: LanczosSettings) -> int:
    """Return how many vectors of length ``size`` a run multiplies at most."""
    products = int(settings.max_steps) * int(settings.block_size)
    return min(products, size) if settings.reorthogonalization in ORTHOGONAL_MODES else products


def most_panels(size: int, settings: LanczosSettings) -> int:
    """Return how many panels of vectors of length ``size`` a run multiplies at most, whole or not."""
    return -(-most_products(size, settings) // int(settings.block_size))


def basis_for(
    problem: Problem,
    size: int,
    settings: LanczosSettings,
    basis: str | os.PathLike[str],
    basis_dtype: str | torch.dtype,
) -> BasisPlan:
    """Choose where the Lanczos vectors of a run lie, all of its groups' together ``size`` numbers long."""
    steps, width = int(settings.max_steps), int(settings.block_size)
    kind, window = settings.reorthogonalization, settings.window
    return plan_blocks(size, problem.dtype, problem.device, steps, width, kind, window, basis, basis_dtype)


def memory_for_products(problem: Problem, basis: BasisPlan, block_size: int) -> int | None:
    """Half of the memory that the basis leaves; what one batch needs meanwhile takes of the other half."""
    available = available_memory(problem.device)
    if available is None:
        return None
    working = 4 * block_size * basis.columns * problem.dtype.itemsize
    return max(available - working - basis.bytes_at_work, 0) // 2


def _versions(device: torch.device) -> dict[str, str]:
    build = _engine.build_info()
    return {
        **({"device": cuda.name(device)} if cuda.is_cuda(device) else {}),
        "hesd_fast": build["version"],
        "torch": torch.__version__,
        "numpy": np.__version__,
        "cpu_target": build["cpu_target"],
        "threads": str(build["threads"]),
    }


def _peak_bytes(problem: Problem) -> int:
    """Peak memory of this process so far: on the device of the problem, or resident."""
    if cuda.is_cuda(problem.device):
        return cuda.peak_memory(problem.device)
    return peak_memory()
