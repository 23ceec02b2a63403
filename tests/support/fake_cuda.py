"""A fake CUDA device, for problems that lie on one: its tensors hold their numbers in the host's memory.

PyTorch sees a device of its own (the one that it keeps for backends written in Python), autograd and function
transforms included. Operations run on the CPU underneath; panels are exported by DLPack as CUDA ones, and the emulated
engine takes them to its CUDA kernels. As on a GPU, an operation on tensors of two devices is an error, and so is
NumPy's view of a tensor on one. Where the host would wait for the device, as when it reads a number, it is counted.

What this cannot show: CUDA's own kernels, streams, and what PyTorch does for CUDA alone.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx.experimental import proxy_tensor
from torch.utils._python_dispatch import return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from hesd_fast.engine.cuda import CudaRuntime

TYPE = "fake_cuda"

_waits = 0

_DLPACK_CUDA = 2
_aten = torch.ops.aten
_OPERATIONS = torch.library.Library("aten", "IMPL")  # those without a tensor to go by
_COPY = _aten.copy_.default
# Take indices, or what is copied, from the CPU as well.
_ACROSS_DEVICES = {
    *(_COPY, _aten._to_copy.default, _aten.index.Tensor),
    *(_aten.index_put.default, _aten.index_put_.default, _aten._index_put_impl_.default),
}
_READ_BY_THE_HOST = {_aten._local_scalar_dense.default, _aten.nonzero.default, _aten.equal.default}


class _Module:
    """What PyTorch looks for in ``torch.<name of a device>``."""

    def is_initialized(self) -> bool:
        return True

    def is_available(self) -> bool:
        return True

    def current_device(self) -> int:
        return 0

    def device_count(self) -> int:
        return 2

    def _is_in_bad_fork(self) -> bool:
        return False

    def manual_seed_all(self, seed: int) -> None:
        pass  # random numbers are the CPU's

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]


class FakeCudaRuntime(CudaRuntime):
    """What the package asks about CUDA devices, answered for this one."""

    def is_cuda(self, device: torch.device) -> bool:
        return device.type == TYPE

    def free_memory(self, device: torch.device) -> int:
        return 2**30

    def peak_memory(self, device: torch.device) -> int:
        return 2**20

    def name(self, device: torch.device) -> str:
        return str(device)

    def synchronize(self, device: torch.device) -> None:
        pass  # its work is done when it is given


def start() -> None:
    """Make the device known to PyTorch, before the first backward pass of the process."""
    _setup_privateuseone_for_python_backend(TYPE, _Module())
    for name, function in (
        ("empty.memory_format", _aten.empty.memory_format),
        ("empty_strided", _aten.empty_strided.default),
        ("_efficientzerotensor", _aten.zeros.default),
        ("eye", _aten.eye.default),  # is made by resizing a tensor, which this one cannot
    ):
        _OPERATIONS.impl(name, _maker(function), "PrivateUse1")
    proxy_tensor.HANDLED_TYPES += (FakeCudaTensor,)  # traces see its operations, not those underneath


class FakeCudaTensor(Tensor):
    """A tensor on the device."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor, device: torch.device) -> FakeCudaTensor:
        made = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            layout=inner.layout,
            device=device,
        )
        made.inner = inner
        return made  # type: ignore[no-any-return]

    def __repr__(self, **_: Any) -> str:
        return f"FakeCudaTensor({self.inner!r}, {self.device})"

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def data_ptr(self) -> int:
        return self.inner.data_ptr()

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.inner.untyped_storage()

    def __dlpack_device__(self) -> tuple[int, int]:  # type: ignore[override]
        return _DLPACK_CUDA, self.device.index

    def __dlpack__(self, **_: Any) -> Any:
        capsule = self.inner.detach().__dlpack__()
        pointer = ctypes.pythonapi.PyCapsule_GetPointer
        pointer.restype, pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
        device = pointer(capsule, b"dltensor") + ctypes.sizeof(ctypes.c_void_p)  # after the address of the data
        ctypes.c_int32.from_address(device).value = _DLPACK_CUDA
        ctypes.c_int32.from_address(device + 4).value = self.device.index
        return capsule

    @classmethod
    def __torch_dispatch__(
        cls, function: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return _run(function, args, kwargs or {})


def _run(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    global _waits
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    devices = {leaf.device for leaf in tensors if isinstance(leaf, FakeCudaTensor)}
    here = any(not isinstance(leaf, FakeCudaTensor) and leaf.ndim > 0 for leaf in tensors)
    if function not in _ACROSS_DEVICES and len(devices) + here > 1:
        found = " and ".join(str(device) for device in [*devices, *(["cpu"] if here else [])])
        raise RuntimeError(f"{function}: Expected all tensors to be on the same device, but found {found}")
    wanted = kwargs.get("device")
    target = wanted if wanted is not None else next(iter(devices), torch.device("cpu"))
    if wanted is not None:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    if function in _READ_BY_THE_HOST or (devices and target.type == "cpu") or (function is _COPY and here):
        _waits += len(devices) > 0
    result = function(*tree_map_only(FakeCudaTensor, _inner, args), **tree_map_only(FakeCudaTensor, _inner, kwargs))
    if function is _COPY:
        return args[0]
    if target.type != TYPE:
        return result
    result = tree_map_only(Tensor, lambda made: FakeCudaTensor(made, _whole(target)), result)
    return return_and_correct_aliasing(function, args, kwargs, result)


def _whole(device: torch.device) -> torch.device:
    return torch.device(TYPE, device.index or 0)


def _maker(function: Any) -> Callable[..., FakeCudaTensor]:
    def make(*args: Any, device: torch.device, **kwargs: Any) -> FakeCudaTensor:
        return FakeCudaTensor(function(*args, **kwargs, device=torch.device("cpu")), _whole(device))

    return make


def _inner(tensor: FakeCudaTensor) -> Tensor:
    return tensor.inner


@contextmanager
def count_waits() -> Iterator[Callable[[], int]]:
    """Give what says how often the host has waited within."""
    before = _waits
    yield lambda: _waits - before


def move(model: nn.Module) -> nn.Module:
    """Put a model on the device; ``model.to`` would give each name of a tied parameter a tensor of its own there."""
    moved: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                if id(parameter) not in moved:
                    moved[id(parameter)] = nn.Parameter(parameter.detach().to(TYPE), parameter.requires_grad)
                module._parameters[name] = moved[id(parameter)]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = buffer.to(TYPE)
    return model
