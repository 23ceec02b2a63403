"""Dense Hessians, written out by hand and in float64, to compare products with."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def dense_hessian(model: nn.Module, total_loss, parameters: dict[str, nn.Parameter]) -> Tensor:
    """Return the Hessian (n, n) of ``total_loss(model)`` with respect to the parameters, in the order given.

    The parameters are replaced by slices of one flat vector, so that PyTorch's own Hessian can be asked for. Modes and
    buffers of the model are used as they are.
    """
    names, shapes = list(parameters), [p.shape for p in parameters.values()]
    flat = torch.cat([p.detach().reshape(-1) for p in parameters.values()]).requires_grad_()

    class Total(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self) -> Tensor:
            return total_loss(self.model)

    def function(vector: Tensor) -> Tensor:
        slices = vector.split([shape.numel() for shape in shapes])
        replaced = {f"model.{name}": part.view(shape) for name, part, shape in zip(names, slices, shapes, strict=True)}
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            return torch.func.functional_call(Total(), replaced, (), tie_weights=True)

    return torch.autograd.functional.hessian(function, flat).detach()
