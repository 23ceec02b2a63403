"""What the engine asks of PyTorch about CUDA devices: the current stream, memory, and whether work is done."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def current_stream(device: int) -> int:
    """Return the handle of the stream that is current on a device; called by the compiled engine."""
    return int(torch.cuda.current_stream(device).cuda_stream)


def lend(panel: Any) -> Any:
    """Return the DLPack capsule of a panel on a device, without waiting for it; called by the compiled engine.

    PyTorch lends tensors of the current device alone.
    """
    if not isinstance(panel, Tensor):
        return panel.__dlpack__(stream=-1)
    with torch.cuda.device(panel.device):
        return panel.__dlpack__(stream=-1)


def workspace(device: int, size: int) -> Tensor:
    """Return ``size`` bytes of a device's memory; called by the compiled engine."""
    return torch.empty(size, dtype=torch.uint8, device=torch.device("cuda", device))


def free_memory(device: torch.device) -> int:
    """Return how many bytes a device can still give, what PyTorch holds in reserve included."""
    free, _ = torch.cuda.mem_get_info(device)
    return int(free) + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def synchronize(device: torch.device) -> None:
    """Wait until a CUDA device has done what it was given; on other devices nothing is waited for."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
