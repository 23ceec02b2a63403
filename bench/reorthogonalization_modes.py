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

import hesd_fast as hesd
from hesd_fast import kernels
from hesd_fast.demo import demo_problem
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

FULL_W1_MULTIPLE = 64
"""A full run may be this many float32 epsilons of the spectral radius away from the same run in float64."""

COPY_DISTANCE = 1e-3
"""A node this near to the largest eigenvalue, relative to it, is a copy of it. The next eigenvalue is further away."""


class Diagonal(OperatorBase):
    """A diagonal matrix. Each eigenvector sits on one coordinate, the worst case for a rounded basis."""

    def __init__(self, diagonal: Tensor) -> None:
        super().__init__(len(diagonal), diagonal.dtype, diagonal.device)
        self.diagonal = diagonal

    def _multiply(self, panel: Tensor, out: Tensor) -> None:
        torch.mul(panel, self.diagonal, out=out)


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
            hesd.block_lanczos(case.in_double, STEPS, block, seed=seed, reorthogonalization="full")
        )
        right = hesd.criteria(with_double)
        for mode, dtype in modes:
            with case.session():
                tridiagonal = hesd.block_lanczos(
                    case.operator,
                    STEPS,
                    block,
                    seed=seed,
                    reorthogonalization=mode,
                    window=10,
                    basis="memory",
                    basis_dtype=dtype,
                )
            measure = hesd.SpectralMeasure.from_tridiagonal(tridiagonal)
            found = hesd.criteria(measure)
            kept, per_parameter = vectors_kept(mode, block, dtype)
            row = Row(
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
            check(measure, row, mode, dtype)
            rows[mode, dtype].append(row)
    return {mode: median(found) for mode, found in rows.items()}


def check(measure: hesd.SpectralMeasure, row: Row, mode: str, dtype: str) -> None:
    """Refuse to report a run that is wrong."""
    sums = [abs(float(weights.sum()) - 1.0) for weights in measure.weights]
    if max(sums) > 1e-10:
        raise SystemExit(f"{mode}, {dtype}: the weights of a probe miss a sum of 1 by {max(sums):.2g}")
    # Orthonormal probes are lost to rounding first: their squares sum to n only as far as float32 goes.
    if np.abs(measure.weight_sums - 1.0).max() > 64 * torch.finfo(torch.float32).eps:
        raise SystemExit(f"{mode}, {dtype}: squared norms of the probes are {measure.weight_sums} n; wanted n")
    allowed = FULL_W1_MULTIPLE * torch.finfo(torch.float32).eps
    if (mode, dtype) == ("full", "float32") and row.w1_from_double > allowed:
        raise SystemExit(f"full mode is {row.w1_from_double:.2g} of the radius away from float64; wanted {allowed:.2g}")


def median(rows: list[Row]) -> Row:
    return Row(**{name: float(np.median([getattr(row, name) for row in rows])) for name in Row.__dataclass_fields__})


def print_case(title: str, rows: dict[tuple[str, str], Row]) -> None:
    reads = rows["full", "float32"].read
    print(f"\n### {title}\n")
    print(
        "| mode | basis | vectors read | full / this | vectors kept | bytes per parameter | orthogonality "
        "| W1 / radius | W1 from float64 | copies |"
    )
    print("| --- " * 10 + "|")
    for (mode, dtype), row in rows.items():
        orthogonality = "–" if np.isnan(row.orthogonality) else f"{row.orthogonality:.0e}"
        print(
            f"| {mode} | {dtype} | {row.read:,.0f} | {reads / row.read:.1f} | {row.kept:.0f} "
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


LABEL_OFFSETS = {
    ("full", "float32"): (8, 14),
    ("full", "bfloat16"): (8, 0),
    ("full", "float16"): (8, -14),
    ("partial", "float32"): (-8, 14),
    ("partial", "bfloat16"): (-8, 0),
    ("partial", "float16"): (-8, -14),
    ("window", "float32"): (10, -4),
    ("none", "float32"): (10, -4),
}


def draw(cases: dict[str, dict[tuple[str, str], Row]], path: Path) -> None:
    """Reads against error, the area of a marker being memory; two panels."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.0, 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    colors = {"full": "C0", "partial": "C1", "window": "C2", "none": "C3"}
    markers = {"float32": "o", "bfloat16": "s", "float16": "^"}
    for axes, (title, rows) in zip(figure.subplots(1, len(cases), squeeze=False)[0], cases.items(), strict=True):
        for (mode, dtype), row in rows.items():
            axes.scatter(
                row.read,
                row.w1_from_double,
                s=0.25 * row.bytes_per_parameter,
                color=colors[mode],
                marker=markers[dtype],
                alpha=0.45,
                linewidths=0.8,
                edgecolors=colors[mode],
            )
        axes.set(xscale="log", yscale="log", title=title, xlabel="basis vectors read")
    figure.savefig(path, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5, help="probes to take medians over (5)")
    parser.add_argument("--figure", type=Path, default=FIGURE, help="where the picture goes")
    options = parser.parse_args()
    print(f"m = {STEPS}, {options.seeds} seeds; hesd_fast {hesd.__version__}, PyTorch {torch.__version__}")

    drawn = {}
    demo = demo_case()
    spread, diagonal, flat = synthetic_cases()
    cheap = (("full", "float32"), ("partial", "float32"))
    for case, block, modes in (
        (demo, 4, MODES),
        (demo, 1, MODES),
        (spread, 4, MODES),
        (diagonal, 4, MODES),
        (flat, 4, cheap),
    ):
        title = f"{case.name}, n = {len(case.eigenvalues):,}, b = {block}"
        rows = measure_case(case, block, modes, options.seeds)
        print_case(title, rows)
        drawn[title] = rows
    import pickle

    pickle.dump(drawn, open("/tmp/w/drawn.pkl", "wb"))
    print(f"\n{options.figure}")


if __name__ == "__main__":
    main()
