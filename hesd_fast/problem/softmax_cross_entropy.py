"""Softmax cross-entropy whose first and second derivatives are closed forms, for logits too large for many copies."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import TransformType, get_interpreter_stack, is_legacy_batchedtensor
from torch.nn import functional

from hesd_fast.engine import cuda

SMALLEST = 2**20
"""Logits from which on the closed forms are faster than PyTorch's own loss."""

CHUNK = 2**18
"""Logits worked on at a time: a few copies of so many stay in the cache of a processor."""

CUDA_CHUNK = 2**26
"""The same on a GPU, where a few copies are no matter next to the memory there is, and an operation on few is slow."""


def softmax_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the cross-entropy of every row, l_r = log sum_c exp(z_rc) - z_(r, y_r).

    With p the softmax of a row z and e the unit vector of its target, the gradient is p - e and the Hessian times u is
    p * u - p (p . u). Half precision is computed with in float32. Fewer logits than :data:`SMALLEST` are left to
    ``functional.cross_entropy``, which has less to do in Python.

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
    if not pays(logits):
        return functional.cross_entropy(_widened(logits), targets, reduction="none")
    losses: Tensor = _CrossEntropyRows.apply(logits, targets)[0]  # type: ignore[no-untyped-call]
    return losses


def pays(logits: Tensor) -> bool:
    """Whether the closed forms are used for these logits, of any shape."""
    return logits.numel() >= SMALLEST and not _is_untransformable()


class _CrossEntropyRows(torch.autograd.Function):
    """(logits, targets) -> losses, maxima and log sums exp(logits - maximum), all (R,)."""

    generate_vmap_rule = True

    @staticmethod
    def forward(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        maximum, log_sum = (torch.empty_like(logits[:, 0], dtype=_precision(logits)) for _ in range(2))
        for rows in _chunks(logits):
            chunk = _widened(logits[rows])
            maximum[rows].copy_(chunk.amax(1))
            log_sum[rows].copy_((chunk - maximum[rows, None]).exp().sum(1).log())
        # Differences of large numbers first, so that a small loss keeps its digits.
        picked = _widened(logits.gather(1, targets[:, None])[:, 0])
        return (maximum - picked) + log_sum, maximum, log_sum

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: tuple[Tensor, Tensor, Tensor]) -> None:
        _, maximum, log_sum = output
        ctx.mark_non_differentiable(maximum, log_sum)
        ctx.save_for_backward(*inputs, maximum, log_sum)
        ctx.save_for_forward(*inputs, maximum, log_sum)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, *_: Tensor) -> tuple[Tensor, None]:
        if torch.is_grad_enabled() and is_legacy_batchedtensor(gradient):
            # is_grads_batched asks for no vmap rule, and a function of one's own would lose its graph there.
            logits, targets, _, _ = ctx.saved_tensors
            return ((_softmax(logits) - _unit(logits, targets)) * gradient[:, None]).to(logits.dtype), None
        return _Gradient.apply(*ctx.saved_tensors, gradient), None  # type: ignore[no-untyped-call]

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: Any) -> tuple[Tensor, None, None]:
        logits, targets, maximum, log_sum = ctx.saved_tensors
        slope = _Gradient.apply(logits, targets, maximum, log_sum, torch.ones_like(maximum))  # type: ignore[no-untyped-call]
        return (_widened(slope) * _widened(tangent)).sum(1), None, None


class _Gradient(torch.autograd.Function):
    """(logits, targets, maximum, log_sum, scale) -> scale (p - e), (R, C); maximum and log_sum are as above."""

    @staticmethod
    def forward(logits: Tensor, targets: Tensor, maximum: Tensor, log_sum: Tensor, scale: Tensor) -> Tensor:
        # Made from the scale, which is_grads_batched hands over as a batch without asking for a vmap rule.
        shape = scale[:, None].expand(logits.shape)
        out = torch.empty_like(shape, dtype=logits.dtype, memory_format=torch.contiguous_format)
        for rows in _chunks(logits):
            p = (_widened(logits[rows]) - maximum[rows, None] - log_sum[rows, None]).exp()
            # Only copies work in place here: PyTorch's tracer keeps those apart from what changes with the vector.
            out[rows].copy_(p.scatter_add(1, targets[rows, None], -torch.ones_like(p[:, :1])) * scale[rows, None])
        return out

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:  # noqa: ARG004
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, u: Tensor) -> tuple[Tensor, None, None, None, Tensor]:
        logits, targets, maximum, log_sum, scale = ctx.saved_tensors
        if torch.is_grad_enabled():  # to be differentiated again
            product, slope = _products(_softmax(logits), targets, scale, _widened(u))
            return product.to(logits.dtype), None, None, None, slope
        out = torch.empty_like(u, memory_format=torch.contiguous_format)
        slope = torch.empty_like(u[:, 0], dtype=scale.dtype)
        for rows in _chunks(logits):
            p = (_widened(logits[rows]) - maximum[rows, None] - log_sum[rows, None]).exp()
            out[rows], slope[rows] = _products(p, targets[rows], scale[rows], _widened(u[rows]))
        return out, None, None, None, slope

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Tensor:
        logits, targets, _, _, scale = ctx.saved_tensors
        # In operations that can be differentiated and traced.
        p = _softmax(logits)
        change = torch.zeros_like(p)
        if (tangent := tangents[0]) is not None:
            change = _products(p, targets, scale, _widened(tangent))[0]
        if (tangent := tangents[-1]) is not None:
            change = change + (p - _unit(logits, targets)) * tangent[:, None]
        return change.to(logits.dtype)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Tensor) -> tuple[Tensor, int]:
        if in_dims[:4] == (None,) * 4:
            unit = _Gradient.apply(*inputs[:4], torch.ones_like(inputs[2]))  # type: ignore[no-untyped-call]
            return (_widened(unit) * inputs[4].movedim(in_dims[4] or 0, 0)[..., None]).to(unit.dtype), 0
        # Every row has a life of its own, so more rows are all that is needed.
        rows = [
            (x.unsqueeze(0).expand(info.batch_size, *x.shape) if dim is None else x.movedim(dim, 0)).flatten(0, 1)
            for x, dim in zip(inputs, in_dims, strict=True)
        ]
        return _Gradient.apply(*rows).unflatten(0, (info.batch_size, -1)), 0  # type: ignore[no-untyped-call]


def _products(p: Tensor, targets: Tensor, scale: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """Return scale (p * u - p (p . u)) and (p - e) . u, row by row."""
    pu = p * u
    mean = pu.sum(1)
    return (pu - p * mean[:, None]) * scale[:, None], mean - u.gather(1, targets[:, None])[:, 0]


def _softmax(logits: Tensor) -> Tensor:
    return _widened(logits).softmax(1)


def _unit(logits: Tensor, targets: Tensor) -> Tensor:
    return torch.zeros_like(_widened(logits)).scatter(1, targets[:, None], 1.0)


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
