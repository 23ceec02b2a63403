"""Contests: the engine and its competitors do the same job in turn, each checked before it is timed."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

SLOW = 1.5
"""A competitor slower than this many times the fastest of its group in the warm-up takes no part in the rounds."""

HOPELESS = 5.0
"""One slower than this at its check, cold as everyone is then, is not even warmed up."""


def _nothing() -> None:
    pass


@dataclass
class Contestant:
    """One way to do the job of a contest.

    Attributes
    ----------
    name : str
        What the tables call it.
    run : callable
        Does the job; what is timed.
    check : callable
        Takes what ``run`` returned and raises an AssertionError when it is not the truth.
    group : str
        Competitors of one group are alternatives: the fastest of them counts.
    prepare : callable
        Restores the inputs before each run; not timed.
    products : callable, optional
        Seconds that the last run spent in Hessian products.
    """

    name: str
    run: Callable[[], Any]
    check: Callable[[Any], None]
    group: str = "PyTorch"
    prepare: Callable[[], object] = _nothing
    products: Callable[[], float] | None = None
    times: list[float] = field(default_factory=list)
    outside: list[float] = field(default_factory=list)
    warm_up: float = 0.0

    def verify(self) -> None:
        """Run once and check the answer; raises an AssertionError if it is wrong."""
        self.prepare()
        before = time.perf_counter()
        answer = self.run()
        self.warm_up = time.perf_counter() - before
        try:
            self.check(answer)
        except AssertionError as error:
            raise AssertionError(f"{self.name} gives a wrong answer, so nothing was timed: {error}") from error

    def time(self) -> float:
        """Return the seconds of one run."""
        self.prepare()
        before = time.perf_counter()
        self.run()
        return time.perf_counter() - before

    def round(self) -> None:
        """Time one run and keep what it took."""
        seconds = self.time()
        self.times.append(seconds)
        if self.products is not None:
            self.outside.append(1.0 - self.products() / seconds)

    def summary(self) -> dict[str, Any]:
        """Return median, minimum, maximum and all times, in seconds; a way left out has its warm-up alone."""
        entry: dict[str, Any] = {"name": self.name, "group": self.group}
        entry.update(_spread(self.times) if self.times else {"warm_up": _short(self.warm_up)})
        if self.outside:
            entry["outside_products"] = round(statistics.median(self.outside), 4)
        return entry


@dataclass
class Limit:
    """What the machine can do at most: a probe of the memory or the arithmetic that runs in every round.

    Attributes
    ----------
    kind : str
        ``"read_bandwidth"``, ``"gemm_float32"`` or ``"gemm_float64"``; the best probe of a kind counts.
    name : str
        How it is measured.
    run : callable
        The probe.
    work : float
        Bytes or floating-point operations of one run.
    """

    kind: str
    name: str
    run: Callable[[], Any]
    work: float
    times: list[float] = field(default_factory=list)

    def round(self) -> None:
        """Time one run and keep what it took."""
        before = time.perf_counter()
        self.run()
        self.times.append(time.perf_counter() - before)


@dataclass
class Target:
    """A figure that a row wants to reach: a ratio to a group of competitors, or a share of the read bandwidth."""

    figure: str
    wanted: float


def hold(
    benchmark: Any,
    engine: Contestant,
    competitors: Sequence[Contestant],
    rounds: int,
    *,
    limits: Sequence[Limit] = (),
    gigabytes: float | None = None,
    gigaflops: float | None = None,
    targets: Sequence[Target] = (),
) -> dict[str, Any]:
    """Check everyone, warm everyone up, let everyone run in turn for some rounds, and return the row of the table.

    Parameters
    ----------
    benchmark
        The fixture of pytest-benchmark. It times the engine; the others run in the setup of each of its rounds.
    engine, competitors
        Who takes part.
    rounds : int
        Runs of each.
    limits : sequence of Limit
        Run in every round as well.
    gigabytes, gigaflops : float, optional
        Memory traffic and arithmetic of one run, as the contract of the kernel counts them.
    targets : sequence of Target
        Shown as met or missed; nothing fails over them.
    """
    for contestant in (*competitors, engine):
        contestant.verify()
    for contestant in (*_near_the_fastest(competitors, HOPELESS), engine):
        contestant.warm_up = contestant.time()
    racing = _near_the_fastest(competitors, SLOW)

    def others() -> None:
        for limit in limits:
            limit.round()
        for competitor in racing:
            competitor.round()
        engine.prepare()

    def ours() -> None:
        before = time.perf_counter()
        engine.run()
        seconds = time.perf_counter() - before
        engine.times.append(seconds)
        if engine.products is not None:
            engine.outside.append(1.0 - engine.products() / seconds)

    benchmark.pedantic(ours, setup=others, rounds=rounds, warmup_rounds=0)
    work = {"gigabytes": gigabytes, "gigaflops": gigaflops}
    row = _row(engine, competitors, racing, limits, work, targets)
    benchmark.extra_info.update(row)
    return row


def _near_the_fastest(competitors: Sequence[Contestant], factor: float) -> list[Contestant]:
    best = {c.group: min(o.warm_up for o in competitors if o.group == c.group) for c in competitors}
    return [c for c in competitors if c.warm_up <= factor * best[c.group]]


def _row(
    engine: Contestant,
    competitors: Sequence[Contestant],
    racing: Sequence[Contestant],
    limits: Sequence[Limit],
    work: dict[str, float | None],
    targets: Sequence[Target],
) -> dict[str, Any]:
    median = statistics.median(engine.times)
    row: dict[str, Any] = {"engine": engine.summary(), "competitors": [c.summary() for c in competitors]}
    ratios = {}
    for group in dict.fromkeys(c.group for c in racing):
        fastest = min((c for c in racing if c.group == group), key=lambda c: statistics.median(c.times))
        by_round = [theirs / ours for theirs, ours in zip(fastest.times, engine.times, strict=True)]
        ratios[group] = {
            "fastest": fastest.name,
            "ratio": _short(statistics.median(fastest.times) / median),
            "min": _short(min(by_round)),
            "max": _short(max(by_round)),
        }
    row["ratios"] = ratios
    row["limits"] = best_limits(limits)
    figures = {f"ratio to {group}": found["ratio"] for group, found in ratios.items()}
    for unit, amount in work.items():
        if amount is not None:
            row[unit] = _short(amount)
            row[f"{unit}_per_second"] = _short(amount / median)
    if "gigabytes" in row and "read_bandwidth" in row["limits"]:
        share = row["gigabytes_per_second"] / row["limits"]["read_bandwidth"]["median"]
        row["share_of_read_bandwidth"] = figures["share of read bandwidth"] = _short(share)
    row["targets"] = [
        {"figure": t.figure, "wanted": t.wanted, "got": figures[t.figure], "met": figures[t.figure] >= t.wanted}
        for t in targets
    ]
    return row


def best_limits(limits: Sequence[Limit], every: bool = False) -> dict[str, Any]:
    """Return for each kind the best probe by its median, as 10^9 per second; with ``every``, all medians as well."""
    found: dict[str, Any] = {}
    for limit in limits:
        rates = [limit.work / seconds / 1e9 for seconds in limit.times]
        entry = {"name": limit.name, **_spread(rates)}
        del entry["times"]
        if limit.kind not in found or entry["median"] > found[limit.kind]["median"]:
            found[limit.kind] = entry
    if every:
        for kind, entry in found.items():
            probes = [limit for limit in limits if limit.kind == kind]
            entry["probes"] = {p.name: _short(p.work / statistics.median(p.times) / 1e9) for p in probes}
    return found


def _spread(values: Sequence[float]) -> dict[str, Any]:
    return {
        "median": _short(statistics.median(values)),
        "min": _short(min(values)),
        "max": _short(max(values)),
        "times": [_short(value) for value in values],
    }


def _short(value: float) -> float:
    return float(f"{value:.4g}")
