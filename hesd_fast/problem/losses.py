"""Ready-made losses: callables ``loss(model, batch)`` whose batches of unequal size add up exactly."""

from __future__ import annotations

import functools
import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.rnn import PackedSequence

from hesd_fast.errors import ProblemError, first_line
from hesd_fast.problem.batches import leaves, to_device
from hesd_fast.problem.criterion_sums import (
    IGNORED,
    OF_CLASSES,
    SumAndCount,
    SumsAndCounts,
    computes_what_its_class_says,
    cross_entropy,
    sum_and_count,
    sums_and_counts,
)
from hesd_fast.problem.signatures import signature_of, takes

TARGET_KEYS = ("labels", "label", "targets", "target")

_MODULES = {
    functional.cross_entropy: nn.CrossEntropyLoss,
    functional.nll_loss: nn.NLLLoss,
    functional.mse_loss: nn.MSELoss,
    functional.l1_loss: nn.L1Loss,
    functional.smooth_l1_loss: nn.SmoothL1Loss,
    functional.huber_loss: nn.HuberLoss,
    functional.binary_cross_entropy: nn.BCELoss,
    functional.binary_cross_entropy_with_logits: nn.BCEWithLogitsLoss,
    functional.poisson_nll_loss: nn.PoissonNLLLoss,
    functional.kl_div: nn.KLDivLoss,
    functional.hinge_embedding_loss: nn.HingeEmbeddingLoss,
    functional.soft_margin_loss: nn.SoftMarginLoss,
    functional.multilabel_margin_loss: nn.MultiLabelMarginLoss,
    functional.multilabel_soft_margin_loss: nn.MultiLabelSoftMarginLoss,
    functional.multi_margin_loss: nn.MultiMarginLoss,
}
"""The criteria that are functions, as modules, which know what their mean divides by."""


class OutputLoss(ABC):
    """A loss of a model's outputs: ``loss(model, batch)`` is ``of_outputs(outputs(model, batch), batch)``.

    Examples
    --------
    >>> import torch
    >>> import hesd_fast as hesd
    >>> class SquaredError(hesd.losses.OutputLoss):
    ...     def outputs(self, model, batch):
    ...         return model(batch)
    ...     def of_outputs(self, outputs, batch):
    ...         return outputs.square().sum(), len(batch)
    ...     def terms_of_outputs(self, outputs, batch):
    ...         return outputs.square().sum(1), torch.ones(len(batch))
    >>> problem = hesd.Problem(torch.nn.Linear(2, 1, bias=False), SquaredError(), torch.eye(2))
    >>> hesd.GaussNewtonOperator(problem, jvp="reverse").matvec(torch.tensor([1.0, 3.0]))
    tensor([1., 3.])
    """

    @abstractmethod
    def outputs(self, model: nn.Module, batch: Any) -> Tensor:
        """Return what the model computes of a batch, the tensor that the loss is a function of."""

    @abstractmethod
    def of_outputs(self, outputs: Tensor, batch: Any) -> SumAndCount | Tensor:
        """Return the sum of the loss terms, and their number or weight; or their mean, as a Problem takes it."""

    @abstractmethod
    def terms_of_outputs(self, outputs: Tensor, batch: Any) -> SumsAndCounts:
        """Return the sum and the count term by term, (k,) each; they add up to those of :meth:`of_outputs`."""

    def __call__(self, model: nn.Module, batch: Any) -> SumAndCount | Tensor:
        """Return the sum of the loss terms of a batch, and their number or weight; or their mean."""
        return self.of_outputs(self.outputs(model, batch), batch)


def supervised(criterion: Callable[[Any, Any], Tensor]) -> OutputLoss:
    """Build the loss ``criterion(model(inputs), targets)`` over (inputs, targets) batches.

    A batch is a pair ``(inputs, targets)``, or a mapping that holds the targets under "labels", "label", "targets" or
    "target" and keyword arguments of the model under the other keys. Inputs that are a tuple or list are positional
    arguments. The model may return a tensor, a tuple or list (its first item counts), or anything with "logits".

    Parameters
    ----------
    criterion
        A torch loss module such as ``nn.CrossEntropyLoss()`` or a function of ``torch.nn.functional``, of reduction
        "mean", "batchmean" or "sum"; or any function of (output, targets) that returns a mean. Those of PyTorch count
        terms as their own mean does: cross-entropy and negative log-likelihood the targets that are not ignored, by
        class weight, others elements or samples. How many terms another mean is of, it does not say, so it is taken
        for a mean as :class:`~hesd_fast.Problem` takes one. With reduction "sum" the loss is PyTorch's sum divided by
        the number of samples in all batches, so that the Hessian does not grow with the data. Term by term
        (:meth:`OutputLoss.terms_of_outputs`), one sample of the leading dimension is one term. Cross-entropies of
        logits are computed in forms of the same value whose derivatives keep their digits where the loss is near zero.
        A criterion with hooks or a ``forward`` of its own is called as it is, as a function that returns a mean.

    Raises
    ------
    ProblemError
        For reduction "none" and a criterion of other arguments than (output, targets); and at a batch or an output of
        unknown form, a batch with NumPy arrays, or a criterion that returns no scalar.

    Examples
    --------
    >>> import torch
    >>> import hesd_fast as hesd
    >>> model = torch.nn.Linear(3, 2)
    >>> loss = hesd.losses.supervised(torch.nn.CrossEntropyLoss())
    >>> total, count = loss(model, (torch.ones(3, 3), torch.tensor([0, 1, -100])))
    >>> count.item()  # -100 is ignored
    2
    """
    if not callable(criterion):
        raise ProblemError(
            f"criterion of type {type(criterion).__name__} is not callable; give a torch loss module, "
            "for example nn.CrossEntropyLoss()"
        )
    if isinstance(criterion, type):
        raise ProblemError(f"criterion is the class {criterion.__name__}; give an instance, {criterion.__name__}()")
    criterion = _as_module(criterion)
    signature = signature_of(criterion)
    if signature is not None and not takes(signature, None, None):
        raise ProblemError(
            f"the criterion {_name_of(criterion)} has the arguments {signature}, but supervised gives it two, "
            "(output, targets); write a loss(model, batch) that calls it and returns its mean, or (sum, count)"
        )
    reduction = getattr(criterion, "reduction", "mean")
    if reduction not in ("mean", "sum", "batchmean"):
        raise ProblemError(f"the criterion has reduction={reduction!r}; use 'mean' or 'sum'")
    return _Supervised(criterion, reduction)


def _as_module(criterion: Any) -> Any:
    """Return the loss module of a function of ``torch.nn.functional``, with options as a partial gives them."""
    function, options = criterion, {}
    if isinstance(criterion, functools.partial) and not criterion.args:
        function, options = criterion.func, criterion.keywords
    kind = next((module for known, module in _MODULES.items() if known is function), None)
    if kind is None:
        return criterion
    try:
        return kind(**options)
    except TypeError:  # an option that only the function has
        return criterion


def _name_of(function: Any) -> str:
    return str(getattr(function, "__name__", type(function).__name__))


class _Supervised(OutputLoss):
    def __init__(self, criterion: Callable[[Any, Any], Tensor], reduction: str) -> None:
        self.criterion, self.reduction = criterion, reduction

    @property
    def is_torchs_own(self) -> bool:
        return computes_what_its_class_says(self.criterion)

    def outputs(self, model: nn.Module, batch: Any) -> Tensor:
        _check_leaves(batch)
        inputs, _ = _inputs_and_targets(batch)
        return _logits(_call(model, to_device(inputs, _device_of(model))))

    def of_outputs(self, outputs: Tensor, batch: Any) -> SumAndCount | Tensor:
        targets = self._targets(outputs, batch)
        if self.is_torchs_own:
            with self._naming_misfits(outputs, targets):
                return sum_and_count(self.criterion, self.reduction, outputs, targets)
        value = self.criterion(outputs, targets)
        if not isinstance(value, Tensor) or value.ndim:
            got = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"type {type(value).__name__}"
            raise ProblemError(
                f"the criterion {_name_of(self.criterion)} returned a value of {got}; wanted is a scalar tensor, for "
                "example its .mean()"
            )
        return (value, float(len(outputs) if outputs.ndim else 1)) if self.reduction == "sum" else value

    def terms_of_outputs(self, outputs: Tensor, batch: Any) -> SumsAndCounts:
        if not self.is_torchs_own:
            raise ProblemError(
                f"{_name_of(self.criterion)} gives one loss for a batch, and one for each sample is wanted; give "
                "supervised() a torch loss module, for example nn.CrossEntropyLoss()"
            )
        targets = self._targets(outputs, batch)
        with self._naming_misfits(outputs, targets):
            return sums_and_counts(self.criterion, self.reduction, outputs, targets)

    @contextmanager
    def _naming_misfits(self, outputs: Tensor, targets: Tensor) -> Iterator[None]:
        """Say what was given where PyTorch's criterion refuses it, but not under transforms, which refuse more."""
        try:
            yield
        except torch.cuda.OutOfMemoryError:
            raise
        except (RuntimeError, ValueError, IndexError, TypeError) as error:
            if torch._C._functorch.maybe_current_level() is not None:
                raise
            wanted = "give outputs and targets of shapes and dtypes that fit together"
            if isinstance(self.criterion, OF_CLASSES):
                wanted = "give int64 classes below the number of outputs, or probabilities of the outputs' shape"
            raise ProblemError(
                f"{_name_of(self.criterion)} cannot be computed of outputs of shape {tuple(outputs.shape)}, "
                f"{outputs.dtype}, and targets of shape {tuple(targets.shape)}, {targets.dtype}; {wanted}. PyTorch "
                f"says: {first_line(error)}"
            ) from error

    def _targets(self, outputs: Tensor, batch: Any) -> Any:
        targets = _inputs_and_targets(batch)[1]
        if self.is_torchs_own and not isinstance(targets, Tensor):
            raise ProblemError(
                f"the targets are of {_form(targets)}, and {_name_of(self.criterion)} wants a tensor; give a tensor "
                "(the .data of a packed sequence), or write a loss(model, batch)"
            )
        return to_device(targets, outputs.device)


def causal_lm() -> OutputLoss:
    """Build the next-token cross-entropy of a language model, summed over the tokens that count.

    A batch is a tensor of token ids (N, T), a tuple of one such tensor, or a mapping with "input_ids" and optionally
    "attention_mask" and "labels" (N, T; -100 is ignored; by default the input ids wherever the mask is not 0). The
    model returns logits (N, T, vocabulary), as for :func:`supervised`; position t predicts the label at t + 1. Labels
    are never handed to the model. A model whose ``forward`` names no ``input_ids`` gets them as its first argument, and
    one that takes no ``attention_mask`` does not get it: the mask then only decides which tokens count. Term by term
    (:meth:`OutputLoss.terms_of_outputs`), one token that counts is one term, not one sequence.

    Raises
    ------
    ProblemError
        At a batch or an output of unknown form, and at a batch with NumPy arrays.

    Examples
    --------
    >>> import torch
    >>> import hesd_fast as hesd
    >>> model = torch.nn.Embedding(5, 5)  # each token's logits of the next one
    >>> total, count = hesd.losses.causal_lm()(model, torch.tensor([[0, 3, 1, 4]]))
    >>> count.item()
    3
    """
    return _CausalLM()


class _CausalLM(OutputLoss):
    def outputs(self, model: nn.Module, batch: Any) -> Tensor:
        _check_leaves(batch)
        arguments, _ = _arguments_and_labels(batch)
        return _logits(_call_language_model(model, to_device(arguments, _device_of(model))))

    def of_outputs(self, outputs: Tensor, batch: Any) -> SumAndCount:
        logits, labels = self._rows(outputs, batch)
        return cross_entropy(logits, labels, reduction="sum"), (labels != IGNORED).sum()

    def terms_of_outputs(self, outputs: Tensor, batch: Any) -> SumsAndCounts:
        logits, labels = self._rows(outputs, batch)
        counted = labels != IGNORED
        sums = cross_entropy(logits, labels, reduction="none")[counted]
        return sums, torch.ones_like(sums)

    def _rows(self, outputs: Tensor, batch: Any) -> tuple[Tensor, Tensor]:
        """Return one row of logits and one label for every position; nothing follows the last, so it is ignored."""
        labels = to_device(_arguments_and_labels(batch)[1], outputs.device)
        if outputs.ndim != 3 or outputs.shape[:2] != labels.shape:
            raise ProblemError(
                f"the model returned logits of shape {tuple(outputs.shape)} for labels of shape {tuple(labels.shape)}; "
                "causal_lm wants logits (N, T, vocabulary) and labels (N, T)"
            )
        # Leaving out the last positions of the logits would copy all the others.
        return outputs.flatten(0, 1), functional.pad(labels[:, 1:], (0, 1), value=IGNORED).flatten()


def is_ready_made(loss: Callable[..., Any]) -> bool:
    """Return whether a loss was built here and counts its terms; they are right however small class weights are.

    Examples
    --------
    >>> import hesd_fast as hesd
    >>> hesd.losses.is_ready_made(hesd.losses.causal_lm())
    True
    """
    return isinstance(loss, _CausalLM) or (isinstance(loss, _Supervised) and loss.is_torchs_own)


def divides_a_sum(loss: Callable[..., Any]) -> bool:
    """Return whether a loss is the sum of a criterion, which a Problem divides by the number of samples.

    Examples
    --------
    >>> import torch
    >>> import hesd_fast as hesd
    >>> hesd.losses.divides_a_sum(hesd.losses.supervised(torch.nn.MSELoss(reduction="sum")))
    True
    """
    return isinstance(loss, _Supervised) and loss.reduction == "sum"


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


def _arguments_and_labels(batch: Any) -> tuple[dict[str, Any], Tensor]:
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
            labels = labels.masked_fill(arguments["attention_mask"] == 0, IGNORED)
    return arguments, labels


def _call(model: nn.Module, inputs: Any) -> Any:
    if isinstance(inputs, PackedSequence) or not isinstance(inputs, Mapping | tuple | list):
        return model(inputs)
    signature = signature_of(model)
    reason: TypeError | None = None
    if not isinstance(inputs, Mapping):
        if signature is None or takes(signature, *inputs):
            return model(*inputs)
    elif signature is None or (all(isinstance(name, str) for name in inputs) and takes(signature, **inputs)):
        return model(**inputs)
    elif takes(signature, inputs):
        try:
            return model(inputs)
        except TypeError as error:
            reason = error
    raise ProblemError(
        f"the model's forward has the arguments {signature}, and the inputs are of {_form(inputs)}, which it does not "
        f"take{f' ({reason})' if reason else ''}; give the inputs as its arguments, or write a loss(model, batch)"
    ) from reason


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
