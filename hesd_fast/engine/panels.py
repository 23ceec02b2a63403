"""Memory for panels: vectors on cache lines, huge pages, and pinned memory of the host."""

from __future__ import annotations

import contextlib
import math
import mmap

import torch

from hesd_fast.engine import _engine
from hesd_fast.errors import EngineError

_CACHE_LINE = 64
_PAGE = 4096
_LONG_VECTOR = 1 << 16  # bytes
_LARGE_PANEL = 1 << 23  # bytes


def empty_panel(
    rows: int, columns: int, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> torch.Tensor:
    """Allocate an uninitialized panel whose vectors start on cache lines.

    Parameters
    ----------
    rows, columns : int
        Number of vectors and their length.
    dtype : torch.dtype
        Element type.
    device : torch.device or str
        Where it lies.

    Returns
    -------
    torch.Tensor
        Shape (rows, columns), unit stride within a vector, vectors a multiple of 64 bytes apart. Long vectors lie so
        that a column's elements spread over the sets of a cache; a large panel is on huge pages where the system has
        them, which saves the processor most of its page walks.

    Examples
    --------
    >>> import hesd_fast as hesd
    >>> panel = hesd.kernels.empty_panel(2, 5)
    >>> panel.shape, panel.stride()
    (torch.Size([2, 5]), (16, 1))
    """
    if rows < 0 or columns < 0:
        raise EngineError(f"a panel of {rows} vectors of {columns} elements was asked for; wanted both >= 0")
    stride = max(math.ceil(columns * dtype.itemsize / _CACHE_LINE), 1) * _CACHE_LINE
    on_cpu = torch.device(device).type == "cpu"
    if on_cpu and stride >= _LONG_VECTOR:
        stride = math.ceil(stride / _PAGE) * _PAGE + _PAGE // 8
    elements = stride // dtype.itemsize
    if not on_cpu or rows * stride < _LARGE_PANEL or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty((rows, elements), dtype=dtype, device=device)[:, :columns]
    try:
        memory = _huge_pages(rows * stride)
    except OSError as error:
        raise EngineError(
            f"a panel of {rows} vectors of {columns} elements takes {rows * stride / 2**30:.1f} GiB, which the system "
            f"does not give: {error}"
        ) from error
    return torch.frombuffer(memory, dtype=dtype).view(rows, elements)[:, :columns]


def _huge_pages(size: int) -> mmap.mmap:
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a system without huge pages
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memory


class _PinnedMemory(mmap.mmap):
    """Memory of the host that stays pinned as long as it is in use."""

    address = 0

    def __del__(self) -> None:
        if self.address:
            _engine.unpin(self.address)


def pinned_memory(size: int) -> torch.Tensor:
    """Allocate pinned memory of the host: copies to and from CUDA devices use it directly, while the host goes on.

    PyTorch's own pinned memory comes in powers of two, and stays with PyTorch after its last use.

    Parameters
    ----------
    size : int
        Number of bytes.

    Returns
    -------
    torch.Tensor
        Shape (size,), uint8.

    Raises
    ------
    EngineError
        Where the system does not pin it, or there are no CUDA kernels.
    OSError
        Where the system does not give it.
    """
    memory = _PinnedMemory(-1, size)
    tensor = torch.frombuffer(memory, dtype=torch.uint8)
    _engine.pin(tensor.data_ptr(), size)
    memory.address = tensor.data_ptr()
    return tensor
