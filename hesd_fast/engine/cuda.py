"""All that is asked of PyTorch about CUDA devices: the current stream, memory, random numbers, whether work is done."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class CudaRuntime:
    """What PyTorch says and does about CUDA devices.

    :data:`runtime` is the one instance, for Python and for the compiled engine: whoever replaces it, as tests do on
    machines without a GPU, replaces every answer.
    """

    def is_cuda(self, device: torch.device) -> bool:
        """Whether the kernels for CUDA devices work on this one."""
        return device.type == "cuda"

    def current_stream(self, device: int) -> int:
        """Return the handle of the stream that is current on a device; called by the compiled engine."""
        return int(torch.cuda.current_stream(device).cuda_stream)

    def dlpack_capsule(self, panel: Any) -> Any:
        """Return the DLPack capsule of a panel on a device, without waiting for it; called by the compiled engine.

        PyTorch exports tensors of the current device alone.
        """
        if not isinstance(panel, Tensor):
            return panel.__dlpack__(stream=-1)
        with torch.cuda.device(panel.device):
            return panel.__dlpack__(stream=-1)

    def workspace(self, device: int, size: int) -> Tensor:
        """Return ``size`` bytes of a device's memory; called by the compiled engine."""
        return torch.empty(size, dtype=torch.uint8, device=torch.device("cuda", device))

    def free_memory(self, device: torch.device) -> int:
        """Return how many bytes a device can still give, what PyTorch holds in reserve included."""
        free, _ = torch.cuda.mem_get_info(device)
        return int(free) + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)

    def with_number(self, device: torch.device) -> torch.device:
        """Return the device with its number, which ``torch.device("cuda")`` leaves to what is current."""
        return torch.empty(0, device=device).device if self.is_cuda(device) and device.index is None else device

    def name(self, device: torch.device) -> str:
        """Return what a device calls itself."""
        return torch.cuda.get_device_name(device)

    def peak_memory(self, device: torch.device) -> int:
        """Return the most bytes of a device that PyTorch's tensors have taken so far."""
        return int(torch.cuda.max_memory_allocated(device))

    def release_unused(self) -> None:
        """Give memory that no tensor uses back to the devices in use."""
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            torch.cuda.empty_cache()

    def generators(self) -> tuple[torch.Generator, ...]:
        """Return the random generators of all devices, once CUDA is in use."""
        in_use = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
        return tuple(torch.cuda.default_generators) if in_use else ()

    def synchronize(self, device: torch.device) -> None:
        """Wait until a CUDA device has done what it was given; on other devices nothing is waited for."""
        if self.is_cuda(device):
            torch.cuda.synchronize(device)


runtime = CudaRuntime()
