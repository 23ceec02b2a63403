"""Runs the compiled block Lanczos by hand on a NumPy matrix and keeps every block."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import native_engine
import numpy as np
from native_panels import unset

IN_PLACE = " in place"
"""Ends the name of a mode in which the whole basis stays in the working panel."""


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
    return native_engine.load().BlockLanczos(
        history,
        working,
        block,
        max_steps=steps,
        global_size=size,
        reorthogonalization=mode.removesuffix(IN_PLACE),
        breakdown_multiple=multiple,
        reduce=reduce,
    )


def slots(mode: str, steps: int) -> int:
    """Blocks that the history of a mode holds; two in a window."""
    if mode.endswith(IN_PLACE):
        return 0
    return {"full": max(steps - 2, 0), "partial": max(steps - 2, 0), "window": 2, "none": 0}[mode]


class Panels:
    """The memory of a run, of NaNs: what was never written must never be read.

    ``tiles`` are the first columns of the history's tiles after the first.
    """

    def __init__(self, block, n, steps, mode="full", precision="float64", storage=None, tiles=()):
        edges = [0, *tiles, n]
        self.history = [
            unset(slots(mode, steps) * block, last - first, storage or precision, padding=5)
            for first, last in pairwise(edges)
        ]
        self.working = unset((steps + 1 if mode.endswith(IN_PLACE) else 3) * block, n, precision, padding=2)
        self.block = block

    def lent(self):
        """Return what the engine takes."""
        history = [tile.lent for tile in self.history]
        return (history if len(history) > 1 else history[0], self.working.lent, self.block)

    def at_work(self, engine, width=None):
        """Return a view of the rows that take the probes, or a product of some width."""
        return self.working.rows_of(engine.work_row, self.block if width is None else width)

    def current(self, engine):
        """Return a copy of the rows to multiply."""
        return self.working.values[engine.current_row :][: engine.current_width]

    def assert_surroundings_untouched(self):
        for panel in (*self.history, self.working):
            panel.assert_surroundings_untouched()


class Run:
    """Block Lanczos to its end on a symmetric matrix (n, n), or on n numbers that stand for a diagonal one."""

    def __init__(
        self,
        matrix,
        steps,
        block,
        mode="full",
        precision="float64",
        probes=None,
        seed=0,
        multiple=8.0,
        storage=None,
        tiles=(),
    ):
        self.matrix = np.asarray(matrix, dtype=precision).astype(np.float64)
        n = self.matrix.shape[0]
        self.panels = Panels(block, n, steps, mode, precision, storage, tiles)
        self.engine = new_engine(*self.panels.lent(), steps, n, mode, multiple)
        work = self.panels.at_work(self.engine)
        if probes is None:
            native_engine.load().fill_probes(work, seed, 0, 0, "rademacher")
        else:
            work[...] = probes
        self.probes = work.astype(np.float64)
        self.engine.start()
        self.blocks = []
        while not self.engine.finished:
            self.blocks.append(self.panels.current(self.engine))
            self.panels.at_work(self.engine, len(self.blocks[-1]))[...] = self.multiply(self.blocks[-1])
            self.engine.advance()
        self.diagonal = self.engine.diagonal
        self.offdiagonal = self.engine.offdiagonal
        self.following = self.panels.at_work(self.engine, self.offdiagonal[-1].shape[1]).astype(np.float64)

    def multiply(self, rows):
        return rows * self.matrix if self.matrix.ndim == 1 else rows @ self.matrix

    def basis_vectors(self):
        return np.concatenate([*self.blocks, self.following])

    def recurrence_residual(self):
        """Largest norm of H Q_j - C_{j-1}^T Q_{j-1} - A_j Q_j - C_j Q_{j+1}."""
        blocks = [*self.blocks, self.following]
        worst = 0.0
        for j, a in enumerate(self.diagonal):
            expected = a @ blocks[j] + self.offdiagonal[j] @ blocks[j + 1]
            if j > 0:
                expected = expected + self.offdiagonal[j - 1].T @ blocks[j - 1]
            worst = max(worst, float(np.linalg.norm(self.multiply(blocks[j]) - expected)))
        return worst

    def projected_matrix(self):
        """The block tridiagonal matrix Q H Q^T."""
        widths = [len(a) for a in self.diagonal]
        edges = np.cumsum([0, *widths])
        matrix = np.zeros((edges[-1], edges[-1]))
        for j, a in enumerate(self.diagonal):
            here = slice(edges[j], edges[j + 1])
            matrix[here, here] = a
            if j + 1 < len(widths):
                after = slice(edges[j + 1], edges[j + 2])
                matrix[here, after] = self.offdiagonal[j]
                matrix[after, here] = self.offdiagonal[j].T
        return matrix
