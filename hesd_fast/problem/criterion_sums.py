"""The sum and the count of a criterion of PyTorch, of a batch or term by term."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.loss import _Loss as CriterionModule

from hesd_fast.problem import ordinary_operations as ordinary
from hesd_fast.problem.softmax_cross_entropy import softmax_cross_entropy

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


def computes_what_its_class_says(criterion: Any) -> bool:
    """Return whether a criterion is one of PyTorch's, counted here, without a forward or hooks of its own."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return (
        isinstance(criterion, (*OF_ELEMENTS, *OF_ROWS, *OF_CLASSES))
        and getattr(getattr(criterion, "forward", None), "__module__", None)
        == CriterionModule.__module__  # a subclass may have its own
        and not any(getattr(criterion, name) for name in hooks)
    )


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
    """Return the criterion's value with a reduction other than its own; without cancellation where that is known."""
    kind = type(criterion)
    if kind is nn.CrossEntropyLoss:
        options = criterion.ignore_index, reduction, criterion.label_smoothing
        return cross_entropy(output, targets, criterion.weight, *options)
    if kind is nn.BCEWithLogitsLoss and targets.shape == output.shape:
        return ordinary.binary_cross_entropy_with_logits(
            output, targets, criterion.weight, criterion.pos_weight, reduction
        )
    if kind is nn.MultiLabelSoftMarginLoss and targets.shape == output.shape and output.ndim:
        losses = ordinary.binary_cross_entropy_with_logits(output, targets, criterion.weight, None, "none").mean(-1)
        return losses.sum() if reduction == "sum" else losses
    if getattr(criterion, "reduction", reduction) != reduction:
        criterion = copy.copy(criterion)  # shallow, so that a subclass keeps its options
        criterion.reduction = reduction
    value: Tensor = criterion(output, targets)
    return value


def cross_entropy(
    logits: Tensor,
    targets: Any,
    weight: Tensor | None = None,
    ignore_index: int = IGNORED,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    """Return ``functional.cross_entropy``, in float32 at least, with derivatives in which nothing cancels.

    They are closed forms where targets are classes and nothing is smoothed. Else the gradient T p - t of soft targets t
    of sum T is as good as their rounding lets it be: its largest entry is minus the sum of the others.
    """
    # Half precision cannot hold the sum over many tokens.
    precision = torch.promote_types(logits.dtype, torch.float32)
    if weight is not None and weight.dtype == logits.dtype:
        weight = weight.to(precision)
    losses = None
    if isinstance(targets, Tensor) and logits.ndim:
        losses = _cross_entropies(logits, targets, weight, ignore_index, label_smoothing)
    if losses is None:  # PyTorch says why it refuses this
        return functional.cross_entropy(
            logits.to(precision), targets, weight, None, ignore_index, None, reduction, label_smoothing
        )
    if reduction == "mean":
        return losses.sum() / _counts(targets, weight, ignore_index).sum()
    return losses.sum() if reduction == "sum" else losses


def _cross_entropies(
    logits: Tensor, targets: Tensor, weight: Tensor | None, ignore_index: int, smoothing: float
) -> Tensor | None:
    """Return the loss of every target, or None for shapes that PyTorch refuses."""
    of_classes = min(logits.ndim - 1, 1)  # the dimension
    wanted = logits.shape[:of_classes] + logits.shape[of_classes + 1 :]
    classes = logits.shape[of_classes]
    if weight is not None and weight.shape != (classes,):
        return None
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    along = None if weight is None else weight.view(-1, *[1] * (logits.ndim - of_classes - 1))
    if targets.is_floating_point():
        if targets.shape != logits.shape:
            return None
        soft = targets * (1 - smoothing) + smoothing / classes if smoothing else targets
        soft = soft if along is None else soft * along
        return -(ordinary.log_softmax(wide, of_classes) * soft).sum(of_classes)
    if targets.shape != wanted:
        return None
    if (
        logits.ndim > 1
        and targets.dtype == torch.int64
        and not smoothing
        and (along is None or along.dtype == wide.dtype)
    ):
        counted = targets.flatten() != ignore_index
        chosen = targets.flatten().masked_fill(~counted, 0)
        losses = softmax_cross_entropy(logits.movedim(1, -1).flatten(0, -2), chosen)
        losses = losses if weight is None else losses * weight[chosen]
        return losses.masked_fill(~counted, 0).view(wanted)
    logs = ordinary.log_softmax(wide, of_classes)
    losses = functional.nll_loss(logs, targets, weight, ignore_index=ignore_index, reduction="none")
    if not smoothing:
        return losses
    even = (logs if along is None else logs * along).sum(of_classes).masked_fill(targets == ignore_index, 0)
    return (1 - smoothing) * losses - smoothing / classes * even


def _target_counts(criterion: Any, targets: Tensor) -> Tensor:
    """Return what the mean of a criterion of classes divides by, target by target."""
    ignored = IGNORED if criterion.ignore_index is None else criterion.ignore_index
    return _counts(targets, criterion.weight, ignored)


def _counts(targets: Tensor, weight: Tensor | None, ignore_index: int) -> Tensor:
    """Return what PyTorch's mean divides by, target by target: its weight, or 0 if it is ignored."""
    if targets.is_floating_point():  # class probabilities: one term per position, none ignored, weights not counted
        return torch.ones_like(targets.select(1 if targets.ndim > 1 else 0, 0), dtype=torch.float32)
    counted = targets != ignore_index
    if weight is None:
        return counted
    weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
    return torch.where(counted, weight[targets.masked_fill(~counted, 0)], 0)
