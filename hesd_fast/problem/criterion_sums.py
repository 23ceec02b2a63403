"""The sum and the count of a criterion of PyTorch, of a batch or term by term."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from hesd_fast.problem.softmax_cross_entropy import pays, softmax_cross_entropy

SumAndCount = tuple[Tensor, Tensor | float]

SumsAndCounts = tuple[Tensor, Tensor]

# What their mean divides by is the number of losses without a reduction. The first ones have one loss an element, after
# broadcasting; the others one a sample, over the last dimension.
OF_ELEMENTS = (
    nn.MSELoss,
    nn.L1Loss,
    nn.SmoothL1Loss,
    nn.HuberLoss,
    nn.BCELoss,
    nn.BCEWithLogitsLoss,
    nn.PoissonNLLLoss,
    nn.KLDivLoss,
    nn.HingeEmbeddingLoss,
    nn.SoftMarginLoss,
)
OF_ROWS = (nn.MultiLabelMarginLoss, nn.MultiLabelSoftMarginLoss, nn.MultiMarginLoss)

# Their mean divides by the number or the class weights of the targets that are not ignored.
OF_CLASSES: tuple[type[nn.Module], ...] = (
    nn.CrossEntropyLoss,
    nn.NLLLoss,
    *([nn.LinearCrossEntropyLoss] if hasattr(nn, "LinearCrossEntropyLoss") else []),
)

IGNORED = -100
"""The label of a token that does not count."""


def sum_and_count(criterion: Any, reduction: str, output: Tensor, targets: Tensor) -> SumAndCount:
    """Return the sum of a criterion's losses, and what its reduction divides them by."""
    total = _reduced(criterion, "sum", output, targets)
    if reduction == "mean" and isinstance(criterion, OF_CLASSES):
        return total, _target_counts(criterion, targets).sum()  # no number: code that is traced cannot read one
    shape = _shape_of_losses(criterion, output, targets)
    return total, float(shape.numel() if reduction == "mean" else _samples(shape))


def _shape_of_losses(criterion: Any, output: Tensor, targets: Tensor) -> torch.Size:
    """Return the shape of the losses without a reduction."""
    if isinstance(criterion, OF_CLASSES):
        return _target_counts(criterion, targets).shape
    if isinstance(criterion, nn.MultiMarginLoss):
        return output.shape[:-1]
    shape: torch.Size = torch.broadcast_shapes(output.shape, targets.shape)  # type: ignore[no-untyped-call]
    return shape[:-1] if isinstance(criterion, OF_ROWS) else shape


def _samples(shape: torch.Size) -> int:
    return shape[0] if shape else 1


def sums_and_counts(criterion: Any, reduction: str, output: Tensor, targets: Tensor) -> SumsAndCounts:
    """Return the loss and the count of every sample."""
    losses = _reduced(criterion, "none", output, targets)
    samples = _samples(losses.shape)
    if reduction != "mean":
        counts = losses.new_ones(samples)
    elif isinstance(criterion, OF_CLASSES):
        counts = _target_counts(criterion, targets).to(losses.dtype)
    else:
        counts = torch.ones_like(losses)
    return losses.reshape(samples, -1).sum(1), counts.detach().reshape(samples, -1).sum(1)


def _reduced(criterion: Any, reduction: str, output: Tensor, targets: Any) -> Tensor:
    """Return the criterion's value with a reduction other than its own."""
    if type(criterion) is nn.CrossEntropyLoss and not criterion.label_smoothing and reduction != "mean":
        return cross_entropy(output, targets, criterion.weight, criterion.ignore_index, reduction)
    if getattr(criterion, "reduction", reduction) != reduction:
        criterion = copy.copy(criterion)  # shallow, so that a subclass keeps its options
        criterion.reduction = reduction
    value: Tensor = criterion(output, targets)
    return value


def cross_entropy(
    logits: Tensor, targets: Any, weight: Tensor | None, ignore_index: int, reduction: str = "sum"
) -> Tensor:
    """Return ``functional.cross_entropy``, in float32 at least, by closed forms where there are many logits."""
    # Half precision cannot hold the sum over many tokens.
    precision = torch.promote_types(logits.dtype, torch.float32)
    if weight is not None and weight.dtype == logits.dtype:
        weight = weight.to(precision)
    wanted = logits.shape[:1] + logits.shape[2:]
    if not (
        pays(logits)
        and logits.ndim > 1
        and isinstance(targets, Tensor)
        and targets.dtype == torch.int64
        and targets.shape == wanted
        and (weight is None or (weight.dtype == precision and weight.shape == logits.shape[1:2]))
    ):
        return functional.cross_entropy(logits.to(precision), targets, weight, None, ignore_index, None, reduction)
    counted = targets.flatten() != ignore_index
    classes = targets.flatten().masked_fill(~counted, 0)
    losses = softmax_cross_entropy(logits.movedim(1, -1).flatten(0, -2), classes)
    losses = torch.where(counted, losses if weight is None else losses * weight[classes], 0)
    return losses.sum() if reduction == "sum" else losses.view(wanted)


def _target_counts(criterion: Any, targets: Tensor) -> Tensor:
    """Return what PyTorch's mean divides by, target by target: its weight, or 0 if it is ignored."""
    if targets.is_floating_point():  # class probabilities: one term per position, none ignored, weights not counted
        return torch.ones_like(targets.select(1 if targets.ndim > 1 else 0, 0), dtype=torch.float32)
    counted = targets != (IGNORED if criterion.ignore_index is None else criterion.ignore_index)
    if criterion.weight is None:
        return counted
    weight = criterion.weight.to(torch.promote_types(criterion.weight.dtype, torch.float32))
    return torch.where(counted, weight[targets.masked_fill(~counted, 0)], 0)
