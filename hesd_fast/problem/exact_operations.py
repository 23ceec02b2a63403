"""Operations whose second derivative PyTorch has not or gets wrong, or where it cancels, are replaced meanwhile."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from hesd_fast.problem import ordinary_operations as ordinary
from hesd_fast.problem.autograd_graph import graph_nodes
from hesd_fast.problem.criterion_sums import IGNORED, cross_entropy

Function = Callable[..., Any]


@dataclass(frozen=True)
class Operation:
    """An operation to replace.

    Attributes
    ----------
    name : str
        How it is called in reports and messages.
    nodes : tuple of str
        Names in the graph of a loss that call for it, without digits at the end.
    functions : dict
        What takes the place of each function of PyTorch that computes it; may return NotImplemented for arguments that
        it does not take.
    silent : bool
        Whether PyTorch's own derivative is wrong, where others say that they have none.
    """

    name: str
    nodes: tuple[str, ...]
    functions: dict[Function, Function]
    silent: bool = False


def _aten(name: str, replacement: Function) -> dict[Function, Function]:
    """Return the replacement for an operator's Python function and the operator itself, which take the same."""
    packet = getattr(torch.ops.aten, name)
    found = {packet: replacement} | {getattr(packet, overload): replacement for overload in packet.overloads()}
    for module in (torch, torch._C._nn):
        if (function := getattr(module, name, None)) is not None:
            found[function] = replacement
    return found


def _hardsigmoid(input: Tensor, inplace: bool = False) -> Tensor:
    return _hardsigmoid_in_place(input) if inplace else ordinary.hardsigmoid(input)


def _hardsigmoid_in_place(input: Tensor) -> Tensor:
    return input.copy_(ordinary.hardsigmoid(input.clone()))  # the derivative needs what was there


def _log_softmax(input: Tensor, dim: int | None = None, *others: Any, dtype: Any = None, _stacklevel: int = 3) -> Any:
    # The third argument of the function in nn.functional is a stack level, that of the others is a dtype.
    dtype = next((other for other in others if isinstance(other, torch.dtype)), dtype) or input.dtype
    if not isinstance(dim, int) or not dtype.is_floating_point or input.layout != torch.strided or _is_mixed(input):
        return NotImplemented
    return ordinary.log_softmax(input, dim, dtype)


def _cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = IGNORED,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Any:
    if _is_mixed(input):
        return NotImplemented
    reduction = _reduction(size_average, reduce, reduction)
    return cross_entropy(input, target, weight, ignore_index, reduction, label_smoothing).to(input.dtype)


def _aten_cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    reduction: int = 1,
    ignore_index: int = IGNORED,
    label_smoothing: float = 0.0,
) -> Any:
    name = ordinary.name_of(reduction)
    return _cross_entropy(input, target, weight, None, ignore_index, None, name, label_smoothing)


def _binary_cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    pos_weight: Tensor | None = None,
) -> Any:
    return _aten_binary_cross_entropy(input, target, weight, pos_weight, _reduction(size_average, reduce, reduction))


def _aten_binary_cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    pos_weight: Tensor | None = None,
    reduction: str | int = "mean",
) -> Any:
    if input.shape != target.shape or _is_mixed(input):
        return NotImplemented
    value = ordinary.binary_cross_entropy_with_logits(input, target, weight, pos_weight, reduction)
    return value.to(torch.promote_types(input.dtype, target.dtype))


def _multilabel_soft_margin_loss(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Any:
    if input.shape != target.shape or _is_mixed(input):
        return NotImplemented
    losses = ordinary.binary_cross_entropy_with_logits(input, target, weight, None, "none").mean(-1)
    return ordinary.reduced(losses, _reduction(size_average, reduce, reduction)).to(input.dtype)


def _is_mixed(input: Tensor) -> bool:
    """Whether mixed precision decides on the dtype of a result; such logits have too few digits for any to be lost."""
    return input.dtype in (torch.float16, torch.bfloat16) and torch.is_autocast_enabled(input.device.type)


BAGS = ("sum", "mean", "max")


def _embedding_bag(
    input: Tensor,
    weight: Tensor,
    offsets: Tensor | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,  # noqa: ARG001
    scale_grad_by_freq: bool = False,
    mode: str = "mean",
    sparse: bool = False,  # noqa: ARG001
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> Any:
    # With the first of these the weights are written to; with the second the gradient is not that of the value.
    if max_norm is not None or scale_grad_by_freq or input.is_nested or weight.dtype == torch.long:
        return NotImplemented
    if input.ndim == 2:
        offsets = torch.arange(0, input.numel(), max(input.shape[1], 1), dtype=input.dtype, device=input.device)
        if not input.shape[1]:
            offsets = input.new_zeros(len(input))
        input, include_last_offset = input.reshape(-1), False
        per_sample_weights = None if per_sample_weights is None else per_sample_weights.reshape(-1)
    if offsets is None:
        return NotImplemented
    return ordinary.embedding_bag(weight, input, offsets, mode, per_sample_weights, include_last_offset, padding_idx)


def _aten_embedding_bag(
    weight: Tensor,
    indices: Tensor,
    offsets: Tensor,
    scale_grad_by_freq: bool = False,
    mode: int = 0,
    sparse: bool = False,
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> Any:
    if scale_grad_by_freq:
        return NotImplemented
    bags = ordinary.embedding_bag(
        weight, indices, offsets, BAGS[mode], per_sample_weights, include_last_offset, padding_idx
    )
    with torch.no_grad():
        _, *others = torch.embedding_bag(
            weight.detach(), indices, offsets, False, mode, sparse, None, include_last_offset, padding_idx
        )
    return bags, *others


def _with_weight_first(norm: Function) -> Function:
    """Return a norm with the order of arguments of its operator."""

    def aten_norm(
        input: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        *options: Any,
        cudnn_enabled: bool = True,  # noqa: ARG001
        **named: Any,
    ) -> Tensor:
        result: Tensor = norm(input, running_mean, running_var, weight, bias, *options[:3], **named)
        return result

    return aten_norm


def _linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    options: Any = None,  # noqa: ARG001
) -> Any:
    classes, *others, features = linear_weight.shape
    bias = None if linear_bias is None else linear_bias.reshape(-1)
    logits = functional.linear(input, linear_weight.reshape(-1, features), bias)
    logits = logits.reshape(*input.shape[:-1], classes, *others)
    ignored = IGNORED if ignore_index is None else ignore_index
    if _is_mixed(logits):
        return functional.cross_entropy(logits, target, weight, None, ignored, None, reduction, label_smoothing)
    return _cross_entropy(logits, target, weight, None, ignored, None, reduction, label_smoothing)


_LINEAR_CROSS_ENTROPY: dict[Function, Function] = {
    function: _linear_cross_entropy for function in [getattr(functional, "linear_cross_entropy", None)] if function
}


def _cdist(x1: Tensor, x2: Tensor, p: float = 2.0, compute_mode: Any = None) -> Any:
    large = max(x1.shape[-2], x2.shape[-2]) > 25
    matrix_product = {
        None: large,
        "use_mm_for_euclid_dist_if_necessary": large,
        "use_mm_for_euclid_dist": True,
        1: True,
    }
    if (p == 2.0 and matrix_product.get(compute_mode, False)) or p == 0.0:
        return NotImplemented  # PyTorch's own has all derivatives
    return ordinary.cdist(x1, x2, p)


def _pdist(input: Tensor, p: float = 2.0) -> Any:
    return NotImplemented if p == 0.0 else ordinary.pdist(input, p)


def _multi_margin_loss(
    input: Tensor,
    target: Tensor,
    p: int = 1,
    margin: float = 1.0,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Tensor:
    return ordinary.multi_margin_loss(input, target, p, margin, weight, _reduction(size_average, reduce, reduction))


def _multilabel_margin_loss(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Tensor:
    return ordinary.multilabel_margin_loss(input, target, _reduction(size_average, reduce, reduction))


def _reduction(size_average: bool | None, reduce: bool | None, reduction: str) -> str:
    if size_average is None and reduce is None:
        return reduction
    if reduce is False:
        return "none"
    return "sum" if size_average is False else "mean"


_OPERATIONS = (
    Operation(
        "hardsigmoid",
        ("HardsigmoidBackward",),
        {
            functional.hardsigmoid: _hardsigmoid,
            **_aten("hardsigmoid", ordinary.hardsigmoid),
            **_aten("hardsigmoid_", _hardsigmoid_in_place),
        },
    ),
    Operation(
        "embedding_bag",
        ("EmbeddingBagBackward",),
        {functional.embedding_bag: _embedding_bag, **_aten("embedding_bag", _aten_embedding_bag)},
    ),
    # Of these a derivative is as right as it can be where it is not small: there, numbers next to 1 are subtracted.
    Operation(
        "log_softmax",
        ("LogSoftmaxBackward",),
        {
            functional.log_softmax: _log_softmax,
            torch.special.log_softmax: _log_softmax,
            Tensor.log_softmax: _log_softmax,
            **_aten("log_softmax", _log_softmax),
            functional.cross_entropy: _cross_entropy,
            **_aten("cross_entropy_loss", _aten_cross_entropy),
            **_LINEAR_CROSS_ENTROPY,
        },
    ),
    Operation(
        "binary_cross_entropy_with_logits",
        ("BinaryCrossEntropyWithLogitsBackward",),
        {
            functional.binary_cross_entropy_with_logits: _binary_cross_entropy,
            **_aten("binary_cross_entropy_with_logits", _aten_binary_cross_entropy),
        },
    ),
    Operation(
        "logsigmoid",
        ("LogSigmoidBackward",),
        {
            functional.logsigmoid: ordinary.logsigmoid,
            **_aten("log_sigmoid", ordinary.logsigmoid),
            functional.multilabel_soft_margin_loss: _multilabel_soft_margin_loss,
        },
    ),
    Operation(
        "ctc_loss",
        ("CtcLossBackward", "CudnnCtcLossBackward"),
        {functional.ctc_loss: ordinary.ctc_loss, **_aten("ctc_loss", ordinary.ctc_loss)},
    ),
    # The fused kernel's backward pass takes the norm of the forward pass for a constant.
    Operation(
        "weight_norm", ("WeightNormInterfaceBackward",), _aten("_weight_norm", ordinary.weight_norm), silent=True
    ),
    # The derivative of the backward pass of these takes mean and variance for constants; a loss without a gradient in
    # it has no need of it.
    Operation(
        "layer_norm",
        ("NativeLayerNormBackwardBackward",),
        {functional.layer_norm: ordinary.layer_norm, **_aten("layer_norm", ordinary.layer_norm)},
        silent=True,
    ),
    Operation(
        "batch_norm",
        ("NativeBatchNormBackwardBackward", "CudnnBatchNormBackwardBackward", "MiopenBatchNormBackwardBackward"),
        {
            functional.batch_norm: ordinary.batch_norm,
            functional.instance_norm: ordinary.instance_norm,
            **_aten("batch_norm", _with_weight_first(ordinary.batch_norm)),
            **_aten("instance_norm", _with_weight_first(ordinary.instance_norm)),
        },
        silent=True,
    ),
    Operation(
        "cdist",
        ("CdistBackward",),
        {torch.functional.cdist: _cdist, **_aten("cdist", _cdist)},
    ),
    Operation("pdist", ("PdistBackward",), {functional.pdist: _pdist, **_aten("pdist", _pdist)}),
    Operation(
        "multi_margin_loss",
        ("MultiMarginLossBackward",),
        {functional.multi_margin_loss: _multi_margin_loss, **_aten("multi_margin_loss", ordinary.multi_margin_loss)},
    ),
    Operation(
        "multilabel_margin_loss",
        ("MultilabelMarginLossBackward",),
        {
            functional.multilabel_margin_loss: _multilabel_margin_loss,
            **_aten("multilabel_margin_loss", ordinary.multilabel_margin_loss),
        },
    ),
    # In chunks, its gradient is computed by the forward pass, and comes without a graph.
    Operation(
        "linear_cross_entropy",
        tuple(
            f"GeneratedBackwardFor_torch_nn__linear_cross_entropy_batch_chunked{kind}_defaultBackward"
            for kind in ("", "_no_reduction")
        ),
        _LINEAR_CROSS_ENTROPY,
        silent=True,
    ),
)

OPERATIONS = {operation.name: operation for operation in _OPERATIONS}
"""What can be replaced, by name."""

_BY_NODE = {node: operation for operation in _OPERATIONS for node in operation.nodes}


def operations_in(loss: Tensor) -> dict[str, str]:
    """Return the operations in a loss's graph that can be replaced, each with the name of a node; cost: a walk."""
    nodes = (node.name() for node in graph_nodes([loss.grad_fn]))
    return {_BY_NODE[plain].name: name for name in nodes if (plain := name.rstrip("0123456789")) in _BY_NODE}


class ExactOperations(TorchFunctionMode):
    """Lets functions of PyTorch be replaced by the same ones in ordinary operations.

    In this thread, and also in what runs during backward passes, as checkpoints do.
    """

    def __init__(self) -> None:
        self._functions: dict[Function, Function] = {}
        self._engine: Function | None = None

    @contextmanager
    def replacing(self, names: Iterable[str]) -> Iterator[None]:
        """Replace the named ones of :data:`OPERATIONS`, and what is added meanwhile; costs nothing where none is."""
        try:
            self.add(names)
            yield
        finally:
            self._functions = {}
            if self._engine is not None:
                _set_engine(self._engine)
                _set_modes([mode for mode in _modes() if mode is not self])
                self._engine = None

    def add(self, names: Iterable[str]) -> None:
        """Replace further operations."""
        for name in names:
            self._functions |= OPERATIONS[name].functions
        if self._functions and self._engine is None:
            self._functions[functional.triplet_margin_with_distance_loss] = self._triplet_loss
            self._enter_backward_passes()
            _set_modes([self, *_modes()])

    def __torch_function__(self, func: Function, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call what takes the place of a function, or the function itself."""
        kwargs = kwargs or {}
        replacement = self._functions.get(func)
        if replacement is not None and kwargs.get("out") is None:
            result = replacement(*args, **kwargs)
            if result is not NotImplemented:
                return result
        return func(*args, **kwargs)

    def _triplet_loss(self, *args: Any, distance_function: Any = None, **named: Any) -> Any:
        """Enter the mode in a function that PyTorch calls, as it is left in what PyTorch's functions do themselves."""

        def distance(*pair: Tensor) -> Any:
            with self._again():
                return distance_function(*pair)

        chosen = None if distance_function is None else distance
        return functional.triplet_margin_with_distance_loss(*args, distance_function=chosen, **named)

    def _enter_backward_passes(self) -> None:
        """Let backward passes run in the mode: torch.autograd.grad is such a function itself, so it is left there."""
        engine: Function = torch.autograd._engine_run_backward  # type: ignore[attr-defined]
        thread = threading.get_ident()

        def run_backward(*args: Any, **named: Any) -> Any:
            if threading.get_ident() != thread:
                return engine(*args, **named)
            with self._again():
                return engine(*args, **named)

        _set_engine(run_backward)
        self._engine = engine

    @contextmanager
    def _again(self) -> Iterator[None]:
        """Enter the mode where it has been left."""
        modes = _modes()
        if self in modes:
            yield
            return
        _set_modes([self, *modes])
        try:
            yield
        finally:
            _set_modes(modes)


def _set_engine(engine: Function) -> None:
    torch.autograd._engine_run_backward = engine  # type: ignore[attr-defined]


def _modes() -> list[TorchFunctionMode]:
    """Return the modes of this thread, the outermost first."""
    return [torch._C._get_function_stack_at(i) for i in range(torch._C._len_torch_function_stack())]


def _set_modes(modes: list[TorchFunctionMode]) -> None:
    """Make these the modes of this thread. Ours is the outermost, so that others may come and go meanwhile."""
    for _ in _modes():
        torch._C._pop_torch_function_stack()
    for mode in modes:
        torch._C._push_on_torch_function_stack(mode)
