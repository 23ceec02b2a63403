"""Dense Hessians, written out by hand and in float64, to compare products with."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

Parameters = dict[str, nn.Parameter]


def dense_hessian(model: nn.Module, total_loss, parameters: Parameters) -> Tensor:
    """Return the Hessian (n, n) of ``total_loss(model)`` with respect to the parameters, in the order given.

    An element of a complex parameter is two rows and columns, its real and its imaginary part.

    The parameters are replaced by slices of one flat vector, so that PyTorch's own Hessian can be asked for. Modes and
    buffers of the model are used as they are.
    """
    function, flat = _of_a_vector(model, total_loss, parameters)
    return torch.autograd.functional.hessian(function, flat).detach()


def dense_gauss_newton(model: nn.Module, outputs, of_outputs, parameters: Parameters) -> Tensor:
    """Return J^T M J (n, n), with J the Jacobian of ``outputs(model)`` and M the Hessian of ``of_outputs`` there."""
    function, flat = _of_a_vector(model, outputs, parameters)
    values = function(flat).detach()
    jacobian = torch.autograd.functional.jacobian(function, flat).reshape(values.numel(), len(flat))
    middle = torch.autograd.functional.hessian(of_outputs, values).reshape(values.numel(), values.numel())
    return (jacobian.T @ middle @ jacobian).detach()


def _of_a_vector(model: nn.Module, total_loss, parameters: Parameters) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """Return ``total_loss(model)`` as a function of one flat vector, and the vector that the parameters are now."""
    widths = [p.numel() * (2 if p.is_complex() else 1) for p in parameters.values()]
    # One name per place that holds a parameter: functional_call does not give back a module that it finds by two names.
    places = {
        f"model.{prefix}.{name}".replace("..", "."): id(parameter)
        for prefix, module in model.named_modules()
        for name, parameter in module._parameters.items()
    }
    flat = torch.cat([_as_real(p.detach()).reshape(-1) for p in parameters.values()]).requires_grad_()

    class Total(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self) -> Tensor:
            return total_loss(self.model)

    def function(vector: Tensor) -> Tensor:
        slices = vector.split(widths)
        parts = {id(p): _like(p, part) for p, part in zip(parameters.values(), slices, strict=True)}
        replaced = {name: parts[identity] for name, identity in places.items() if identity in parts}
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            return torch.func.functional_call(Total(), replaced, (), tie_weights=False)

    return function, flat


def _as_real(tensor: Tensor) -> Tensor:
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def _like(parameter: Tensor, part: Tensor) -> Tensor:
    if not parameter.is_complex():
        return part.view(parameter.shape)
    return torch.complex(*part.view(-1, 2).unbind(1)).view(parameter.shape)


def differenced_product(
    total_loss: Callable[[], Tensor], parameters: Parameters, vector: Tensor, epsilon: float
) -> Tensor:
    """Return H times a vector from four gradients at displaced parameters; no second derivative of PyTorch's is used.

    ``epsilon`` is the machine epsilon of what the loss computes in. Relative error: about epsilon^(4/5), times how much
    larger later derivatives are than the second.
    """
    leaves = list(parameters.values())
    parts = [part.view_as(p) for part, p in zip(vector.split([p.numel() for p in leaves]), leaves, strict=True)]
    originals = [p.detach().clone() for p in leaves]
    step = epsilon**0.2 / float(torch.linalg.vector_norm(vector))

    def gradient(distance: float) -> Tensor:
        with torch.no_grad():
            for p, original, part in zip(leaves, originals, parts, strict=True):
                p.copy_(original + distance * part)
        found = torch.autograd.grad(total_loss(), leaves, allow_unused=True)
        return torch.cat(
            [(torch.zeros_like(p) if g is None else g).reshape(-1) for p, g in zip(leaves, found, strict=True)]
        )

    difference = 8 * (gradient(step) - gradient(-step)) - (gradient(2 * step) - gradient(-2 * step))
    with torch.no_grad():
        for p, original in zip(leaves, originals, strict=True):
            p.copy_(original)
    return difference / (12 * step)


def reverse_over_reverse(
    total_loss: Callable[[], Tensor], parameters: dict[str, nn.Parameter], vector: Tensor
) -> Tensor:
    """Return H times a vector with two calls of torch.autograd.grad, in whatever precision the loss computes in."""
    leaves = list(parameters.values())
    parts = [part.view_as(p) for part, p in zip(vector.split([p.numel() for p in leaves]), leaves, strict=True)]
    gradients = torch.autograd.grad(total_loss(), leaves, create_graph=True)
    products = torch.autograd.grad(gradients, leaves, [part.to(p.dtype) for part, p in zip(parts, leaves, strict=True)])
    return torch.cat([product.reshape(-1).to(vector.dtype) for product in products])
