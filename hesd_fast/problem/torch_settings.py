"""Products in the precision that they are checked for, whatever PyTorch may round them to elsewhere in the process."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch.backends import cuda, cudnn, mkldnn


def _rounded_operations() -> list[Any]:
    """Return PyTorch's settings of what matrix products, convolutions and recurrent layers round float32 to."""
    places = [*((backend, name) for backend in (cudnn, mkldnn) for name in ("conv", "rnn")), (mkldnn, "matmul")]
    found = [getattr(backend, name, None) for backend, name in places]
    return [setting for setting in (*found, cuda.matmul) if hasattr(setting, "fp32_precision")]


@contextmanager
def full_float32() -> Iterator[None]:
    """Let float32 operations be in float32 within it.

    ``torch.set_float32_matmul_precision`` and its like allow products of 10 bits (TF32, on NVIDIA GPUs) or 8 bits
    (bfloat16, on processors that have it), which are no second derivatives of the float32 loss. PyTorch has two
    interfaces to the same settings, and refuses to read the older one where the two disagree. The settings are those of
    the whole process: two threads that do this at once get in each other's way.
    """
    operations = _rounded_operations()  # the newer interface, from PyTorch 2.9 on
    before = [operation.fp32_precision for operation in operations]
    matrices, convolutions = _read(torch.get_float32_matmul_precision), _read(torch._C._get_cudnn_allow_tf32)
    matrices = None if matrices == "highest" else matrices
    try:
        if matrices is not None:
            torch.set_float32_matmul_precision("highest")
        if convolutions is not None:
            torch._C._set_cudnn_allow_tf32(False)
        for operation in operations:
            if operation.fp32_precision != "ieee":
                operation.fp32_precision = "ieee"
        yield
    finally:
        if matrices is not None:
            torch.set_float32_matmul_precision(matrices)
        if convolutions is not None:
            torch._C._set_cudnn_allow_tf32(convolutions)
        for operation, precision in zip(operations, before, strict=True):
            # Where a wider setting says the same, the operation is left to it.
            for setting in ("none", precision):
                if operation.fp32_precision != precision:
                    operation.fp32_precision = setting


def _read(setting: Any) -> Any:
    try:
        return setting()
    except RuntimeError:  # the newer interface has been used for it
        return None


@contextmanager
def without_cudnn(wanted: bool) -> Iterator[None]:
    """Switch cuDNN off within it, if that is wanted."""
    before = torch._C._get_cudnn_enabled()
    torch._C._set_cudnn_enabled(before and not wanted)
    try:
        yield
    finally:
        torch._C._set_cudnn_enabled(before)


@contextmanager
def without_autocast() -> Iterator[None]:
    """Switch off an autocast that is on around it; one that begins within it is left alone."""
    with ExitStack() as stack:
        for device in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        yield


@contextmanager
def process_settings() -> Iterator[None]:
    """Let the user's code set the default dtype and deterministic algorithms; they come back as they were."""
    dtype = torch.get_default_dtype()
    deterministic = torch.are_deterministic_algorithms_enabled()
    warns = torch.is_deterministic_algorithms_warn_only_enabled()
    try:
        yield
    finally:
        if torch.get_default_dtype() != dtype:
            torch.set_default_dtype(dtype)
        if (torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()) != (
            deterministic,
            warns,
        ):
            torch.use_deterministic_algorithms(deterministic, warn_only=warns)
