"""What a run may keep in memory: decided once, from one look at what the system has."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace

import torch

from hesd_fast.engine import cuda
from hesd_fast.engine.memory import available_memory
from hesd_fast.lanczos.basis_storage import TILE_COLUMNS, BasisPlan, plan_basis
from hesd_fast.lanczos.options import LanczosSettings

WORKING_BLOCKS = 3
"""The block at work, the one before it, and the products."""

BASIS_SHARE = 0.75
"""Part of a CUDA device's free memory that vectors may take; products need some, and nothing is swapped there."""

PRODUCTS_SHARE = 0.5
"""Part of what vectors leave that products may keep; what one batch needs meanwhile takes of the other half."""


@dataclass(frozen=True)
class MemoryBudget:
    """Where the vectors of a run lie, and what is left.

    Attributes
    ----------
    basis : BasisPlan
        Place and precision of the vectors that are not at work.
    working_bytes : int
        Of the blocks at work.
    products_bytes : int or None
        What may be kept from one product to the next; None where the system does not say what it has.
    """

    basis: BasisPlan
    working_bytes: int
    products_bytes: int | None

    def basis_of(self, settings: LanczosSettings, size: int) -> BasisPlan:
        """Return the part of the basis that belongs to a group of ``size`` parameters, which has a run of its own."""
        rows = settings.history_rows(size)
        # Tiles of a basis in a file are wider than a small group.
        if rows == 0 or size < TILE_COLUMNS:
            return BasisPlan(rows, size, self.basis.dtype, None, self.basis.device)
        return replace(self.basis, rows=rows, columns=size)


def plan_memory(
    settings: LanczosSettings,
    size: int,
    dtype: torch.dtype,
    device: torch.device,
    basis: str | os.PathLike[str] = "auto",
    basis_dtype: str | torch.dtype = "auto",
) -> MemoryBudget:
    """Decide where the vectors of a run lie, of length ``size`` in all; errors are those of `plan_basis`."""
    available = available_memory(device)
    block = settings.block_size * size * dtype.itemsize
    where = plan_basis(
        settings.history_rows(size),
        WORKING_BLOCKS * settings.block_size,
        size,
        dtype,
        basis=basis,
        basis_dtype=basis_dtype,
        available=int(available * BASIS_SHARE) if available is not None and cuda.runtime.is_cuda(device) else available,
        device=device,
    )
    left = None
    if available is not None:  # the products of a batch are a block more
        left = int(max(available - (WORKING_BLOCKS + 1) * block - where.bytes_at_work, 0) * PRODUCTS_SHARE)
    return MemoryBudget(where, WORKING_BLOCKS * block, left)
