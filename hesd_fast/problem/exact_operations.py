"""Operations whose second derivative PyTorch has not, or gets wrong, are replaced while a problem needs it."""

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


def _linear_cross_entropy(*arguments: Any, options: Any = None, **named: Any) -> Any:  # noqa: ARG001
    return functional.linear_cross_entropy(*arguments, **named)  # without options in ordinary operations


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
        {
            function: _linear_cross_entropy
            for function in [getattr(functional, "linear_cross_entropy", None)]
            if function
        },
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
