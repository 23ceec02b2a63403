"""What the checks of an input cost: their seconds in a default run of ``hesd.analyze``, as shares of its time.

python bench/check_costs.py [--steps 100] [mlp lenet gpt-s]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import workloads

import hesd_fast as hesd
from hesd_fast.hvp import derivative_check
from hesd_fast.problem import first_pass, model_state, reading_check, term_counts

CHECKS: dict[str, tuple[Any, str]] = {
    "products against differences of gradients": (derivative_check._Comparison, "run"),
    "digests of the weights": (model_state, "digests_of"),
    "copies of the weights": (model_state, "_copies_that_fit"),
    "mean or sum": (reading_check.ReadingCheck, "_read"),
    "shapes of batches": (term_counts, "BatchShape"),
    "other selection": (first_pass, "_check_selection"),
}
"""What each check is called, and the function that it is."""


@contextmanager
def timed(seconds: dict[str, float]) -> Iterator[None]:
    """Add up the seconds that the checks take meanwhile."""
    with ExitStack() as stack:
        for name, (owner, function) in CHECKS.items():
            stack.enter_context(mock.patch.object(owner, function, _timed(getattr(owner, function), name, seconds)))
        yield


def _timed(function: Callable[..., Any], name: str, seconds: dict[str, float]) -> Callable[..., Any]:
    def call(*arguments: Any, **options: Any) -> Any:
        before = time.perf_counter()
        try:
            return function(*arguments, **options)
        finally:
            seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - before

    return call


def main() -> None:
    """Print a line for each workload and check."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("workloads", nargs="*", default=["mlp", "lenet", "gpt-s"])
    parser.add_argument("--steps", type=int, help="Lanczos steps; those of a default run if left out")
    options = parser.parse_args()
    for name in options.workloads:
        seconds: dict[str, float] = {}
        problem = workloads.build(name).problem()
        with timed(seconds):
            before = time.perf_counter()
            report = hesd.analyze(problem, max_steps=options.steps, tolerance=None, progress=False)
            total = time.perf_counter() - before
        share = sum(seconds.values()) / total
        print(f"{name}: {report.cost.hvps} products by {report.cost.strategy}, {total:.1f} s, checks {share:.2%}")
        for check, spent in sorted(seconds.items(), key=lambda item: -item[1]):
            print(f"  {check:44} {spent:8.3f} s  {spent / total:.2%}")


if __name__ == "__main__":
    main()
