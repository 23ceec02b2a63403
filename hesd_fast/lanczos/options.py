"""What a run of block Lanczos can be asked for, and the settings of published protocols."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from hesd_fast.choices import REORTHOGONALIZATIONS, is_one_of
from hesd_fast.errors import ProblemError
from hesd_fast.lanczos.block_tridiagonal import ORTHOGONAL_MODES

RANDOM_PROBES = ("sphere", "gaussian", "rademacher")
"""Distributions of random probes.

On the sphere of radius ``sqrt(n)``, the default: no eigenvector is special, so what is said of a vector that probes
miss holds for every one, and each probe's weights sum to 1. Signs have a smaller variance of the trace where the
diagonal dominates, and miss vectors on a few equal coordinates: one on two of them with probability 1/2.
"""


@dataclass(frozen=True)
class LanczosSettings:
    """Settings of a run of block Lanczos, decided once.

    Attributes
    ----------
    block_size, max_steps : int
        Probes b and block steps m.
    reorthogonalization, window : str, int
        See :func:`~hesd_fast.block_lanczos`.
    seed, probe_kind, first_probe : int, str, int
        Choose the probes: those from ``first_probe`` on of all that a seed has.
    """

    block_size: int
    max_steps: int
    reorthogonalization: str = "full"
    window: int = 10
    seed: int = 0
    probe_kind: str = "sphere"
    first_probe: int = 0

    def checked(self, size: int) -> LanczosSettings:
        """Return these settings in Python's own integers; a ProblemError if vectors of ``size`` cannot have them."""
        whole = {
            "steps": self.max_steps,
            "block_size": self.block_size,
            "window": self.window,
            "seed": self.seed,
        }
        for name, value in whole.items():
            if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
                raise ProblemError(f"{name} is {value!r}; wanted an integer")
        if self.max_steps < 1:
            raise ProblemError(f"steps is {self.max_steps}; wanted at least 1")
        if self.block_size < 1 or self.block_size > size:
            raise ProblemError(f"block_size is {self.block_size}; wanted 1 to {size}, the number of parameters")
        if self.window < 1:
            raise ProblemError(f"window is {self.window}; wanted at least 1 vector")
        if not 0 <= self.seed < 2**64:
            raise ProblemError(f"seed is {self.seed}; wanted an integer in [0, 2**64)")
        if not is_one_of(self.reorthogonalization, REORTHOGONALIZATIONS):
            wanted = f"wanted one of {REORTHOGONALIZATIONS}"
            raise ProblemError(f"reorthogonalization is {self.reorthogonalization!r}; {wanted}")
        if not is_one_of(self.probe_kind, (*RANDOM_PROBES, "given")):
            raise ProblemError(f"probe_kind is {self.probe_kind!r}; wanted one of {RANDOM_PROBES}")
        steps, block_size, window, seed = map(int, whole.values())
        return replace(self, max_steps=steps, block_size=block_size, window=window, seed=seed)

    def for_size(self, size: int) -> LanczosSettings:
        """Return the same for a matrix of which there may be fewer dimensions than probes."""
        return replace(self, block_size=min(self.block_size, size))

    def most_products(self, size: int) -> int:
        """Return how many vectors of length ``size`` the run multiplies at most."""
        products = self.max_steps * self.block_size
        return min(products, size) if self.reorthogonalization in ORTHOGONAL_MODES else products

    def most_panels(self, size: int) -> int:
        """Return how many panels of vectors of length ``size`` the run multiplies at most, whole or not."""
        return math.ceil(self.most_products(size) / self.block_size)

    def history_rows(self, size: int) -> int:
        """Return how many vectors are kept beside the blocks at work, which hold the last two."""
        steps = min(self.max_steps, size)
        blocks = {"window": math.ceil(self.window / self.block_size), "none": 2}.get(self.reorthogonalization, steps)
        return max(min(blocks, steps) - 2, 0) * self.block_size


PROTOCOLS = {
    # Loss Landscape Analysis: one Rademacher probe, 100 steps against the last 10 vectors (arXiv 2412.10146).
    "lla": LanczosSettings(
        block_size=1, max_steps=100, reorthogonalization="window", window=10, probe_kind="rademacher"
    ),
}
