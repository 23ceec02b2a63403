"""Options, sizes and the collection of results of the benchmarks."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import contest
import machine
import pytest
import results_file
import torch

FOLDER = Path(__file__).parent
ROWS = pytest.StashKey[dict[str, dict[str, Any]]]()
FAILED = pytest.StashKey[set[str]]()
WRITTEN = pytest.StashKey[str]()


@dataclass(frozen=True)
class Accuracy:
    """A contest at equal accuracy: our probes and steps, the peer's, and those of each half of the truth."""

    probes: int
    steps: int
    peer_probes: int
    peer_steps: int
    truth_probes: int
    truth_steps: int


@dataclass(frozen=True)
class Sizes:
    """How large the benches are."""

    name: str
    panel_lengths: dict[int, int]  # block size: n
    kernel_length: int
    basis: int
    gemm: int
    images: dict[str, int]  # or sequences
    tiny_models: bool
    steps: dict[str, int]
    strategies_of: tuple[str, ...]
    density_probes: int
    density_steps: int
    accuracy: dict[str, Accuracy]
    accuracy_margin: float
    accuracy_seeds: int
    accuracy_rounds: int
    diagonal_length: int
    diagonal_steps: int
    report_length: int  # order of the matrix whose report is computed
    report_share: float  # of the blocks and steps that the benches name
    short_rounds: int
    rounds: int
    long_rounds: int
    end_to_end_rounds: int
    product_rounds: int


SIZES = {
    "full": Sizes(
        name="full",
        panel_lengths={1: 8_000_000, 4: 4_000_000, 8: 4_000_000},
        kernel_length=2_000_000,
        basis=64,
        gemm=2048,
        images={"mlp": 256, "lenet": 512, "resnet20": 64, "gpt-s": 8},
        tiny_models=False,
        steps={"mlp": 60, "lenet": 30},
        strategies_of=("mlp", "lenet", "resnet20", "gpt-s"),
        density_probes=4,
        density_steps=10,
        accuracy={"mlp": Accuracy(8, 20, 10, 80, 20, 40), "lenet": Accuracy(16, 20, 10, 80, 20, 40)},
        accuracy_margin=0.05,
        accuracy_seeds=2,
        accuracy_rounds=2,
        diagonal_length=2_000_000,
        diagonal_steps=40,
        report_length=8000,
        report_share=1.0,
        short_rounds=9,
        rounds=7,
        long_rounds=5,
        end_to_end_rounds=3,
        product_rounds=3,
    ),
    # Lengths that are no multiple of a chunk, so that edges are checked too.
    "smoke": Sizes(
        name="smoke",
        panel_lengths={1: 40_003, 4: 20_003, 8: 20_003},
        kernel_length=20_003,
        basis=16,
        gemm=128,
        images={"mlp": 8, "lenet": 8, "resnet20": 2, "gpt-s": 2},
        tiny_models=True,
        steps={"mlp": 6, "lenet": 6},
        strategies_of=("mlp", "lenet"),  # tracing takes its time however small the others are
        density_probes=2,
        density_steps=4,
        accuracy={"mlp": Accuracy(8, 10, 2, 10, 16, 12), "lenet": Accuracy(8, 10, 2, 10, 16, 12)},
        accuracy_margin=1e9,
        accuracy_seeds=2,
        accuracy_rounds=1,
        diagonal_length=20_003,
        diagonal_steps=8,
        report_length=400,
        report_share=0.1,
        short_rounds=2,
        rounds=2,
        long_rounds=2,
        end_to_end_rounds=2,
        product_rounds=1,
    ),
}


def pytest_addoption(parser):
    group = parser.getgroup("hesd-fast benches")
    group.addoption("--sizes", choices=sorted(SIZES), default="full", help="how large the benches are")
    group.addoption(
        "--results",
        type=Path,
        help="file of results that the rows are merged into (default: bench/results/<machine>.json; in smoke size a "
        "temporary file)",
    )


def pytest_configure(config):
    config.stash[ROWS] = {}
    config.stash[FAILED] = set()


@pytest.fixture(scope="session")
def sizes(request):
    return SIZES[request.config.getoption("--sizes")]


@pytest.fixture
def hold(request, benchmark):
    """The function `contest.hold` of this bench; its row goes into the results under the name of the bench."""

    def hold(engine, competitors, rounds, *, about, **options):
        row = contest.hold(benchmark, engine, competitors, rounds, **options)
        record(request, {"about": about, **row})
        return row

    return hold


def record(request, row):
    """Keep a row for the file of results."""
    request.config.stash[ROWS][_name(request.node.nodeid)] = row


def _name(nodeid: str) -> str:
    return nodeid.rsplit("/", 1)[-1]


def result_file(config) -> Path:
    given: Path | None = config.getoption("--results")
    if given is not None:
        return given
    if config.getoption("--sizes") != "full":
        return Path(tempfile.mkdtemp(prefix="hesd-bench-")) / "results.json"
    return FOLDER / "results" / f"{machine.label()}.json"


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item):
    outcome = yield
    report = outcome.get_result()
    if report.failed:
        name = _name(report.nodeid)
        item.config.stash[FAILED].add(name)
        item.config.stash[ROWS].pop(name, None)


def pytest_sessionfinish(session):
    config = session.config
    rows, failed = config.stash.get(ROWS, {}), config.stash.get(FAILED, set())
    if rows or failed:
        path = result_file(config)
        command = " ".join(("python -m pytest", *map(str, config.invocation_params.args)))
        results_file.merge(path, machine.machine(), machine.run_facts(command), rows, failed)
        config.stash[WRITTEN] = f"{len(rows)} rows written to {path}"


def pytest_terminal_summary(terminalreporter, config):
    rows = config.stash.get(ROWS, {})
    if not rows:
        return
    terminalreporter.section("engine against PyTorch")
    for name, row in rows.items():
        if "engine" not in row:
            continue
        ratios = ", ".join(
            f"{found['ratio']:.2f} x {group} ({found['fastest']})" for group, found in row["ratios"].items()
        )
        share = f", {row['share_of_read_bandwidth']:.0%} of read bandwidth" if "share_of_read_bandwidth" in row else ""
        terminalreporter.line(f"{name}: {row['engine']['median'] * 1e3:.3g} ms, {ratios}{share}")
        for target in row["targets"]:
            verdict = "met" if target["met"] else "MISSED"
            terminalreporter.line(f"    {target['figure']}: {target['got']:.3g}, wanted {target['wanted']}: {verdict}")
    terminalreporter.line(config.stash[WRITTEN])


@pytest.fixture(scope="session", autouse=True)
def _torch_defaults():
    torch.manual_seed(0)
