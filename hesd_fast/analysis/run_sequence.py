"""The runs on one operator, one after another: the first, and those with fresh probes that follow it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hesd_fast.analysis.run_plan import RunPlan
from hesd_fast.analysis.stopping import MOST_PROBES, StoppingRule
from hesd_fast.lanczos.block_tridiagonal import ORTHOGONAL_MODES, BlockTridiagonal
from hesd_fast.lanczos.lanczos_run import LanczosRun
from hesd_fast.lanczos.options import LanczosSettings
from hesd_fast.operators.base import ProblemOperator
from hesd_fast.report.report import Report

WHOLE = ""
"""The name of the one run that is of all parameters; no group is called so."""


@dataclass(frozen=True)
class Goal:
    """What runs are to reach, and from where.

    Attributes
    ----------
    wanted : dict of str to float
        The tolerance of each number, see :func:`~hesd_fast.analysis.stopping.tolerances`.
    is_asked_for : bool
        Whether the user has named it, and is warned where it is not met.
    keep_run : bool
        Whether the report keeps the first run, which can then go on.
    earlier : Report or None
        A report of the same operator that is to be continued.
    """

    wanted: dict[str, float]
    is_asked_for: bool = False
    keep_run: bool = False
    earlier: Report | None = None


class RunSequence:
    """Makes the runs on one operator as they are needed, and keeps what they leave.

    Parameters
    ----------
    operator : ProblemOperator
        Says what the matrix is, and is not called.
    plan : RunPlan
        Settings of the first run, whose steps are those of all runs together.
    group : str
        The group of parameters that the operator is of; WHOLE for all of them.
    goal : Goal
        When it is enough.
    """

    def __init__(self, operator: ProblemOperator, plan: RunPlan, group: str, goal: Goal) -> None:
        self._operator, self._plan, self._group, self._goal = operator, plan, group, goal
        self._settings = plan.settings.for_size(operator.size)
        self._rule = StoppingRule(goal.wanted, self._settings, self._widest_run())
        earlier = goal.earlier
        self._done = [] if earlier is None else list(earlier.measure.tridiagonals)
        self._superseded = 0 if earlier is None else earlier.cost.hvps - sum(run.products for run in self._done)
        self._first = None if earlier is None else earlier.first_run
        self._may_go_on = self._first is not None
        if self._first is not None and self._first.step > self._done[0].steps:  # the report was continued before
            self._done[0] = self._first.result()
        self._current: LanczosRun | None = None

    @property
    def done(self) -> Sequence[BlockTridiagonal]:
        """What each run has left, the first one first; that of the whole space alone, once a run has it."""
        return tuple(self._done)

    @property
    def products(self) -> int:
        """Vectors multiplied so far, in all runs."""
        done = self._done[1:] if self._first is not None and self._current is self._first else self._done
        at_work = 0 if self._current is None else self._current.products
        return self._superseded + sum(run.products for run in done) + at_work

    @property
    def first_run(self) -> LanczosRun | None:
        """The first run, if it was to be kept."""
        return self._first if self._goal.keep_run else None

    def next_run(self) -> LanczosRun | None:
        """Return the run that is to be driven now, or None where those before it were enough."""
        if not self._done:
            self._current = self._first = self._new_run(self._settings)
        elif self._first_goes_on():
            self._current = self._first
        elif (next_run := self._probes_and_steps()) != (0, 0):
            (probes, steps), before = next_run, sum(one.probes for one in self._done)
            settings = replace(self._settings, block_size=probes, max_steps=steps, first_probe=before)
            self._current = self._new_run(settings)
        return self._current

    def is_enough(self) -> bool:
        """Return whether the run at work, which has taken a step, is not to take another."""
        run = self._current
        assert run is not None
        if run is not self._first or not self._rule.is_due(run.step, self._done[1:]):
            return False
        return self._rule.is_enough([run.so_far(), *self._done[1:]])

    def end_run(self) -> None:
        """Keep what the run at work has left, and let go of its vectors unless they are asked for."""
        run, self._current = self._current, None
        if run is None:
            return
        if run is self._first:
            self._done[:1] = [run.result()]
            self._may_go_on = False
        else:
            self._done.append(run.result())
        if self._done[-1].knows_all:
            self._superseded += sum(one.products for one in self._done[:-1])
            self._done[:-1] = []
        if not self._goal.keep_run:
            self._first = None

    def _first_goes_on(self) -> bool:
        """Return whether the first run of an earlier report is there and takes more steps; it is asked once."""
        may, self._may_go_on = self._may_go_on, False
        if not may or self._first is None or self._first.finished:
            return False
        return not (self._rule.is_due(self._first.step, self._done[1:]) and self._rule.is_enough(self._done))

    def _probes_and_steps(self) -> tuple[int, int]:
        """Return those of a run with fresh probes; 0 where none follows."""
        if not self._goal.wanted and self._goal.earlier is None:
            return 0, 0
        return self._rule.next_run(self._done)

    def _widest_run(self) -> int:
        """Return how many probes a run may have: more than the first one's where vectors are as many in all."""
        in_memory = self._plan.memory.basis.place == "memory"
        if in_memory and self._settings.reorthogonalization in ORTHOGONAL_MODES:
            return max(MOST_PROBES, self._settings.block_size)
        return self._settings.block_size

    def _new_run(self, settings: LanczosSettings) -> LanczosRun:
        size, memory = self._operator.size, self._plan.memory
        probes = _unit_vectors(self._operator) if settings.block_size == size else None
        whole = replace(memory.basis, rows=settings.history_rows(size))
        basis = whole if self._group == WHOLE else memory.basis_of(settings, size)
        return LanczosRun(self._operator, settings, basis, probes)


def _unit_vectors(operator: ProblemOperator) -> Tensor:
    """Return as many as there are parameters, as long as random probes: so few random ones often span less."""
    return torch.eye(operator.size, dtype=operator.dtype, device=operator.device).mul_(operator.size**0.5)
