"""Which strategy is the fastest for a problem: each is tried on the first batch, within a small share of the run."""

from __future__ import annotations

import time
import warnings
from dataclasses import dataclass

import torch

from hesd_fast.engine import cuda
from hesd_fast.engine.memory import MemoryWatch, resident_memory
from hesd_fast.errors import HESDWarning, OperatorError, first_line
from hesd_fast.hvp import STRATEGIES
from hesd_fast.hvp.base import Strategy, probe_vectors
from hesd_fast.hvp.reverse_over_reverse import DoubleBackward, KeptGraph
from hesd_fast.hvp.second_derivatives import Gradient
from hesd_fast.problem.autograd_graph import graph_nodes
from hesd_fast.problem.prepared_problem import PreparedProblem

SHARE = 0.05
"""Part of the predicted run that trials may take."""

SHORT_RUN = 2.0
"""Seconds below which a run is not worth a trial: it takes kept graphs, which do the same work or less, bit for bit."""

WORTH_KEEPING = 8
"""Panels of one batch, in all, below which a short run does not even check that graphs can be kept."""

SHORT_PANEL = 0.1
"""Seconds below which a panel is timed again, up to three times in all."""

COMPILING_SECONDS = 8.0, 0.04
"""What compiling takes about: once, and for each operation of a gradient's graph. Only decides about trials."""

CHECKED_PANELS = 3
"""Panels alive while a strategy is checked: the vectors, the products wanted, and those found."""

ORDER = (
    "kept_graph",
    "kept_graph_batched",
    "double_backward_batched",
    "forward_over_reverse",
    "compiled",
)
"""Strategies in the order in which they are tried, after "double_backward"."""


@dataclass(frozen=True)
class Trial:
    """What was found of one strategy.

    Attributes
    ----------
    strategy : str
        Its name.
    seconds : float or None
        Predicted for one panel over all batches, once everything that can be kept is kept; None where not measured.
    first_seconds : float or None
        What the first panel takes beyond that.
    kept_bytes : int or None
        Predicted bytes kept from one product to the next.
    peak_bytes : int or None
        Most memory of the process seen during the trial, without the vectors; None where there was none, where the
        system does not say, or for problems on a device.
    note : str
        Why it was not tried, or what it said; else empty.
    """

    strategy: str
    seconds: float | None = None
    first_seconds: float | None = None
    kept_bytes: int | None = None
    note: str = ""
    peak_bytes: int | None = None

    def total(self, panels: int) -> float:
        """Return the predicted seconds of so many panels; infinite where not measured."""
        if self.seconds is None or self.first_seconds is None:
            return float("inf")
        return self.first_seconds + panels * self.seconds


@dataclass(frozen=True)
class ProductPlan:
    """How products will be made, and why.

    Attributes
    ----------
    strategy : str
        The chosen one.
    trials : tuple of Trial
        All that were considered.
    block_size, panels : int
        What was planned for.
    seconds : float
        Predicted seconds of all panels.
    planning_seconds : float
        What planning took.
    peak_bytes : int or None
        Predicted peak of the process's memory while products are made, without the vectors that are multiplied and
        their products; None where the system does not say, or for problems on a device.
    """

    strategy: str
    trials: tuple[Trial, ...]
    block_size: int
    panels: int
    seconds: float
    planning_seconds: float
    peak_bytes: int | None = None

    def __str__(self) -> str:
        lines = [f"products: {self.strategy}, {self.panels} panels of {self.block_size}, about {self.seconds:.3g} s"]
        for trial in sorted(self.trials, key=lambda trial: trial.total(self.panels)):
            found = trial.note
            if trial.seconds is not None:
                kept = f", keeps {(trial.kept_bytes or 0) / 2**20:.3g} MiB" if trial.kept_bytes else ""
                found = f"{trial.seconds:.3g} s a panel{kept}" + (f" ({trial.note})" if trial.note else "")
            lines.append(f"  {trial.strategy:24} {found}")
        return "\n".join(lines)


def choose(
    problem: PreparedProblem,
    block_size: int,
    panels: int,
    *,
    compensated: bool = False,
    memory_limit: int | None = None,
    share: float = SHARE,
) -> tuple[Strategy, ProductPlan]:
    """Return the fastest exact strategy that fits, ready for use, and how it was found.

    Every strategy that is measured is first compared with plain double backward. Results of a run are those of the
    strategy to the last bit, so name one where runs have to repeat bit for bit.

    Parameters
    ----------
    problem : PreparedProblem
        What to multiply by.
    block_size, panels : int
        Vectors of a panel, and panels of the run.
    compensated, memory_limit
        As in :class:`~hesd_fast.hvp.Strategy`.
    share : float
        Part of the predicted run that trials may take.

    Raises
    ------
    ProblemError, OperatorError
        If the problem cannot be used at all.
    """
    started = time.perf_counter()
    plain = DoubleBackward(compensated, memory_limit)
    with problem.session(), MemoryWatch() as watch:
        before = time.perf_counter()
        plain.prepare(problem)
        cuda.runtime.synchronize(problem.device)
        trials = _Trials(plain, block_size, panels, time.perf_counter() - before, watch)
        budget = share * trials.results[0].total(panels)
        if trials.results[0].total(panels) < SHORT_RUN:
            trials.leave_out(ORDER[1:], "not tried: the run is short")
            trials.keep_graphs()
        else:
            for name in ORDER:
                trials.consider(name, budget - (time.perf_counter() - started))
        strategy, best = trials.finish()
        peak_bytes = trials.peak_with(strategy, best)
    plan = ProductPlan(
        strategy.name,
        tuple(trials.results),
        block_size,
        panels,
        best.total(panels),
        time.perf_counter() - started,
        peak_bytes,
    )
    return strategy, plan


def give_up(strategy: Strategy) -> None:
    """Release what a strategy holds, also to the device: it may lie in pieces that another one cannot use."""
    strategy.release()
    cuda.runtime.release_unused()


class _Trials:
    """Trials on one batch, and the fastest strategy so far."""

    def __init__(self, plain: Strategy, block_size: int, panels: int, one_product: float, watch: MemoryWatch) -> None:
        problem = self.problem = plain.problem
        self.watch = watch
        self.resident = resident_memory()
        self.vector_bytes = problem.size * problem.dtype.itemsize
        self.panels = panels
        self.block_size = block_size
        self.memory_limit = plain.memory_limit
        self.rows = probe_vectors(problem, block_size)
        # A forward and two backward passes, the first of their kind, say at least what a panel takes.
        self.plain_seconds = one_product * (3.0 + 6.0 * block_size) / 9.0
        note = "estimated: the run is short"
        peak = self._peak_without(1)  # of preparing, which multiplies a vector
        if self.plain_seconds * problem.batch_count * panels >= SHORT_RUN:
            self.plain_seconds, note = self._measure(plain), ""
            peak = self._peak_without(block_size)
        self.tried: list[Strategy] = [plain]
        self.results = [Trial(plain.name, self.plain_seconds * problem.batch_count, 0.0, 0, note, peak)]

    def leave_out(self, names: tuple[str, ...], note: str) -> None:
        self.results += [Trial(name, note=note) for name in names]

    def consider(self, name: str, seconds_left: float) -> None:
        """Try a strategy if there is time, and keep its result."""
        kind = STRATEGIES[name]
        if self.block_size == 1 and name.endswith("_batched"):
            return  # the same work as for one vector
        strategy = kind(self.tried[0].compensated, self.memory_limit)
        for other in self.tried:
            strategy.take_over(other)
        expected = 3.0 * self.plain_seconds
        if kind.family == "compiled":
            expected += COMPILING_SECONDS[0] + COMPILING_SECONDS[1] * self._operations()
        if expected > seconds_left and name == KeptGraph.name:
            self.keep_graphs()
            return
        if expected > seconds_left:
            self.leave_out(
                (name,), f"not tried: about {expected:.2g} s, {max(seconds_left, 0.0):.2g} s left for trials"
            )
            return
        before = time.perf_counter()
        strategy.problem = self.problem
        if not self._serves(strategy):
            return
        checked = time.perf_counter() - before
        self.watch.peak()  # from here on
        refusal = None
        try:
            seconds = self._measure(strategy)
        except torch.cuda.OutOfMemoryError as error:
            refusal = first_line(error)
        if refusal is not None:
            self._refuse(strategy, refusal)
            return
        peak = self._peak_without(self.block_size)
        batches, kept = self.problem.batch_count, self._batches_kept(strategy) if kind.family else 0
        anew = batches - kept if kind.family else 0
        panel = seconds * (batches - anew) + self.plain_seconds * anew
        once = strategy.once_seconds
        first = once + max(checked - once - 3.0 * seconds, 0.0) * kept
        note = f"keeps {kept} of {batches} batches" if kind.family and kept < batches else ""
        self.tried.append(strategy)
        self.results.append(Trial(name, panel, first, strategy.kept_bytes * kept, note, peak))

    def keep_graphs(self) -> None:
        """Take kept graphs without a measurement: the operations of plain double backward, some of them done once.

        Their check costs two products on one batch, and each panel saves a third of one on every batch.
        """
        batches = self.problem.batch_count
        if self.panels * batches < WORTH_KEEPING:
            self.leave_out((KeptGraph.name,), "not tried: the run is short")
            return
        plain = self.tried[0]
        strategy = KeptGraph(plain.compensated, self.memory_limit)
        strategy.problem = self.problem
        self.watch.peak()
        if not self._serves(strategy):
            return
        peak = self._peak_without(self.block_size + CHECKED_PANELS * strategy.checked_vectors)
        kept = self._batches_kept(strategy)
        share = 6.0 * self.block_size / (3.0 + 6.0 * self.block_size)  # the forward and first backward pass are done
        self.tried.append(strategy)
        self.results.append(
            Trial(
                strategy.name,
                self.plain_seconds * (share * kept + batches - kept),
                0.0,
                strategy.kept_bytes * kept,
                "not measured: the run is short",
                peak,
            )
        )

    def _batches_kept(self, strategy: Strategy) -> int:
        """Return of how many batches a strategy can keep what it keeps of the first."""
        batches = self.problem.batch_count
        if self.memory_limit is None or strategy.kept_bytes == 0:
            return batches
        return min(batches, self.memory_limit // strategy.kept_bytes)

    def _serves(self, strategy: Strategy) -> bool:
        """Whether a strategy multiplies as it should on the first batch, and can keep it; if not, note why."""
        refusal = None
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error", HESDWarning)  # what cannot be compiled is no candidate
                strategy.check()
        except (OperatorError, HESDWarning, torch.cuda.OutOfMemoryError) as error:
            refusal = str(error)
        if refusal is not None:
            self._refuse(strategy, refusal)
            return False
        if strategy.family and not strategy._kept:
            self.leave_out((strategy.name,), "does not fit: what it keeps of one batch is more than the memory allowed")
            return False
        return True

    def _refuse(self, strategy: Strategy, reason: str) -> None:
        """Note why a strategy does not serve; called after the error, whose frames hold what it had made."""
        give_up(strategy)
        self.leave_out((strategy.name,), f"refused: {reason}")

    def finish(self) -> tuple[Strategy, Trial]:
        """Return the fastest, and release the others."""
        by_name = {strategy.name: strategy for strategy in self.tried}
        best = min((trial for trial in self.results if trial.strategy in by_name), key=lambda t: t.total(self.panels))
        for strategy in self.tried:
            if strategy.name != best.strategy:
                strategy.release()
        return by_name[best.strategy], best

    def peak_with(self, strategy: Strategy, best: Trial) -> int | None:
        """Return the predicted peak of memory while all batches are multiplied, without vectors.

        Trials saw the first batch: what a product takes for a moment grows with the largest, what is kept with all.
        """
        after = self._peak_without(self.block_size)
        if best.peak_bytes is None or after is None or self.resident is None:
            return None
        peak, sizes = max(best.peak_bytes, after), self.problem.batch_bytes
        first = max(sizes[0], 1)
        kept = (best.kept_bytes or 0) * sum(sizes) / (first * len(sizes))
        if self.memory_limit is not None:
            kept = min(kept, self.memory_limit)
        growth = max(peak - self.resident - strategy.kept_bytes, 0) * (max(max(sizes) / first, 1.0) - 1.0)
        return peak + round(growth + max(kept - strategy.kept_bytes, 0))

    def _peak_without(self, vectors: int) -> int | None:
        """Return the most memory since the last call, without so many vectors; None for that of another device."""
        peak = self.watch.peak()
        return None if peak is None or self.problem.device.type != "cpu" else peak - vectors * self.vector_bytes

    def _operations(self) -> int:
        gradient = Gradient.of(self.problem, self.problem.first_term().evaluate())
        return sum(1 for _ in graph_nodes([entry.grad_fn for entry in gradient.entries]))

    def _measure(self, strategy: Strategy) -> float:
        """Return the seconds of one panel on the batch: the least of a few where they are short."""
        seconds: list[float] = []
        while len(seconds) < 3 and sum(seconds) < SHORT_PANEL:
            term = self.problem.first_term()
            cuda.runtime.synchronize(self.problem.device)
            before = time.perf_counter()
            for _ in strategy.attempt(term, self.rows):
                pass
            cuda.runtime.synchronize(self.problem.device)
            seconds.append(time.perf_counter() - before)
        return min(seconds)
