"""A contest checks before it times, takes turns, and reports what happened."""

from __future__ import annotations

import contest
import pytest


class Benchmark:
    """Stands in for the fixture of pytest-benchmark."""

    def __init__(self):
        self.extra_info = {}

    def pedantic(self, target, setup, rounds, warmup_rounds):
        assert warmup_rounds == 0
        for _ in range(rounds):
            setup()
            target()


def contestant(log, name, answer=1, seconds=0.0, clock=None, group="PyTorch"):
    def run():
        log.append(name)
        if clock is not None:
            clock[0] += seconds
        return answer

    def check(got):
        assert got == 1, f"got {got}"

    return contest.Contestant(name, run, check, group)


@pytest.fixture
def clock(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(contest.time, "perf_counter", lambda: now[0])
    return now


def test_contestants_take_turns_after_check_and_warm_up(clock):
    log = []

    def read():
        log.append("limit")
        clock[0] += 1

    limit = contest.Limit("read_bandwidth", "probe", read, 8.0)
    engine, *others = (contestant(log, name, seconds=1, clock=clock) for name in ("engine", "a", "b"))
    contest.hold(Benchmark(), engine, others, 3, limits=[limit])
    assert log == ["a", "b", "engine"] * 2 + ["limit", "a", "b", "engine"] * 3


def test_slow_ways_sit_out(clock):
    log = []
    others = [contestant(log, name, seconds=s, clock=clock) for name, s in (("fast", 1), ("slow", 2), ("slowest", 9))]
    contest.hold(Benchmark(), contestant(log, "engine", seconds=1, clock=clock), others, 3)
    assert {name: log.count(name) for name in ("fast", "slow", "slowest")} == {"fast": 5, "slow": 2, "slowest": 1}
    assert [other.warm_up for other in others] == [1, 2, 9]


@pytest.mark.parametrize("wrong", ["engine", "a"])
def test_wrong_answer_fails_before_anything_is_timed(wrong):
    log = []
    benchmark = Benchmark()
    engine, other = (contestant(log, name, answer=0 if name == wrong else 1) for name in ("engine", "a"))
    with pytest.raises(AssertionError, match=f"{wrong} gives a wrong answer"):
        contest.hold(benchmark, engine, [other], 3)
    assert log.count("engine") <= 1
    assert engine.times == other.times == []
    assert benchmark.extra_info == {}


def test_row_holds_rates_ratios_and_targets(clock):
    log = []
    engine = contestant(log, "engine", seconds=2.0, clock=clock, group="engine")
    others = [
        contestant(log, "fast", seconds=6.0, clock=clock),
        contestant(log, "slower", seconds=8.0, clock=clock),
        contestant(log, "slow", seconds=10.0, clock=clock),
        contestant(log, "alone", seconds=20.0, clock=clock, group="another"),
    ]

    def read():
        clock[0] += 1.0

    row = contest.hold(
        Benchmark(),
        engine,
        others,
        4,
        limits=[contest.Limit("read_bandwidth", "probe", read, 10e9)],
        gigabytes=12.0,
        gigaflops=4.0,
        targets=[contest.Target("ratio to PyTorch", 3.0), contest.Target("share of read bandwidth", 0.9)],
    )
    assert row["engine"]["times"] == [2.0] * 4
    assert row["ratios"]["PyTorch"] == {"fastest": "fast", "ratio": 3.0, "min": 3.0, "max": 3.0}
    assert row["ratios"]["another"]["ratio"] == 10.0
    assert row["competitors"][2] == {"name": "slow", "group": "PyTorch", "warm_up": 10.0}
    assert row["competitors"][1]["median"] == 8.0
    assert (row["gigabytes_per_second"], row["gigaflops_per_second"]) == (6.0, 2.0)
    assert row["share_of_read_bandwidth"] == 0.6
    assert [target["met"] for target in row["targets"]] == [True, False]


def test_best_probe_of_a_kind_counts():
    limits = [contest.Limit("read_bandwidth", name, lambda: None, 1e9) for name in ("slow", "fast")]
    limits[0].times, limits[1].times = [1.0, 1.0, 2.0], [0.5, 0.25, 0.5]
    best = contest.best_limits(limits, every=True)["read_bandwidth"]
    assert (best["name"], best["median"], best["max"]) == ("fast", 2.0, 4.0)
    assert best["probes"] == {"slow": 1.0, "fast": 2.0}
