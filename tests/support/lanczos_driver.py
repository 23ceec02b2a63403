"""Drives the compiled block Lanczos by hand, on panels of NumPy or of PyTorch, and keeps every block.

Nothing here imports PyTorch: tests/native runs without it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from typing import Any

import numpy as np

IN_PLACE = " in place"
"""Ends the name of a mode in which the whole basis stays in the working panel."""


def compiled() -> Any:
    """Return the engine; imported late, since tests/native chooses which one."""
    return import_module("hesd_fast.engine._engine")


def new_engine(
    history: Any,
    working: Any,
    block: int,
    steps: int,
    size: int,
    mode: str = "full",
    multiple: float = 8.0,
    reduce: Any = None,
) -> Any:
    """Construct the engine: the one place that knows its arguments."""
    return compiled().BlockLanczos(
        history,
        working,
        block_size=block,
        max_steps=steps,
        global_size=size,
        reorthogonalization=mode.removesuffix(IN_PLACE),
        breakdown_multiple=multiple,
        reduce=reduce,
    )


def panel_rows(mode: str, steps: int, block: int, window: int = 2) -> tuple[int, int]:
    """Return how many rows the history and the working panel have; a window keeps so many blocks in the history."""
    if mode.endswith(IN_PLACE):
        return 0, (steps + 1) * block
    kept = {"full": max(steps - 2, 0), "partial": max(steps - 2, 0), "window": window, "none": 0}[mode]
    return kept * block, 3 * block


class EngineRun:
    """An engine with its working panel: rows to multiply, and rows that take their products."""

    def __init__(self, history: Any, working: Any, block: int, steps: int, size: int | None = None, **options: Any):
        self.engine = new_engine(history, working, block, steps, working.shape[1] if size is None else size, **options)
        self.working = working
        self.probes = working[self.engine.work_row :][:block]

    def fill_probes(self, probes: Any, first_index: int = 0) -> np.ndarray:
        """Take given vectors, or the random signs of a seed; return a copy of them in float64."""
        if isinstance(probes, int):
            compiled().fill_probes(self.probes, probes, 0, first_index, "rademacher")
        else:
            self.probes[...] = probes
        return np.asarray(self.probes).astype(np.float64)

    @property
    def finished(self) -> bool:
        return bool(self.engine.finished)

    @property
    def panel(self) -> Any:
        return self.working[self.engine.current_row :][: self.engine.current_width]

    @property
    def product(self) -> Any:
        return self.working[self.engine.work_row :][: self.engine.current_width]

    def advance(self) -> None:
        self.engine.advance()


def new_run(
    empty: Callable[[int, int, Any], Any],
    dtype: Any,
    n: int,
    steps: int,
    block: int,
    mode: str = "full",
    window: int = 2,
    **options: Any,
) -> EngineRun:
    """Return a run with panels of ``empty(rows, n, dtype)``, of NaNs: what was never written must never be read."""
    panels = [empty(rows, n, dtype) for rows in panel_rows(mode, steps, block, window)]
    for panel in panels:
        panel[...] = np.nan
    return EngineRun(*panels, block, steps, mode=mode, **options)


def drive(run: EngineRun, multiply: Callable[[Any], Any]) -> None:
    """Start a run that has its probes, and take it to its end."""
    run.engine.start()
    while not run.finished:
        run.product[...] = multiply(run.panel)
        run.advance()


def times(rows: Any, matrix: Any) -> Any:
    """Multiply rows by a symmetric matrix, or by a diagonal one that is given as its diagonal."""
    return rows * matrix if matrix.ndim == 1 else rows @ matrix


def overlaps(rows: np.ndarray) -> float:
    """Return how far rows are from orthonormal: the largest element of Q Q^T - 1."""
    return float(np.abs(rows @ rows.T - np.eye(len(rows))).max())


class Record:
    """A run to its end on a symmetric matrix, with every block kept, in float64.

    Products are made in float64, or by ``multiply``, which is given the record so far and the panel.
    """

    def __init__(
        self,
        run: EngineRun,
        matrix: Any,
        probes: Any = 0,
        multiply: Callable[[Record, Any], Any] | None = None,
    ):
        self.matrix = np.asarray(matrix, dtype=np.float64)
        self.engine = run.engine
        self.working = run.working
        self.blocks: list[np.ndarray] = []

        def keep(panel: Any) -> Any:
            self.blocks.append(np.asarray(panel).astype(np.float64))
            return times(self.blocks[-1], self.matrix) if multiply is None else multiply(self, panel)

        self.probes = run.fill_probes(probes)
        drive(run, keep)
        self.diagonal, self.offdiagonal = self.engine.diagonal, self.engine.offdiagonal
        following = run.working[self.engine.work_row :][: self.offdiagonal[-1].shape[1]]
        self.following = np.asarray(following).astype(np.float64)

    @property
    def widths(self) -> list[int]:
        return [len(a) for a in self.diagonal]

    def basis_vectors(self) -> np.ndarray:
        """Return the rows of all blocks, with those that would be multiplied next."""
        return np.concatenate([*self.blocks, self.following])

    def start_residual(self) -> float:
        """Return the norm of Z - S Q_1, as part of that of the probes Z."""
        return float(
            np.linalg.norm(self.engine.start_factor @ self.blocks[0] - self.probes) / np.linalg.norm(self.probes)
        )

    def recurrence_residual(self) -> float:
        """Return the largest norm of H Q_j - C_{j-1}^T Q_{j-1} - A_j Q_j - C_j Q_{j+1}."""
        blocks = [*self.blocks, self.following]
        worst = 0.0
        for j, a in enumerate(self.diagonal):
            expected = a @ blocks[j] + self.offdiagonal[j] @ blocks[j + 1]
            if j > 0:
                expected = expected + self.offdiagonal[j - 1].T @ blocks[j - 1]
            worst = max(worst, float(np.linalg.norm(times(blocks[j], self.matrix) - expected)))
        return worst

    def projected_matrix(self) -> np.ndarray:
        """Return the block tridiagonal matrix Q H Q^T."""
        edges = np.cumsum([0, *self.widths])
        matrix = np.zeros((edges[-1], edges[-1]))
        for j, a in enumerate(self.diagonal):
            here = slice(edges[j], edges[j + 1])
            matrix[here, here] = a
            if j + 1 < len(self.diagonal):
                after = slice(edges[j + 1], edges[j + 2])
                matrix[here, after] = self.offdiagonal[j]
                matrix[after, here] = self.offdiagonal[j].T
        return matrix


def on_threads(count: int, work: Callable[[int, Callable[[Any], list[Any]]], Any]) -> list[Any]:
    """Call ``work(rank, gather)`` on threads of their own; ``gather(value)`` returns what all of them gave, by rank."""
    barrier = threading.Barrier(count, timeout=60)
    shared: list[Any] = [None] * count

    def work_of(rank: int) -> Any:
        def gather(value: Any) -> list[Any]:
            shared[rank] = value
            barrier.wait()
            found = list(shared)
            barrier.wait()
            return found

        return work(rank, gather)

    with ThreadPoolExecutor(count) as threads:
        return list(threads.map(work_of, range(count)))
