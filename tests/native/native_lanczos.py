"""Runs the compiled block Lanczos on NumPy panels whose surroundings are watched."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from lanczos_driver import EngineRun, Record, panel_rows
from native_panels import unset


class GuardedRun(EngineRun):
    """A run in memory of NaNs: what was never written must never be read.

    ``tiles`` are the first columns of the history's tiles after the first.
    """

    def __init__(self, block, n, steps, mode="full", precision="float64", storage=None, tiles=(), **options):
        older, at_work = panel_rows(mode, steps, block)
        edges = [0, *tiles, n]
        history = [unset(older, last - first, storage or precision, padding=5) for first, last in pairwise(edges)]
        working = unset(at_work, n, precision, padding=2)
        self._panels = [*history, working]
        borrowed = [tile.borrowed for tile in history]
        super().__init__(borrowed if tiles else borrowed[0], working.array, block, steps, mode=mode, **options)

    def assert_surroundings_untouched(self):
        for panel in self._panels:
            panel.assert_surroundings_untouched()


class Run(Record):
    """Block Lanczos to its end on a symmetric matrix (n, n), or on n numbers that stand for a diagonal one."""

    def __init__(self, matrix, steps, block, mode="full", precision="float64", *, probes=0, storage=None, tiles=()):
        matrix = np.asarray(matrix, dtype=precision)
        self._run = GuardedRun(block, len(matrix), steps, mode, precision, storage, tiles)
        super().__init__(self._run, matrix, probes)

    def assert_surroundings_untouched(self):
        self._run.assert_surroundings_untouched()
