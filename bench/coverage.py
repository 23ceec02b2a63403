"""How often the stated intervals hold the truth, with the stopping rule on: the tables of docs/coverage.md.

.venv/bin/python bench/coverage.py

Small networks at all stages of training, whose dense Hessians are computed in float64 at the same weights. Each run has
probes of its own. No figure is a timing.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import hesd_fast as hesd

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "bench" / "results" / "coverage.json"

SAMPLES = 48
STAGES = ("start", "early", "trained", "overfitted")
ENOUGH = {"trained": 1e-2, "overfitted": 1e-6}
"""Losses at which training ends."""

BLOCK_SIZES = (1, 2, 4, 8)
GOALS: dict[str, tuple[Any, int]] = {
    "auto": ("auto", 100),
    "named": ({"r_e": 0.01, "trace": 0.1, "k_mass": 0.1}, 200),
}
"""Tolerances, and the steps that a run may take for them."""

TRUTH_ROUNDING = 1e-12
"""Error of the dense eigenvalues, relative to the largest one."""


class Convolutional(nn.Module):
    """Two convolutions and a classifier of images with 36 pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.AvgPool2d(2), nn.Conv2d(4, 8, 3), nn.ReLU(), nn.Flatten()
        )
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(x.view(-1, 1, 6, 6)))


def perceptron(activation: type[nn.Module], outputs: int, inputs: int = 10, width: int = 20) -> nn.Module:
    """A network of two hidden layers."""
    layers = [nn.Linear(inputs, width), activation(), nn.Linear(width, width // 2), activation()]
    return nn.Sequential(*layers, nn.Linear(width // 2, outputs))


@dataclass(frozen=True)
class Kind:
    """An architecture with the loss that it is trained on."""

    model: Callable[[], nn.Module]
    inputs: int
    criterion: nn.Module


KINDS = {
    "relu, cross-entropy": Kind(lambda: perceptron(nn.ReLU, 4), 10, nn.CrossEntropyLoss()),
    "tanh, cross-entropy": Kind(lambda: perceptron(nn.Tanh, 4), 10, nn.CrossEntropyLoss()),
    "convolutions, cross-entropy": Kind(Convolutional, 36, nn.CrossEntropyLoss()),
    "gelu, squared error": Kind(lambda: perceptron(nn.GELU, 2), 10, nn.MSELoss()),
    "relu, squared error": Kind(lambda: perceptron(nn.ReLU, 2), 10, nn.MSELoss()),
}


@dataclass(frozen=True)
class Case:
    """A network, its data and its spectrum."""

    name: str
    stage: str
    model: nn.Module
    criterion: nn.Module
    data: tuple[Tensor, Tensor]
    loss: float
    eigenvalues: np.ndarray


def cases() -> Iterator[Case]:
    """Yield every kind at every stage."""
    for number, (name, kind) in enumerate(KINDS.items()):
        torch.manual_seed(number)
        x = torch.randn(SAMPLES, kind.inputs, dtype=torch.float64)
        outputs = kind.model().double()(x).shape[1]
        if isinstance(kind.criterion, nn.CrossEntropyLoss):
            y: Tensor = torch.randint(outputs, (SAMPLES,))
        else:
            y = torch.randn(SAMPLES, outputs, dtype=torch.float64)
        model = kind.model().double()
        for stage in STAGES:
            train(model, kind.criterion, x, y, stage)
            yield case(name, stage, copy.deepcopy(model), kind.criterion, x, y)


def train(model: nn.Module, criterion: nn.Module, x: Tensor, y: Tensor, stage: str) -> None:
    """Train on from the stage before."""
    steps, rate = {"start": (0, 0.0), "early": (30, 3e-3), "trained": (2000, 3e-3), "overfitted": (4000, 3e-3)}[stage]
    optimizer = torch.optim.Adam(model.parameters(), rate or 1.0)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = criterion(model(x), y)
        if loss < ENOUGH.get(stage, 0.0):
            break
        loss.backward()
        optimizer.step()
    if stage == "overfitted" and isinstance(criterion, nn.CrossEntropyLoss):
        with torch.no_grad():  # what training goes on to do for a long time: the last layer grows
            while criterion(model(x), y) > ENOUGH[stage]:
                for parameter in list(model.parameters())[-2:]:
                    parameter.mul_(1.05)
    elif stage == "overfitted":
        fit(model, criterion, x, y)
    with torch.no_grad():  # weights that float32 holds exactly, so that both precisions have the same truth
        for parameter in model.parameters():
            parameter.copy_(parameter.float().double())


def fit(model: nn.Module, criterion: nn.Module, x: Tensor, y: Tensor) -> None:
    """Bring a squared error down to the end of training, as far as it goes."""
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=20, history_size=50, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss: Tensor = criterion(model(x), y)
        loss.backward()
        return loss

    for _ in range(200):
        if optimizer.step(closure) < ENOUGH["overfitted"]:
            break


def case(name: str, stage: str, model: nn.Module, criterion: nn.Module, x: Tensor, y: Tensor) -> Case:
    """Compute the spectrum of a network."""
    x = x.float().double()
    y = y.float().double() if y.is_floating_point() else y
    parameters = dict(model.named_parameters())
    names, shapes = list(parameters), [one.shape for one in parameters.values()]
    flat = torch.cat([one.detach().reshape(-1) for one in parameters.values()])

    def loss(vector: Tensor) -> Tensor:
        parts = torch.split(vector, [shape.numel() for shape in shapes])
        given = {key: part.view(shape) for key, part, shape in zip(names, parts, shapes, strict=True)}
        return _small_loss(torch.func.functional_call(model, given, (x,)), y, criterion)

    matrix = torch.autograd.functional.hessian(loss, flat, vectorize=True)
    matrix = (matrix + matrix.T) / 2
    return Case(name, stage, model, criterion, (x, y), float(loss(flat)), torch.linalg.eigvalsh(matrix).numpy())


def _small_loss(outputs: Tensor, y: Tensor, criterion: nn.Module) -> Tensor:
    """The loss in a form whose derivatives keep their digits where it is small."""
    if not isinstance(criterion, nn.CrossEntropyLoss):
        return criterion(outputs, y)
    right = outputs.gather(1, y[:, None])
    others = torch.ones_like(outputs, dtype=torch.bool).scatter_(1, y[:, None], False)
    rest = (outputs - right)[others].view(len(y), -1)
    return nn.functional.softplus(torch.logsumexp(rest, dim=1)).mean()


def truth(eigenvalues: np.ndarray, resolution: float, point: float) -> dict[str, float]:
    """The numbers of a report, from all eigenvalues."""
    plus = eigenvalues[eigenvalues > resolution].sum() / eigenvalues.size
    minus = -eigenvalues[eigenvalues < -resolution].sum() / eigenvalues.size
    largest, smallest = float(eigenvalues[-1]), float(eigenvalues[0])
    return {
        "lambda_max": largest,
        "lambda_min": smallest,
        "trace": float(eigenvalues.sum()),
        "frobenius_norm": float(np.linalg.norm(eigenvalues)),
        "r_e": max(-smallest, 0.0) / largest if largest > 0.0 else math.inf,
        "e_plus": float(plus),
        "e_minus": float(minus),
        "k_mass": float(minus / plus) if plus > 0.0 else math.inf,
        "balance": float((plus - minus) / (plus + minus)) if plus + minus > 0.0 else 0.0,
        "unresolved_mass": float((np.abs(eigenvalues) <= resolution).mean()),
        "count_above": float((eigenvalues > point).sum()),
    }


def run(one: Case, dtype: torch.dtype, block_size: int, goal: str, seed: int) -> dict[str, Any]:
    """Analyse a case once and say of each number whether its interval holds the truth, and how wide it is."""
    tolerance, max_steps = GOALS[goal]
    data = tuple(part.to(dtype) if part.is_floating_point() else part for part in one.data)
    model = copy.deepcopy(one.model).to(dtype)
    loss = hesd.losses.supervised(one.criterion)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", hesd.HESDWarning)
        report = hesd.analyze(
            model,
            loss,
            data,
            block_size=block_size,
            max_steps=max_steps,
            tolerance=tolerance,
            seed=seed,
            progress=False,
        )
    measure, found = report.measure, report.criteria
    point = 0.03 * measure.largest_magnitude
    given = {
        **{name: getattr(report, name) for name in ("lambda_max", "lambda_min", "trace", "frobenius_norm")},
        **{name: getattr(found, name) for name in ("r_e", "e_plus", "e_minus", "k_mass", "balance", "unresolved_mass")},
        "count_above": measure.count_above(point),
    }
    scale = float(np.abs(one.eigenvalues).max())
    numbers = {}
    for name, value in truth(one.eigenvalues, found.resolution, point).items():
        estimate = given[name]
        rounding = TRUTH_ROUNDING * (scale if name.startswith(("lambda", "e_")) else max(abs(value), 1.0))
        held = estimate.low - rounding <= value <= estimate.high + rounding
        unit = {"lambda_max": scale, "lambda_min": scale, "balance": 1.0, "unresolved_mass": 1.0}.get(name, abs(value))
        half = max(estimate.high - estimate.value, estimate.value - estimate.low)
        numbers[name] = [bool(held), half / unit if unit > 0.0 else (0.0 if half == 0.0 else math.inf)]
    return {
        "case": one.name,
        "stage": one.stage,
        "loss": one.loss,
        "dtype": str(dtype).removeprefix("torch."),
        "block_size": block_size,
        "goal": goal,
        "type": report.hesd_type.name,
        "runs": len(measure.runs),
        "products": report.cost.hvps,
        "unmet": len(report.cost.unmet),
        "numbers": numbers,
    }


def table(rows: list[dict[str, Any]], key: Callable[[Mapping[str, Any]], Any], title: str) -> str:
    """Return a Markdown table: of each number, the share of intervals that held and the median of half their widths."""
    groups: dict[Any, list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        groups[key(row)].append(row)
    heads = list(groups)
    lines = [
        f"| {title} | {' | '.join(map(str, heads))} |",
        f"|---|{'---|' * len(heads)}",
        f"| runs | {' | '.join(str(len(groups[head])) for head in heads)} |",
        "| products, median | "
        + " | ".join(f"{np.median([one['products'] for one in groups[head]]):.0f}" for head in heads)
        + " |",
    ]
    for name in rows[0]["numbers"]:
        cells = []
        for head in heads:
            held = [one["numbers"][name][0] for one in groups[head]]
            half = float(np.median([one["numbers"][name][1] for one in groups[head]]))
            cells.append(f"{100 * np.mean(held):.1f} %, ±{_percent(half)}")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _percent(half: float) -> str:
    return f"{100 * half:.2g} %" if math.isfinite(half) else "∞"


def main() -> None:
    """Run what is asked for, print the tables and write the rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=1, help="runs of every case and setting")
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    for one in cases():
        for dtype in (torch.float64, torch.float32):
            for block_size in BLOCK_SIZES:
                for goal in GOALS:
                    for seed in range(options.first_seed, options.first_seed + options.seeds):
                        rows.append(run(one, dtype, block_size, goal, 1000 * len(rows) + seed))
                        missed = [name for name, (held, _) in rows[-1]["numbers"].items() if not held]
                        print(
                            one.name,
                            one.stage,
                            f"{one.loss:.2g}",
                            rows[-1]["dtype"],
                            block_size,
                            goal,
                            rows[-1]["products"],
                            rows[-1]["type"],
                            "missed:",
                            *missed,
                            flush=True,
                        )
    options.out.write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n")
    for key, title in (
        (lambda row: f"b = {row['block_size']}", "probes of a run"),
        (lambda row: f"{row['dtype']}", "precision"),
        (lambda row: row["stage"], "stage"),
        (lambda row: row["goal"], "tolerance"),
    ):
        print(f"\n{table(rows, key, title)}")


if __name__ == "__main__":
    main()
