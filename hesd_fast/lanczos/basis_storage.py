"""Where the Lanczos basis lies: its dtype, in memory or in a file that cannot outlive the process."""

from __future__ import annotations

import math
import mmap
import os
import shutil
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hesd_fast.engine import panels
from hesd_fast.engine.memory import available_memory
from hesd_fast.errors import EngineError, PlanError, ProblemError

BASIS_DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
PLACES = ("auto", "memory", "host", "disk")

_CPU = torch.device("cpu")

TILE_COLUMNS = 65536
"""Columns of a tile on disk: rows of a tile are read as one piece, so a block is 128 KiB or more of it."""


@dataclass(frozen=True)
class BasisPlan:
    """A basis that fits.

    Attributes
    ----------
    rows, columns : int
        Vectors kept beside the three working blocks, and their length.
    dtype : torch.dtype
        Of the vectors kept.
    directory : Path or None
        Where its file will lie; None for memory.
    device : torch.device
        Where the vectors are worked on, and whose memory that is.
    host : bool
        In the memory of the host instead, pinned, when the device is another; read to the device tile by tile.
    """

    rows: int
    columns: int
    dtype: torch.dtype
    directory: Path | None
    device: torch.device = _CPU
    host: bool = False

    @property
    def place(self) -> str:
        """``"memory"``, ``"host"`` or ``"disk"``."""
        return "disk" if self.directory is not None else "host" if self.host else "memory"

    @property
    def bytes(self) -> int:
        """Memory or disk space that it takes, in its place."""
        columns = self.columns
        if self.place != "memory":
            columns = -(-columns // TILE_COLUMNS) * TILE_COLUMNS
        return self.rows * columns * self.dtype.itemsize

    @property
    def bytes_at_work(self) -> int:
        """Memory that it takes where the vectors are worked on: all of it, or that of the tiles that come near."""
        if self.place == "memory":
            return self.bytes
        if self.device.type == "cpu":
            return 0
        return 2 * self.rows * min(self.columns, TILE_COLUMNS) * self.dtype.itemsize

    @property
    def contents(self) -> str:
        """What is kept, in words."""
        return f"{self.rows} vectors of {self.columns} {_name(self.dtype)}"

    def allocate(self) -> Tensor | list[Tensor]:
        """Return the panel, or the list of its tiles."""
        if self.host and self.rows > 0:
            return _tiles(self, _pinned(self))
        if self.directory is None or self.rows == 0:
            return panels.empty_panel(self.rows, self.columns, self.dtype, self.device)
        return _file_of_tiles(self)


def plan_basis(
    rows: int,
    working_rows: int,
    columns: int,
    working_dtype: torch.dtype,
    *,
    basis: str | os.PathLike[str] = "auto",
    basis_dtype: str | torch.dtype = "auto",
    available: int | None,
    device: torch.device = _CPU,
) -> BasisPlan:
    """Choose dtype and place of a basis, or refuse what cannot fit.

    Parameters
    ----------
    rows, working_rows, columns : int
        Vectors to keep, vectors of ``working_dtype`` beside them, and their length.
    basis : {"auto", "memory", "host", "disk"} or path
        "memory" is the device's, "host" the pinned memory of the host of a CUDA device, from where tiles are read while
        others are at work. A path is a directory on disk; "disk" takes ``HESD_FAST_SCRATCH``, else ``/var/tmp``, else
        the system's directory of temporary files. A file there has no name, so the system removes it when the run ends,
        however it ends. "auto" takes memory where the basis fits, then the host's, and else the disk.
    basis_dtype : {"auto", "float64", "float32", "bfloat16", "float16"} or torch.dtype
        "auto" is the working dtype, which the blocks at work always have.
    available : int or None
        Bytes of memory, of the device where it is one, that can be had; None when unknown.
    device : torch.device
        Where the vectors are worked on.

    Raises
    ------
    ProblemError
        For an option that does not exist.
    PlanError
        When memory or disk space does not suffice.
    """
    dtype, (place, directory) = _dtype(basis_dtype, working_dtype), _place(basis)
    if place == "host" and device.type == "cpu":
        raise ProblemError("basis is 'host', which is for problems on a CUDA device; on the CPU give 'memory'")
    working = _Working(working_rows, columns, working_dtype, available)
    in_memory = BasisPlan(rows, columns, dtype, None, device)
    if (place not in ("disk", "host") or rows == 0) and working.leaves(in_memory.bytes):
        return in_memory
    if place == "memory" or rows == 0:
        raise PlanError(working.shortage(in_memory))
    working.require(BasisPlan(rows, columns, dtype, directory, device).bytes_at_work)
    if place in ("auto", "host") and device.type != "cpu":
        in_host = replace(in_memory, host=True)
        if _fits_into_host(in_host, required=place == "host"):
            return in_host
    on_disk = replace(in_memory, directory=directory)
    _require_disk(on_disk, directory)
    return on_disk


@dataclass(frozen=True)
class _Working:
    """The vectors at work, and the memory that they and the basis can have."""

    rows: int
    columns: int
    dtype: torch.dtype
    available: int | None

    @property
    def bytes(self) -> int:
        return self.rows * self.columns * self.dtype.itemsize

    @property
    def gibibytes(self) -> float:
        """What can be had."""
        return (self.available or 0) / 2**30

    def leaves(self, size: int) -> bool:
        return self.available is None or self.bytes + size <= self.available

    def shortage(self, plan: BasisPlan) -> str:
        on_cpu = plan.device.type == "cpu"
        where, other = ("", 'basis="disk"') if on_cpu else (f" on {plan.device}", 'basis="host"')
        return (
            f"the Lanczos basis takes {(self.bytes + plan.bytes) / 2**30:.1f} GiB ({plan.contents}, and {self.rows} of "
            f"{_name(self.dtype)}), but {self.gibibytes:.1f} GiB are available{where}; take fewer steps, "
            f'basis_dtype="bfloat16", {other}, or reorthogonalization="none", which keeps three blocks'
        )

    def require(self, staging: int) -> None:
        """Raise a PlanError unless the vectors at work fit, and the tiles of a basis elsewhere beside them."""
        if self.leaves(staging):
            return
        tiles = f", and two tiles of the basis {staging / 2**30:.1f} GiB" if staging else ""
        raise PlanError(
            f"three blocks of {self.rows // 3} vectors of {self.columns} {_name(self.dtype)} take "
            f"{self.bytes / 2**30:.1f} GiB{tiles}, but {self.gibibytes:.1f} GiB of memory are available; "
            f"take a smaller block{' or fewer steps' if staging else ''}"
        )


def _fits_into_host(plan: BasisPlan, required: bool) -> bool:
    room = available_memory()
    if room is None or plan.bytes <= room:
        return True
    if required:
        raise PlanError(
            f"the Lanczos basis takes {plan.bytes / 2**30:.1f} GiB of the host's memory ({plan.contents}), but "
            f'{room / 2**30:.1f} GiB are available; take fewer steps, basis_dtype="bfloat16", or basis="disk"'
        )
    return False


def _require_disk(plan: BasisPlan, directory: Path) -> None:
    """Raise a PlanError unless a directory has room on a disk."""
    free = shutil.disk_usage(directory).free
    if plan.bytes > free:
        raise PlanError(
            f"the Lanczos basis takes {plan.bytes / 2**30:.1f} GiB ({plan.contents}), but {directory} has "
            f'{free / 2**30:.1f} GiB free; take fewer steps, basis_dtype="bfloat16", or another directory as basis'
        )
    if _in_memory(directory):
        raise PlanError(
            f"{directory} lies in memory itself (tmpfs), so a basis there saves nothing; "
            "give a directory on a disk as basis, or set HESD_FAST_SCRATCH to one"
        )


def _dtype(basis_dtype: str | torch.dtype, working: torch.dtype) -> torch.dtype:
    if isinstance(basis_dtype, str):
        if basis_dtype == "auto":
            return working
        if basis_dtype not in BASIS_DTYPES:
            raise ProblemError(f"basis_dtype is {basis_dtype!r}; wanted 'auto' or one of {tuple(BASIS_DTYPES)}")
        basis_dtype = BASIS_DTYPES[basis_dtype]
    if basis_dtype not in BASIS_DTYPES.values():
        raise ProblemError(f"basis_dtype is {basis_dtype!r}; wanted 'auto' or one of {tuple(BASIS_DTYPES)}")
    if basis_dtype.itemsize > working.itemsize:
        raise ProblemError(
            f"basis_dtype is {_name(basis_dtype)}, but the products are in {_name(working)}; "
            "wanted the same precision or a lower one"
        )
    return basis_dtype


def _place(basis: str | os.PathLike[str]) -> tuple[str, Path]:
    if not isinstance(basis, (str, os.PathLike)):
        raise ProblemError(f"basis is {basis!r}; wanted one of {PLACES} or a directory")
    if isinstance(basis, str) and basis in PLACES:
        return basis, default_directory()
    directory = Path(basis)
    if not directory.is_dir():
        raise ProblemError(f"basis is {str(basis)!r}, which is no directory; wanted one of {PLACES} or a directory")
    return "disk", directory


def default_directory() -> Path:
    """Return where a basis on disk lies by default."""
    wanted = os.environ.get("HESD_FAST_SCRATCH")
    if wanted:
        if not Path(wanted).is_dir():
            raise ProblemError(f"HESD_FAST_SCRATCH is {wanted!r}, which is no directory")
        return Path(wanted)
    for candidate in ("/var/tmp", tempfile.gettempdir()):
        if os.path.isdir(candidate) and os.access(candidate, os.W_OK):
            return Path(candidate)
    return Path.cwd()


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _in_memory(directory: Path) -> bool:
    """Whether the directory is on a tmpfs, as far as the system tells."""
    try:
        mounts = [line.split() for line in Path("/proc/mounts").read_text().splitlines()]
    except OSError:
        return False
    here = directory.resolve()
    best, kind = "", ""
    for _, point, filesystem, *_ in mounts:
        point = point.replace("\\040", " ")
        if here.is_relative_to(point) and len(point) >= len(best):
            best, kind = point, filesystem
    return kind in ("tmpfs", "ramfs")


def _file_of_tiles(plan: BasisPlan) -> list[Tensor]:
    """Map a file that has no name: it is gone when the last tile is, and with the process however that ends."""
    try:
        with tempfile.TemporaryFile(dir=plan.directory) as file:
            # Space is taken now: a full disk is an error here, and not a fault in the middle of a step.
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, plan.bytes)
            else:
                file.truncate(plan.bytes)
            mapping: Any = mmap.mmap(file.fileno(), plan.bytes)
    except OSError as error:
        raise PlanError(
            f"a file of {plan.bytes / 2**30:.1f} GiB for the Lanczos basis cannot be made in {plan.directory}: "
            f"{error}; give another directory as basis"
        ) from error
    return _tiles(plan, torch.frombuffer(mapping, dtype=plan.dtype))


def _pinned(plan: BasisPlan) -> Tensor:
    try:
        return panels.pinned_memory(plan.bytes).view(plan.dtype)
    except (OSError, EngineError) as error:
        raise PlanError(
            f"{plan.bytes / 2**30:.1f} GiB of pinned memory for the Lanczos basis are not to be had: {error}; "
            'give basis="disk"'
        ) from error


def _tiles(plan: BasisPlan, memory: Tensor) -> list[Tensor]:
    count = math.ceil(plan.columns / TILE_COLUMNS)
    whole = memory.view(count, plan.rows, TILE_COLUMNS)
    last = plan.columns - (count - 1) * TILE_COLUMNS
    return [whole[tile, :, : TILE_COLUMNS if tile + 1 < count else last] for tile in range(count)]
