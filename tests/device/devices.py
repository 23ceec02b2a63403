"""The device that these tests run on: a GPU that the engine has kernels for, if there is one, or a fake CUDA device."""

from __future__ import annotations

import fake_cuda
import torch
from emulation import engine
from torch import nn

from hesd_fast import build_info

REAL = bool(torch.cuda.is_available() and build_info()["cuda"])
TYPE = "cuda" if REAL else fake_cuda.TYPE


def move(model: nn.Module) -> nn.Module:
    """Put a model on the device."""
    return model.to(TYPE) if REAL else fake_cuda.move(model)


def used_the_cuda_kernels() -> bool | None:
    """Whether they have worked since the last call; None on a GPU, which does not say."""
    return None if REAL else sum(engine().take_traffic()) > 0
