"""What each reorthogonalization mode costs and what it does to the spectrum: the tables of docs/reorthogonalization.md.

.venv/bin/python bench/reorthogonalization_modes.py

Every figure is a count or an error, none a timing; each is the median over the seeds. The truth is known: of the demo
network from its dense Hessian in float64, of the made-up spectrum by construction. It is taken as the probes of the
run see it, so the error holds no sampling error.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import scipy.fft
import torch
from torch import Tensor
from workloads import Diagonal

import hesd_fast as hesd
from hesd_fast import kernels
from hesd_fast.cli.demo_problem import demo_problem
from hesd_fast.operators.base import OperatorBase

ROOT = Path(__file__).parent.parent
FIGURE = ROOT / "docs" / "images" / "reorthogonalization.png"

STEPS = 100
SYNTHETIC_LENGTH = 50_000
SPECTRUM_SEED = 1

MODES = (
    *(("full", dtype) for dtype in ("float32", "bfloat16", "float16")),
    *(("partial", dtype) for dtype in ("float32", "bfloat16", "float16")),
    ("window", "float32"),
    ("none", "float32"),
)
"""Mode, and what the basis is kept in. A window is short enough to stay in float32."""

W1_MULTIPLE = 2
"""A full or partial run in float32 may be this many epsilons of the radius away from the same run in float64."""

MOMENT_MULTIPLE = 64
"""Its moments 1 to 3, which are exact, may be this many epsilons of the radius away from the truth's."""

COPY_DISTANCE = 1e-3
"""A node this near to the largest eigenvalue, relative to it, is a copy of it. The next eigenvalue is further away."""


class Cosines(OperatorBase):
    """The matrix whose eigenvectors are the cosines of the discrete cosine transform, spread over all coordinates."""

    def __init__(self, eigenvalues: Tensor) -> None:
        super().__init__(len(eigenvalues), eigenvalues.dtype, eigenvalues.device)
        self.eigenvalues = eigenvalues.numpy()

    def _multiply(self, panel: Tensor, out: Tensor) -> None:
        products = scipy.fft.dct(panel.numpy(), norm="ortho") * self.eigenvalues
        out.copy_(torch.from_numpy(scipy.fft.idct(products, norm="ortho")))


@dataclass(frozen=True)
class Case:
    """An operator in two precisions, and its true spectrum."""

    name: str
    operator: Any  # of float32
    in_double: Any
    eigenvalues: np.ndarray  # ascending
    coordinates: Callable[[np.ndarray], np.ndarray]  # of rows, in the eigenvectors
    session: Callable[[], AbstractContextManager]

    @property
    def radius(self) -> float:
        return float(np.abs(self.eigenvalues).max())

    def truth(self, block: int, seed: int) -> hesd.SpectralMeasure:
        """The measure that the probes of a run see."""
        probes = kernels.empty_panel(block, len(self.eigenvalues))
        kernels.fill_probes(probes, seed)
        weights = self.coordinates(probes.double().numpy()) ** 2 / len(self.eigenvalues)
        return hesd.SpectralMeasure([self.eigenvalues] * block, list(weights))


def demo_case() -> Case:
    sys.path.insert(0, str(ROOT / "tests"))
    from dense import dense_hessian

    problem = demo_problem()
    double = demo_problem()
    model = double.model.double()
    batches = [(inputs.double(), labels) for inputs, labels in double.data]

    def loss(network: torch.nn.Module) -> Tensor:
        return torch.nn.functional.cross_entropy(
            network(torch.cat([inputs for inputs, _ in batches])), torch.cat([labels for _, labels in batches])
        )

    dense = dense_hessian(model, loss, dict(model.named_parameters())).numpy()
    dense = (dense + dense.T) / 2
    eigenvalues, vectors = np.linalg.eigh(dense)
    return Case(
        "demo network",
        hesd.HessianOperator(problem),
        hesd.MatrixOperator(torch.from_numpy(dense)),
        eigenvalues,
        lambda rows: rows @ vectors,
        problem.session,
    )


def network_like_spectrum(n: int) -> Tensor:
    """Eigenvalues as networks have them: nearly all close to zero, 50 outliers over decades, a fifth of them negative.

    Rounded to float32, so that both precisions have the same.
    """
    random = np.random.default_rng(SPECTRUM_SEED)
    positive = np.logspace(0.0, -2.5, 40)
    negative = -np.logspace(-1.3, -2.8, 10)
    near_zero = 1e-5 * random.standard_normal(n - 50)
    tail = random.random(n - 50) < 0.3
    near_zero[tail] += random.exponential(5e-4, int(tail.sum()))
    return torch.from_numpy(np.sort(np.concatenate((negative, near_zero, positive))).astype(np.float32))


def synthetic_cases() -> list[Case]:
    spectrum = network_like_spectrum(SYNTHETIC_LENGTH)
    flat = torch.linspace(-1.0, 1.0, SYNTHETIC_LENGTH)

    def diagonal(name: str, values: Tensor) -> Case:
        return Case(
            name, Diagonal(values), Diagonal(values.double()), values.double().numpy(), lambda rows: rows, nullcontext
        )

    cosines = Case(
        "spread eigenvectors",
        Cosines(spectrum),
        Cosines(spectrum.double()),
        spectrum.double().numpy(),
        lambda rows: np.asarray(scipy.fft.dct(rows, norm="ortho")),
        nullcontext,
    )
    return [cosines, diagonal("diagonal matrix", spectrum), diagonal("evenly spaced eigenvalues", flat)]


@dataclass(frozen=True)
class Row:
    """What is reported of one run."""

    steps: float
    read: float
    kept: float
    bytes_per_parameter: float
    orthogonality: float
    w1: float
    w1_from_double: float
    copies: float
    r_e_change: float
    k_hn_change: float
    k_mass_change: float
    k_mass_low: float
    k_mass_high: float


def vectors_kept(mode: str, block: int, dtype: str) -> tuple[int, float]:
    """Vectors in memory besides the model's own, and their bytes per parameter.

    Three blocks are at work in float32: the product, the block before it and the one before that. The others are kept
    in the dtype asked for. A window counts the two blocks before the product.
    """
    blocks = {"window": -(-10 // block), "none": 2}.get(mode, STEPS)
    history = (blocks - 2) * block
    return history + 3 * block, history * getattr(torch, dtype).itemsize + 3 * block * 4.0


def change(value: float, reference: float) -> float:
    return abs(value - reference) / abs(reference) if reference else abs(value)


def measure_case(case: Case, block: int, modes: tuple, seeds: int) -> dict[tuple[str, str], Row]:
    """Run the modes on the same probes; return the median of every figure."""
    rows: dict[tuple[str, str], list[Row]] = {mode: [] for mode in modes}
    largest = case.eigenvalues[-1]
    for seed in range(seeds):
        truth = case.truth(block, seed)
        with_double = hesd.SpectralMeasure.from_tridiagonal(
            hesd.block_lanczos(case.in_double, STEPS, block, seed=seed, probe_kind="rademacher")
        )
        right = hesd.criteria(with_double)
        for mode, dtype in modes:
            with case.session():
                tridiagonal = hesd.block_lanczos(
                    case.operator,
                    STEPS,
                    block,
                    seed=seed,
                    probe_kind="rademacher",
                    reorthogonalization=mode,
                    window=10,
                    basis="memory",
                    basis_dtype=dtype,
                )
            measure = hesd.SpectralMeasure.from_tridiagonal(tridiagonal)
            found = hesd.criteria(measure)
            kept, per_parameter = vectors_kept(mode, block, dtype)
            row = Row(
                steps=tridiagonal.steps,
                read=tridiagonal.basis_vectors_read,
                kept=kept,
                bytes_per_parameter=per_parameter,
                orthogonality=np.nan if tridiagonal.orthogonality is None else tridiagonal.orthogonality,
                w1=measure.wasserstein1(truth) / case.radius,
                w1_from_double=measure.wasserstein1(with_double) / case.radius,
                copies=int((np.abs(measure.nodes[0] - largest) <= COPY_DISTANCE * largest).sum()) - 1,
                r_e_change=change(found.r_e.value, right.r_e.value),
                k_hn_change=change(found.k_hn.value, right.k_hn.value),
                k_mass_change=change(found.k_mass.value, right.k_mass.value),
                k_mass_low=found.k_mass.low,
                k_mass_high=found.k_mass.high,
            )
            check(measure, truth, row, mode, dtype)
            rows[mode, dtype].append(row)
    return {mode: median(found) for mode, found in rows.items()}


def check(measure: hesd.SpectralMeasure, truth: hesd.SpectralMeasure, row: Row, mode: str, dtype: str) -> None:
    """Refuse to report a run that is wrong."""
    epsilon = torch.finfo(torch.float32).eps
    missing = max(abs(float(weights.sum()) - 1.0) for weights in measure.weights)
    if missing > 1024 * np.finfo(np.float64).eps:
        raise SystemExit(f"{mode}, {dtype}: the weights of a probe miss a sum of 1 by {missing:.2g}")
    if np.abs(measure.weight_sums - 1.0).max() > MOMENT_MULTIPLE * epsilon:
        raise SystemExit(f"{mode}, {dtype}: squared norms of the probes are {measure.weight_sums} n; wanted n")
    if mode in ("full", "partial") and dtype == "float32":
        if row.w1_from_double > W1_MULTIPLE * epsilon:
            raise SystemExit(f"{mode} mode is {row.w1_from_double:.2g} of the radius away from float64")
        for order in (1, 2, 3):
            got, wanted = measure.moment(order), truth.moment(order)
            if abs(got - wanted) > MOMENT_MULTIPLE * epsilon * truth.largest_magnitude**order:
                raise SystemExit(f"{mode} mode: moment {order} is {got:.9g}, wanted {wanted:.9g}")


def median(rows: list[Row]) -> Row:
    return Row(**{name: float(np.median([getattr(row, name) for row in rows])) for name in Row.__dataclass_fields__})


def print_case(title: str, rows: dict[tuple[str, str], Row]) -> None:
    reads = rows["full", "float32"].read
    print(f"\n### {title}\n")
    print(
        "| mode | basis | steps | vectors read | full / this | vectors kept | bytes per parameter | orthogonality "
        "| W1 / radius | W1 from float64 | copies |"
    )
    print("| --- " * 11 + "|")
    for (mode, dtype), row in rows.items():
        orthogonality = "–" if np.isnan(row.orthogonality) else f"{row.orthogonality:.0e}"
        print(
            f"| {mode} | {dtype} | {row.steps:.0f} | {row.read:,.0f} | {reads / row.read:.1f} | {row.kept:.0f} "
            f"| {row.bytes_per_parameter:,.0f} | {orthogonality} | {row.w1:.2e} | {row.w1_from_double:.0e} "
            f"| {row.copies:.0f} |"
        )
    print("\n| mode | basis | change of r_e | change of K_Hn | change of k_mass | interval of k_mass |")
    print("| --- " * 6 + "|")
    for (mode, dtype), row in rows.items():
        print(
            f"| {mode} | {dtype} | {row.r_e_change:.0e} | {row.k_hn_change:.0e} | {row.k_mass_change:.0e} "
            f"| {row.k_mass_low:.3f} … {row.k_mass_high:.3f} |",
            flush=True,
        )


def print_reads(cases: list[tuple[Case, int]]) -> None:
    """How many times more vectors full mode reads than partial mode, by steps and precision of the products.

    The last column is the noise of the products over the smallest coupling of the last step, in square roots of
    epsilon, all in float32: from 1 on every fresh block needs a sweep.
    """
    print("\n### Vectors read, full / partial (probes of seed 0)\n")
    columns = [(steps, "float32") for steps in (25, 50, STEPS)] + [(STEPS, "float64")]
    print("| spectrum | b | " + " | ".join(f"m = {steps}, {dtype}" for steps, dtype in columns) + " | noise/β/√ε |")
    print("| --- " * (3 + len(columns)) + "|")
    for case, block in cases:
        ratios, noise = [], 0.0
        for steps, dtype in columns:
            operator = case.operator if dtype == "float32" else case.in_double
            with case.session():
                full, partial = (
                    hesd.block_lanczos(operator, steps, block, probe_kind="rademacher", reorthogonalization=mode)
                    for mode in ("full", "partial")
                )
            ratios.append(f"{full.basis_vectors_read / partial.basis_vectors_read:.1f}")
            if (steps, dtype) == (STEPS, "float32"):
                coupling = np.linalg.svd(partial.offdiagonal[-1], compute_uv=False)[-1]
                noise = partial.recurrence_error / coupling / np.sqrt(partial.epsilon)
        print(f"| {case.name} | {block} | " + " | ".join(ratios) + f" | {noise:.1g} |", flush=True)


SHADES = {"full": "C0", "partial": "C1", "window": "C2", "none": "C3"}
MARKERS = {"float32": "o", "bfloat16": "s", "float16": "^"}


def draw(panels: dict[str, dict[tuple[str, str], Row]], path: Path) -> None:
    """Draw reads against error, the area of a marker being memory."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.0, 4.9), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (title, rows) in zip(figure.subplots(1, len(panels), sharey=True), panels.items(), strict=True):
        for (mode, dtype), row in rows.items():
            place = (row.read, row.w1)
            axes.scatter(
                *place,
                s=row.bytes_per_parameter / 4.0,
                color=SHADES[mode],
                marker=MARKERS[dtype],
                alpha=0.4,
                edgecolors="black",
                linewidths=0.7,
                label=f"{mode}, {dtype}: {row.bytes_per_parameter:,.0f} bytes per parameter",
            )
            right = {"xytext": (11, -3), "textcoords": "offset points", "fontsize": "small"}
            if mode == "window":
                axes.annotate(mode, place, **right)
            elif mode == "none":
                axes.annotate(mode, place, **{**right, "xytext": (0, 7), "ha": "center"})
            elif dtype == "float32":
                above = mode == "full"  # partial is often at the same place
                middle = {
                    **right,
                    "xytext": (0, 14 if above else -14),
                    "ha": "center",
                    "va": "bottom" if above else "top",
                }
                axes.annotate(mode, place, **middle)
            elif row.steps < STEPS:
                axes.annotate(f"{mode}, {dtype}:\nends at step {row.steps:.0f}", place, **right)
        axes.set(xscale="log", yscale="log", xlabel="basis vectors read")
        axes.set_title(title, fontsize="medium")
        axes.set_xlim(1.5e3, 1.2e5)
        axes.xaxis.set_minor_formatter("")
        axes.margins(y=0.25)
        axes.grid(alpha=0.25)
    figure.axes[0].set_ylabel("W1 error / spectral radius")
    figure.legend(
        *figure.axes[0].get_legend_handles_labels(),
        loc="outside lower center",
        ncols=2,
        fontsize="small",
        frameon=False,
        labelspacing=0.9,
        title="the area of a marker is the memory",
        title_fontsize="small",
    )
    figure.savefig(path, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3, help="probes to take medians over (3)")
    parser.add_argument("--figure", type=Path, default=FIGURE, help="where the picture goes")
    options = parser.parse_args()
    print(f"m = {STEPS}, {options.seeds} seeds; hesd_fast {hesd.__version__}, PyTorch {torch.__version__}", flush=True)

    demo = demo_case()
    spread, diagonal, flat = synthetic_cases()
    measured = {}
    for case, block in ((demo, 4), (demo, 1), (spread, 4), (diagonal, 4)):
        title = f"{case.name}, n = {len(case.eigenvalues):,}, b = {block}"
        measured[title] = measure_case(case, block, MODES, options.seeds)
        print_case(title, measured[title])
    print_reads([(demo, 1), (demo, 4), (spread, 1), (spread, 4), (flat, 1), (flat, 4)])
    left, _, _, right = measured
    draw({title: measured[title] for title in (left, right)}, options.figure)
    print(f"\n{options.figure}")


if __name__ == "__main__":
    main()
