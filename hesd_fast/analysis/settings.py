"""What the options of a run say: which problem, and how long."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from hesd_fast.analysis.stopping import Tolerance, is_default, tolerances
from hesd_fast.choices import is_one_of
from hesd_fast.errors import ProblemError
from hesd_fast.lanczos.options import PROTOCOLS, RANDOM_PROBES, LanczosSettings
from hesd_fast.problem.description import Loss
from hesd_fast.problem.parameters import Selection
from hesd_fast.problem.problem import Problem
from hesd_fast.problem.term_counts import Count
from hesd_fast.report.report import Report

DEFAULT_BLOCK_SIZE = 4
DEFAULT_MAX_STEPS = 100

SAME_LOSS = 1e-4
"""Relative difference up to which two losses are of one function; another machine rounds otherwise."""


@dataclass(frozen=True)
class RunOptions:
    """How long a run is, as its options say; see :func:`~hesd_fast.analyze`."""

    block_size: int | str = "auto"
    max_steps: int | None = None
    reorthogonalization: str | None = None
    protocol: str | None = None
    seed: int = 0
    tolerance: Tolerance = "auto"

    def wanted(self) -> dict[str, float]:
        """Return the width that is asked for by the name of each number; a ProblemError for what none can have."""
        if self.protocol is not None:
            if not (self.tolerance is None or is_default(self.tolerance)):
                raise ProblemError(
                    f"tolerance is {self.tolerance!r}, and protocol={self.protocol!r} takes all its steps; "
                    "leave one out"
                )
            return {}
        return tolerances(self.tolerance)

    def settings(self, size: int) -> LanczosSettings:
        """Return what they say for ``size`` parameters, with the defaults; a ProblemError for what does not fit."""
        if self.protocol is not None:
            return self._of_protocol(self.protocol).checked(size)
        block_size = self.block_size
        if isinstance(block_size, str):
            if block_size != "auto":
                raise ProblemError(f"block_size is {block_size!r}; wanted an integer or 'auto'")
            block_size = min(DEFAULT_BLOCK_SIZE, size)
        steps = DEFAULT_MAX_STEPS if self.max_steps is None else self.max_steps
        mode = "full" if self.reorthogonalization is None else self.reorthogonalization
        return LanczosSettings(block_size, steps, mode, seed=self.seed).checked(size)

    def _of_protocol(self, protocol: str) -> LanczosSettings:
        if not is_one_of(protocol, PROTOCOLS):
            raise ProblemError(f"protocol is {protocol!r}; wanted None or one of {', '.join(map(repr, PROTOCOLS))}")
        if self.block_size != "auto" or self.max_steps is not None or self.reorthogonalization is not None:
            raise ProblemError(
                f"protocol={protocol!r} sets block_size, max_steps and reorthogonalization; "
                "leave them out, or the protocol"
            )
        return replace(PROTOCOLS[protocol], seed=self.seed)


def as_problem(
    model: nn.Module | Problem,
    loss: Loss | None,
    data: Any,
    parameters: Selection,
    mode: str | None,
    count: Count | None,
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


def continued(options: RunOptions, report: Any, problem: Problem, operator: str) -> RunOptions:
    """Return the options that go on from a report, with its settings where none are given; a ProblemError otherwise."""
    if not isinstance(report, Report):
        raise ProblemError(f"continue_from is of type {type(report).__name__}; give the report of an earlier run")
    settings, remedy = report.settings, "give a report of the same problem and settings, or leave continue_from out"
    if report.problem.fingerprint != problem.fingerprint:
        raise ProblemError(f"continue_from is of other weights, parameters, mode or data than the problem; {remedy}")
    facts = report.problem
    same = (
        math.isclose(facts.loss, problem.loss_value, rel_tol=SAME_LOSS) and facts.function == problem.loss_description
    )
    if not same:
        raise ProblemError(
            f"continue_from has a loss of {facts.loss:.10g}, {facts.function}, and the problem one of "
            f"{problem.loss_value:.10g}, {problem.loss_description}: not the same function; {remedy}"
        )
    given = {
        "operator": (operator, settings.operator),
        "protocol": (options.protocol, None),
        "the report's protocol": (settings.protocol, None),
        "the report's group": (settings.group, None),
        "block_size": (options.block_size, settings.block_size),
        "reorthogonalization": (options.reorthogonalization, settings.reorthogonalization),
    }
    for name, (value, wanted) in given.items():
        if value != wanted and not (name in ("block_size", "reorthogonalization") and value in ("auto", None)):
            raise ProblemError(f"{name} is {value!r}, and continue_from needs {wanted!r}; {remedy}")
    if any(run.probe_kind not in RANDOM_PROBES for run in report.measure.tridiagonals):
        raise ProblemError("continue_from is of probes that are not random, so nothing is left to be narrowed by more")
    return replace(options, block_size=settings.block_size, reorthogonalization=settings.reorthogonalization)
