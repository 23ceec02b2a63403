"""What a run of block Lanczos can be asked for, and the settings of published protocols."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hesd_fast.choices import REORTHOGONALIZATIONS, is_one_of
from hesd_fast.errors import ProblemError

PROBE_KINDS = ("rademacher", "gaussian")


@dataclass(frozen=True)
class LanczosSettings:
    """How a spectrum is computed: probes b, block steps m, reorthogonalization, and the vectors of its window."""

    block_size: int
    max_steps: int
    reorthogonalization: str
    window: int = 10


PROTOCOLS = {
    # Loss Landscape Analysis: one Rademacher probe, 100 steps against the last 10 vectors (arXiv 2412.10146).
    "lla": LanczosSettings(block_size=1, max_steps=100, reorthogonalization="window", window=10),
}


def check_options(
    n: int,
    steps: int,
    block_size: int,
    reorthogonalization: str,
    seed: int,
    window: int = 10,
    probe_kind: str = "rademacher",
) -> None:
    """Raise a ProblemError for options of :func:`block_lanczos` that cannot be used with n parameters."""
    for name, value in (("steps", steps), ("block_size", block_size), ("window", window), ("seed", seed)):
        if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
            raise ProblemError(f"{name} is {value!r}; wanted an integer")
    if steps < 1:
        raise ProblemError(f"steps is {steps}; wanted at least 1")
    if block_size < 1 or block_size > n:
        raise ProblemError(f"block_size is {block_size}; wanted 1 to {n}, the number of parameters")
    if window < 1:
        raise ProblemError(f"window is {window}; wanted at least 1 vector")
    if not 0 <= seed < 2**64:
        raise ProblemError(f"seed is {seed}; wanted an integer in [0, 2**64)")
    if not is_one_of(reorthogonalization, REORTHOGONALIZATIONS):
        raise ProblemError(f"reorthogonalization is {reorthogonalization!r}; wanted one of {REORTHOGONALIZATIONS}")
    if not is_one_of(probe_kind, (*PROBE_KINDS, "given")):
        raise ProblemError(f"probe_kind is {probe_kind!r}; wanted one of {PROBE_KINDS}")
