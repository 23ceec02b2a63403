"""The CUDA kernels on a GPU: checked, timed with events, and as a share of what a copy on the device reaches.

``make cuda-bench``, on a machine with a GPU. ``python bench/cuda_bench.py --bytes`` prints the table of bytes in
docs/cuda.md instead, on any machine; tests/engine/test_emulated.py counts the same bytes while the sources run.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

import torch

from hesd_fast import build_info, kernels
from hesd_fast.engine import reference

RESULTS = Path(__file__).resolve().parents[1] / "bench" / "results" / "cuda-bench.json"
BANDWIDTH = 3.0e12
"""Bytes a second for which the table of docs/cuda.md gives times: about what an H100 of 80 GB reads."""

BLOCKS = 2 * 132
"""Blocks of a launch whose sums are added up, at most."""


@dataclass(frozen=True)
class Size:
    """Columns, rows of V, rows of W or X, bytes of an element of V and of W."""

    n: int
    k: int
    b: int
    v: int
    w: int


@dataclass(frozen=True)
class Kernel:
    """One kernel's bytes: what it moves, and the least that its job needs."""

    name: str
    formula: str
    moved: Callable[[Size], int]
    ideal: Callable[[Size], int]


def _sums(entries: int) -> int:
    """Sums of all blocks, written and read once, and the totals."""
    return (2 * BLOCKS + 2) * entries * 8


def _passes(s: Size) -> int:
    return -(-s.b // 8)


KERNELS = [
    Kernel("panel_gram", "⌈b/8⌉ k n v + b n w",
           lambda s: _passes(s) * s.k * s.n * s.v + s.b * s.n * s.w + _sums(s.k * s.b),
           lambda s: s.k * s.n * s.v + s.b * s.n * s.w),
    Kernel("panel_project", "⌈b/8⌉ k n v + 2 b n w",
           lambda s: _passes(s) * s.k * s.n * s.v + (2 + (s.b > 8)) * s.b * s.n * s.w + _sums(s.k * s.b + s.b**2),
           lambda s: s.k * s.n * s.v + 2 * s.b * s.n * s.w),
    Kernel("panel_orthonormalize", "3 b n w (float64: 4 b n w)",
           lambda s: (3 if s.w == 4 else 4) * s.b * s.n * s.w + _sums(s.b**2),
           lambda s: 3 * s.b * s.n * s.w),
    Kernel("panel_combine", "k n v + b n w",
           lambda s: s.k * s.n * s.v + s.b * s.n * s.w,
           lambda s: s.k * s.n * s.v + s.b * s.n * s.w),
    Kernel("accumulate_hvp", "b n v + 2 b n w",
           lambda s: s.b * s.n * s.v + 2 * s.b * s.n * s.w,
           lambda s: s.b * s.n * s.v + 2 * s.b * s.n * s.w),
    Kernel("fill_probes", "b n w",
           lambda s: s.b * s.n * s.w,
           lambda s: s.b * s.n * s.w),
]  # fmt: skip


def table() -> str:
    """Return the table of bytes, in Markdown."""
    lines = [
        "| kernel | bytes of panels | n = 10⁸, b = 4, float32 | n = 10⁸, b = 4, V in bfloat16 | n = 10⁶, b = 8 |",
        "| --- | --- | --- | --- | --- |",
    ]
    sizes = [Size(10**8, 100, 4, 4, 4), Size(10**8, 100, 4, 2, 4), Size(10**6, 100, 8, 4, 4)]
    for kernel in KERNELS:
        cells = [
            f"{kernel.moved(s) / 1e9:.4g} GB, {kernel.moved(s) / kernel.ideal(s):.3f} of the ideal, "
            f"{1e3 * kernel.moved(s) / BANDWIDTH:.3g} ms"
            for s in sizes
        ]
        lines.append(f"| `{kernel.name}` | {kernel.formula} | {' | '.join(cells)} |")
    return "\n".join(lines)


def run(work: Callable[[], object], repetitions: int = 20) -> float:
    """Return the median seconds of a call on the device."""
    for _ in range(3):
        work()
    seconds = []
    for _ in range(repetitions):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        work()
        end.record()
        torch.cuda.synchronize()
        seconds.append(start.elapsed_time(end) / 1e3)
    return sorted(seconds)[len(seconds) // 2]


def check(device: str = "cuda", n: int = 70_001) -> None:
    """Compare each kernel with its reference, on the device."""
    generator = torch.Generator().manual_seed(0)
    v, w = (torch.randn(rows, n, generator=generator).to(device) for rows in (21, 4))
    c = torch.randn(21, 4, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(kernels.panel_gram(v, w), reference.panel_gram(v, w).cpu(), rtol=1e-5, atol=1e-2)
    wanted = w.clone()
    products = reference.panel_project(wanted, v, c.to(device))
    for one, other in zip(kernels.panel_project(w, v, c), products, strict=True):
        torch.testing.assert_close(one, other.cpu(), rtol=1e-4, atol=1e-1)
    torch.testing.assert_close(w, wanted, rtol=1e-5, atol=1e-4)
    kernels.panel_orthonormalize(w)
    torch.testing.assert_close(w @ w.T, torch.eye(4, device=device), rtol=0, atol=1e-5)
    x, probes = torch.empty_like(w), torch.empty(4, n)
    kernels.panel_combine(c.T, v, x)
    torch.testing.assert_close(x.double(), c.T.to(device) @ v.double(), rtol=1e-5, atol=1e-4)
    kernels.accumulate_hvp(x, [w], [0], 0.5)
    on_device = torch.empty(4, n, device=device)
    for kind in ("rademacher", "gaussian"):
        kernels.fill_probes(on_device, 3, kind=kind)
        reference.fill_probes(probes, 3, kind=kind)
        if not torch.equal(on_device.cpu(), probes):
            raise AssertionError(f"{kind} probes differ from their reference's")


def measure(device: str = "cuda", n: int = 10**7, k: int = 100) -> list[dict[str, object]]:
    """Time every kernel beside a copy of V on the device."""
    rows: list[dict[str, object]] = []
    for storage in (torch.float32, torch.bfloat16):
        for b in (1, 4, 8):
            v = kernels.empty_panel(k, n, storage, device).normal_()
            w = kernels.empty_panel(b, n, torch.float32, device).normal_()
            x = torch.empty_like(w)
            zeros, part = torch.zeros(k, b, dtype=torch.float64), v[:b]
            zeros[0] = 1e-3
            size = Size(n, k, b, storage.itemsize, 4)
            combination = torch.ones(b, k, dtype=torch.float64)
            work: dict[str, Callable[[], object]] = {
                "panel_gram": lambda v=v, w=w: kernels.panel_gram(v, w),
                "panel_project": lambda v=v, w=w, c=zeros: kernels.panel_project(w, v, c),
                "panel_orthonormalize": lambda w=w: kernels.panel_orthonormalize(w, tolerance=0.0),
                "panel_combine": lambda v=v, x=x, s=combination: kernels.panel_combine(s, v, x),
                "accumulate_hvp": lambda x=x, part=part: kernels.accumulate_hvp(x, [part], [0], 0.5),
                "fill_probes": lambda x=x: kernels.fill_probes(x, 3),
            }
            copy = torch.empty_like(v)
            for kernel in KERNELS:
                seconds, copying = run(work[kernel.name]), run(lambda copy=copy, v=v: copy.copy_(v))
                rate, limit = kernel.moved(size) / seconds, 2 * k * n * storage.itemsize / copying
                rows.append(
                    {
                        "kernel": kernel.name, "n": n, "k": k, "b": b, "storage": str(storage),
                        "seconds": seconds, "bytes": kernel.moved(size), "share_of_copy": rate / limit,
                    }
                )  # fmt: skip
                print(f"{kernel.name:22} b={b} {storage}: {1e3 * seconds:.3f} ms, {100 * rate / limit:.1f} % of a copy")
    return rows


def main() -> int:
    """Check, time, keep."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bytes", action="store_true", help="print the table of bytes and stop")
    if parser.parse_args().bytes:
        print(table())
        return 0
    if not (build_info()["cuda"] and torch.cuda.is_available()):
        print("cuda_bench.py: no GPU here, or a build without CUDA kernels; nothing was measured", file=sys.stderr)
        return 1
    check()
    result = {
        "device": torch.cuda.get_device_name(),
        "when": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "torch": torch.__version__,
        "rows": measure(),
    }
    RESULTS.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
