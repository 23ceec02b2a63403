"""Prints a digest of every kernel's results and of a Lanczos run: a process of its own for each number of threads."""

from __future__ import annotations

import hashlib

import native_engine
import numpy as np
from native_lanczos import Run
from native_panels import STORAGE, WORKING, Panel, unset


def main() -> None:
    engine = native_engine.load()
    info = engine.build_info()
    print("threads", info["threads"])
    print("target", info["cpu_target"])

    def report(name: str, *arrays: np.ndarray) -> None:
        digest = hashlib.sha256()
        for array in arrays:
            digest.update(np.ascontiguousarray(array).tobytes())
        print(name, digest.hexdigest())

    rng = np.random.default_rng(0)
    n = 30_001
    for working in WORKING:
        for storage in STORAGE:
            v, w = Panel(rng.standard_normal((9, n)), storage), Panel(rng.standard_normal((4, n)), working)
            gram = engine.panel_gram(v.borrowed, w.borrowed)
            projected = engine.panel_project(w.borrowed, v.borrowed, gram / n)
            x = unset(3, n, working)
            engine.panel_combine(rng.standard_normal((3, 9)), v.borrowed, x.borrowed)
            report(f"panels-{storage}-{working}", gram, *projected, w.array, x.array)
        w = Panel(rng.standard_normal((5, n)), working)
        rank, weakest, factor = engine.panel_orthonormalize(w.borrowed, w.borrowed, 0.0, 5, None)
        report(f"panel_orthonormalize-{working}", np.array([rank, weakest]), factor, w.array)
        out = Panel(rng.standard_normal((3, n)), working)
        errors = Panel(np.zeros((3, n)), working)
        parts = [Panel(rng.standard_normal((3, length)), "bfloat16") for length in (20_000, 7, 9_000)]
        engine.accumulate_hvp(
            out.borrowed, [part.borrowed for part in parts], [1, 20_001, 20_500], 0.3, errors.borrowed
        )
        report(f"accumulate_hvp-{working}", out.array, errors.array)
        for kind in ("rademacher", "gaussian"):
            engine.fill_probes(out.borrowed, 3, 1, 5, kind)
            report(f"fill_probes-{kind}-{working}", out.array)
        run = Run(np.linspace(-1.0, 10.0, 9_001), 4, 3, precision=working)
        report(f"block_lanczos-{working}", *run.diagonal, *run.offdiagonal)


if __name__ == "__main__":
    main()
