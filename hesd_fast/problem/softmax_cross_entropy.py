"""Softmax cross-entropy by closed forms of its value and its first two derivatives, in which nothing cancels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import TransformType, get_interpreter_stack, is_legacy_batchedtensor

from hesd_fast.engine import cuda
from hesd_fast.problem import ordinary_operations as ordinary

CHUNK = 2**18
"""Logits worked on at a time: a few copies of so many stay in the cache of a processor."""

CUDA_CHUNK = 2**26
"""The same on a GPU, where a few copies are no matter next to the memory there is, and an operation on few is slow."""


def softmax_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the cross-entropy of every row, l_r = log sum_c exp(z_rc) - z_(r, y_r).

    With p the softmax of a row z and e the unit vector of its target y, the gradient is p - e and the Hessian times u
    is p * u - p (p . u). Where p_y is next to 1, both cancel if they are computed as they are written: in float32
    nothing is left of them below a loss of 1e-7. So p_y - 1 is computed as minus the sum of the other probabilities,
    and u is taken relative to its entry at the most probable class, which changes no product. Half precision is
    computed with in float32.

    Parameters
    ----------
    logits : tensor (R, C)
        float16, bfloat16, float32 or float64.
    targets : tensor (R,)
        int64, from 0 to C - 1.

    Returns
    -------
    tensor (R,)
        float64 for float64 logits, else float32.

    Notes
    -----
    Memory: two numbers a row. Only these and the logits are kept for either derivative, each of which makes one tensor
    (R, C) and no other. Third derivatives, those in forward mode, and batched ones with a graph make a few copies.
    """
    if _is_untransformable():
        return -ordinary.log_softmax(_widened(logits), 1).gather(1, targets[:, None])[:, 0]
    losses: Tensor = _CrossEntropyRows.apply(logits, targets)[0]  # type: ignore[no-untyped-call]
    return losses


class _CrossEntropyRows(torch.autograd.Function):
    """(logits, targets) -> losses, most probable classes and 1 - p_y, all (R,)."""

    generate_vmap_rule = True

    @staticmethod
    def forward(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        losses, missing = (torch.empty_like(logits[:, 0], dtype=_precision(logits)) for _ in range(2))
        top = torch.empty_like(logits[:, 0], dtype=torch.int64)
        for rows in _chunks(logits):
            chunk, target = _widened(logits[rows]), targets[rows, None]
            index = chunk.argmax(1, keepdim=True)
            p = chunk.softmax(1)
            others = p.scatter(1, target, 0.0).sum(1, keepdim=True)
            # Differences of large numbers first, so that a small loss keeps its digits.
            far = chunk.gather(1, index) - chunk.gather(1, target) - p.gather(1, index).log()
            losses[rows].copy_(torch.where(others < 0.5, -(-others).log1p(), far)[:, 0])
            top[rows].copy_(index[:, 0])
            missing[rows].copy_(others[:, 0])
        return losses, top, missing

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: tuple[Tensor, Tensor, Tensor]) -> None:
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(*inputs, *output[1:])
        ctx.save_for_forward(*inputs, *output[1:])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, *_: Tensor) -> tuple[Tensor, None]:
        if torch.is_grad_enabled() and is_legacy_batchedtensor(gradient):
            # is_grads_batched asks for no vmap rule, and a function of one's own would lose its graph there.
            logits, targets = ctx.saved_tensors[:2]
            return (_slope(_softmax(logits), targets) * gradient[:, None]).to(logits.dtype), None
        return _Gradient.apply(*ctx.saved_tensors, gradient), None  # type: ignore[no-untyped-call]

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: Any) -> tuple[Tensor, None, None]:
        saved = ctx.saved_tensors
        slope = _Gradient.apply(*saved, torch.ones_like(saved[-1]))  # type: ignore[no-untyped-call]
        return (_widened(slope) * _widened(tangent)).sum(1), None, None


class _Gradient(torch.autograd.Function):
    """(logits, targets, top, missing, scale) -> scale (p - e), (R, C); top and missing are what is kept of each row."""

    @staticmethod
    def forward(
        logits: Tensor,
        targets: Tensor,
        top: Tensor,  # noqa: ARG004
        missing: Tensor,
        scale: Tensor,
    ) -> Tensor:
        # Made from the scale, which is_grads_batched hands over as a batch without asking for a vmap rule.
        shape = scale[:, None].expand(logits.shape)
        out = torch.empty_like(shape, dtype=logits.dtype, memory_format=torch.contiguous_format)
        for rows in _chunks(logits):
            p = _widened(logits[rows]).softmax(1)
            # Only copies work in place here: PyTorch's tracer keeps those apart from what changes with the vector.
            out[rows].copy_(p.scatter(1, targets[rows, None], -missing[rows, None]) * scale[rows, None])
        return out

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:  # noqa: ARG004
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, u: Tensor) -> tuple[Tensor, None, None, None, Tensor]:
        logits, targets, top, _, scale = ctx.saved_tensors
        if torch.is_grad_enabled():  # to be differentiated again
            product, slope = _products(_softmax(logits), targets, top, scale, _widened(u))
            return product.to(logits.dtype), None, None, None, slope
        out = torch.empty_like(u, memory_format=torch.contiguous_format)
        slope = torch.empty_like(u[:, 0], dtype=scale.dtype)
        for rows in _chunks(logits):
            p = _widened(logits[rows]).softmax(1)
            out[rows], slope[rows] = _products(p, targets[rows], top[rows], scale[rows], _widened(u[rows]))
        return out, None, None, None, slope

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Tensor:
        logits, targets, *_, scale = ctx.saved_tensors
        # In operations that can be differentiated and traced; a tracer may fold what was kept before it is there.
        p = _softmax(logits)
        top = p.argmax(1)
        change = torch.zeros_like(p)
        if (tangent := tangents[0]) is not None:
            change = _products(p, targets, top, scale, _widened(tangent))[0]
        if (tangent := tangents[-1]) is not None:
            change = change + _slope(p, targets) * tangent[:, None]
        return change.to(logits.dtype)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Tensor) -> tuple[Tensor, int]:
        *fixed, scale = inputs
        if in_dims[:-1] == (None,) * len(fixed):
            unit = _Gradient.apply(*fixed, torch.ones_like(fixed[-1]))  # type: ignore[no-untyped-call]
            return (_widened(unit) * scale.movedim(in_dims[-1] or 0, 0)[..., None]).to(unit.dtype), 0
        # Every row has a life of its own, so more rows are all that is needed.
        rows = [
            (x.unsqueeze(0).expand(info.batch_size, *x.shape) if dim is None else x.movedim(dim, 0)).flatten(0, 1)
            for x, dim in zip(inputs, in_dims, strict=True)
        ]
        return _Gradient.apply(*rows).unflatten(0, (info.batch_size, -1)), 0  # type: ignore[no-untyped-call]


def _products(p: Tensor, targets: Tensor, top: Tensor, scale: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """Return scale (p * u - p (p . u)) and (p - e) . u, row by row."""
    u = u - u.gather(1, top[:, None])
    pu = p * u
    mean = pu.sum(1)
    return (pu - p * mean[:, None]) * scale[:, None], mean - u.gather(1, targets[:, None])[:, 0]


def _slope(p: Tensor, targets: Tensor) -> Tensor:
    """Return p - e, with p_y - 1 as minus the sum of the others."""
    others = p.scatter(1, targets[:, None], 0.0)
    return others.scatter_add(1, targets[:, None], -others.sum(1, keepdim=True))


def _softmax(logits: Tensor) -> Tensor:
    return ordinary.log_softmax(_widened(logits), 1).exp()


def _precision(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _widened(tensor: Tensor) -> Tensor:
    return tensor.to(_precision(tensor))


def _chunks(logits: Tensor) -> list[slice]:
    rows, classes = logits.shape
    size = max((CUDA_CHUNK if cuda.runtime.is_cuda(logits.device) else CHUNK) // max(classes, 1), 1)
    return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]


def _is_untransformable() -> bool:
    """Whether a transform is active that PyTorch does not apply to an ``autograd.Function``, or compilation.

    It has no rule for ``functionalize``, and in a directional derivative of a directional derivative the second one is
    zero without a word.
    """
    if torch.compiler.is_compiling():
        return True  # it could not look at the transforms
    kinds = [level.key() for level in get_interpreter_stack() or ()]
    return TransformType.Functionalize in kinds or kinds.count(TransformType.Jvp) > 1
