"""Ready-made losses: functions ``loss(model, batch)`` whose batches of unequal size add up exactly."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from hesd_fast.data import leading_dimension, leaves, to_device
from hesd_fast.errors import ProblemError

SumAndCount = tuple[Tensor, Tensor | float]

TARGET_KEYS = ("labels", "label", "targets", "target")

# Their mean divides by the number of elements, so the sum and that number add up over batches of any shape.
_ELEMENTWISE = (
    nn.MSELoss,
    nn.L1Loss,
    nn.SmoothL1Loss,
    nn.HuberLoss,
    nn.BCELoss,
    nn.BCEWithLogitsLoss,
    nn.PoissonNLLLoss,
)


def supervised(criterion: Callable[[Any, Any], Tensor]) -> Callable[[nn.Module, Any], SumAndCount]:
    """Build the loss ``criterion(model(inputs), targets)`` over (inputs, targets) batches.

    A batch is a pair ``(inputs, targets)``, or a mapping that holds the targets under "labels", "label", "targets" or
    "target" and keyword arguments of the model under the other keys. Inputs that are a tuple or list are positional
    arguments. The model may return a tensor, a tuple or list (its first item counts), or anything with "logits".

    Parameters
    ----------
    criterion
        A torch loss module such as ``nn.CrossEntropyLoss()``, of reduction "mean" or "sum", or any function of
        (output, targets) that returns the mean over the leading dimension. Cross-entropy and negative log-likelihood
        count their targets as PyTorch's mean does: without the ignored ones, and by class weight.

    Raises
    ------
    ProblemError
        For reduction "none", and at a batch or an output of unknown form or a batch with NumPy arrays.
    """
    if not callable(criterion):
        raise ProblemError(
            f"criterion of type {type(criterion).__name__} is not callable; give a torch loss module, "
            "for example nn.CrossEntropyLoss()"
        )
    # As modules, these two count the targets that are not ignored.
    if criterion is functional.cross_entropy:
        criterion = nn.CrossEntropyLoss()
    elif criterion is functional.nll_loss:
        criterion = nn.NLLLoss()
    reduction = getattr(criterion, "reduction", "mean")
    if reduction not in ("mean", "sum", "batchmean"):
        raise ProblemError(f"the criterion has reduction={reduction!r}; use 'mean' or 'sum'")

    def loss(model: nn.Module, batch: Any) -> SumAndCount:
        _check_leaves(batch)
        inputs, targets = _inputs_and_targets(to_device(batch, _device_of(model)))
        return _sum_and_count(criterion, reduction, _logits(_call(model, inputs)), targets)

    return loss


def causal_lm() -> Callable[[nn.Module, Any], SumAndCount]:
    """Build the next-token cross-entropy of a language model, summed over the tokens that count.

    A batch is a tensor of token ids (N, T), a tuple of one such tensor, or a mapping with "input_ids" and optionally
    "attention_mask" and "labels" (N, T; -100 is ignored; by default the input ids wherever the mask is not 0). The
    model returns logits (N, T, vocabulary), as for :func:`supervised`; position t predicts the label at t + 1. Labels
    are never handed to the model. A model whose ``forward`` names no ``input_ids`` gets them as its first argument, and
    one that takes no ``attention_mask`` does not get it: the mask then only decides which tokens count.

    Raises
    ------
    ProblemError
        At a batch or an output of unknown form, and at a batch with NumPy arrays.
    """

    def loss(model: nn.Module, batch: Any) -> SumAndCount:
        _check_leaves(batch)
        batch = to_device(batch, _device_of(model))
        if isinstance(batch, tuple | list) and len(batch) == 1:
            batch = batch[0]
        if isinstance(batch, Tensor):
            batch = {"input_ids": batch}
        if not isinstance(batch, Mapping) or not isinstance(batch.get("input_ids"), Tensor):
            raise ProblemError(
                f"causal_lm got a batch of {_form(batch)}; give token ids (N, T), or a mapping with 'input_ids'"
            )
        arguments = dict(batch)
        labels = arguments.pop("labels", None)
        if labels is None:
            labels = arguments["input_ids"]
            if arguments.get("attention_mask") is not None:
                labels = labels.masked_fill(arguments["attention_mask"] == 0, -100)
        logits = _logits(_call_language_model(model, arguments))
        if logits.ndim != 3 or logits.shape[:2] != labels.shape:
            raise ProblemError(
                f"the model returned logits of shape {tuple(logits.shape)} for labels of shape {tuple(labels.shape)}; "
                "causal_lm wants logits (N, T, vocabulary) and labels (N, T)"
            )
        # Half precision cannot hold the sum over many tokens.
        logits = logits[:, :-1].float() if logits.dtype in (torch.float16, torch.bfloat16) else logits[:, :-1]
        labels = labels[:, 1:].reshape(-1)
        total = functional.cross_entropy(logits.reshape(labels.numel(), -1), labels, ignore_index=-100, reduction="sum")
        return total, (labels != -100).sum()

    return loss


def is_ready_made(loss: Callable[..., Any]) -> bool:
    """Return whether a loss was built here; its counts are right however small class weights make them."""
    return getattr(loss, "__module__", None) == __name__


def _check_leaves(batch: Any) -> None:
    for path, leaf in leaves(batch):
        if isinstance(leaf, np.ndarray):
            raise ProblemError(
                f"{path} is a NumPy array ({leaf.dtype}, shape {leaf.shape}); give a tensor, as torch.from_numpy makes "
                "one, of the model's dtype"
            )


def _device_of(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def _form(value: Any) -> str:
    if isinstance(value, Mapping):
        return f"type {type(value).__name__} with the keys {sorted(map(str, value))}"
    if isinstance(value, tuple | list):
        return f"type {type(value).__name__} with {len(value)} items"
    return f"type {type(value).__name__}"


def _inputs_and_targets(batch: Any) -> tuple[Any, Any]:
    if isinstance(batch, Mapping):
        key = next((key for key in TARGET_KEYS if key in batch), None)
        if key is not None:
            return {name: value for name, value in batch.items() if name != key}, batch[key]
    elif isinstance(batch, tuple | list) and len(batch) == 2:
        return batch[0], batch[1]
    raise ProblemError(
        f"supervised got a batch of {_form(batch)}; give a pair (inputs, targets), or a mapping with one of the keys "
        f"{', '.join(map(repr, TARGET_KEYS))}"
    )


def _call(model: nn.Module, inputs: Any) -> Any:
    if isinstance(inputs, Mapping):
        return model(**inputs)
    if isinstance(inputs, tuple | list):
        return model(*inputs)
    return model(inputs)


def _call_language_model(model: nn.Module, arguments: dict[str, Any]) -> Any:
    taken = inspect.signature(model.forward).parameters
    takes_any = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in taken.values())
    if "use_cache" in taken:
        arguments = {"use_cache": False, **arguments}
    if "attention_mask" not in taken and not takes_any:
        arguments = {name: value for name, value in arguments.items() if name != "attention_mask"}
    if "input_ids" in taken or takes_any:
        return model(**arguments)
    return model(arguments["input_ids"], **{name: value for name, value in arguments.items() if name != "input_ids"})


def _logits(output: Any) -> Tensor:
    logits = output
    if isinstance(output, Mapping):
        logits = output.get("logits")
    elif isinstance(output, tuple | list):
        logits = output[0] if output else None
    elif not isinstance(output, Tensor):
        logits = getattr(output, "logits", None)
    if not isinstance(logits, Tensor):
        raise ProblemError(
            f"the model returned {_form(output)}; wanted are a tensor, a tuple that begins with one, or 'logits'; "
            "write the loss as a function of (model, batch) for other outputs"
        )
    return logits


def _sum_and_count(criterion: Any, reduction: str, output: Tensor, targets: Any) -> SumAndCount:
    if reduction == "mean" and isinstance(criterion, (*_ELEMENTWISE, nn.CrossEntropyLoss, nn.NLLLoss)):
        summing = copy.copy(criterion)  # shallow, so that a subclass keeps its options
        summing.reduction = "sum"
        total = summing(output, targets)
        if isinstance(criterion, _ELEMENTWISE):
            shape: torch.Size = torch.broadcast_shapes(output.shape, targets.shape)  # type: ignore[no-untyped-call]
            return total, float(shape.numel())
        return total, _target_count(criterion, output, targets)
    count = leading_dimension(targets)
    if count is None:
        raise ProblemError("the targets have no leading dimension to count terms by; give targets of shape (N, ...)")
    value = criterion(output, targets)
    return (value if reduction == "sum" else value * count), float(count)


def _target_count(criterion: nn.CrossEntropyLoss | nn.NLLLoss, output: Tensor, targets: Tensor) -> Tensor | float:
    """Return what PyTorch's mean divides by: the sum of the weights of the targets that are not ignored."""
    if targets.is_floating_point():  # class probabilities: one term per position, none ignored, weights not counted
        return float(output.numel() // output.size(1 if output.ndim > 1 else 0))
    counted = targets[targets != criterion.ignore_index]
    if criterion.weight is None:
        return float(counted.numel())
    return criterion.weight[counted].sum()
