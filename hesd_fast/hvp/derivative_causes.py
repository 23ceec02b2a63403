"""What in a model or a loss may make PyTorch's second derivative differ from that of its first."""

from __future__ import annotations

import enum
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node
from torch.overrides import TorchFunctionMode

from hesd_fast.hvp.placed_nodes import PlacedNodes
from hesd_fast.problem.autograd_graph import graph_nodes, plain_name
from hesd_fast.problem.loss_term import LossTerm
from hesd_fast.problem.prepared_problem import PreparedProblem

# Their derivatives jump where the argument passes a point, so that steps over many such points find another curvature.
_KINKS = re.compile(
    r"^(relu|threshold|hardtanh|leakyrelu|prelu|rrelu|abs|clamp|maximum|minimum|max|min|fmax|fmin|amax|amin|aminmax|sort"
    r"|adaptivemaxpool|fractionalmaxpool|topk|kthvalue|median|nanmedian|mode|cummax|cummin|hardshrink|softshrink|where"
    r"|l1loss|multimargin|multilabelmargin|cdist|pdist|sign|round|floor|ceil|trunc|heaviside|elu|celu|selu|hardswish"
    r"|hardsigmoid)"
)


class Kinks(enum.Enum):
    """Whether a loss has operations whose derivatives jump."""

    NONE = "none"
    SOME = "some"
    UNKNOWN = "unknown"


def kinks_in(term: LossTerm) -> Kinks:
    """Return whether a batch's loss has operations whose derivatives jump; unknown where some are foreign."""
    loss = term.evaluate_moved()
    nodes = list(graph_nodes([loss.grad_fn]))
    if any(_KINKS.match(plain_name(node.name())) for node in nodes):
        return Kinks.SOME
    return Kinks.UNKNOWN if any(_is_foreign(node) for node in nodes) else Kinks.NONE


def _is_foreign(node: Node) -> bool:
    return _function_of(node) is not None or _is_operation_of_others(node)


def _function_of(node: Node) -> type | None:
    """Return the autograd Function of a node in Python, if it is not one of this package."""
    function: type | None = getattr(type(node), "_forward_cls", None)
    return None if function is None or function.__module__.startswith("hesd_fast.") else function


def _is_operation_of_others(node: Node) -> bool:
    return "CppNode" in node.name() or "NotImplemented" in node.name()


_FUNCTION = (
    "Likely cause: the autograd Function {name} (in {places}); its backward is differentiated as it is written, so it "
    "must compute from the inputs of forward that it saves (ctx.save_for_backward(input)), in operations of PyTorch "
    "with gradients enabled, and keep no intermediate result, unless another derivative is what it means (a "
    "straight-through, surrogate or reversed gradient)."
)

_HOOK = (
    "Likely cause: the gradient hook that is registered (register_hook) in {places}; take it out for the analysis, "
    "unless the changed gradient is what it means."
)

_OPERATION = (
    "Likely cause: the operation {name} (in {places}), which is not PyTorch's own; its backward pass must be "
    "differentiable itself."
)

_DETACHED = (
    "Likely cause: .detach(), .data or torch.no_grad() in {places}, which makes a part of the loss a constant to the "
    "gradient that moves with the weights (a stopped or straight-through gradient, the power iteration of "
    "spectral_norm in train mode); the product then is that of the loss with this part held where it is."
)


def causes_of_wrong_derivatives(problem: PreparedProblem, term: LossTerm) -> str:
    """Return sentences that name what was found, and what to do about each; cost: one forward pass."""
    watched = _Watched(problem.model)
    functions: dict[str, list[str]] = {}
    operations: dict[str, list[str]] = {}
    for place, node in watched.collect(term):
        if (function := _function_of(node)) is not None:
            functions.setdefault(function.__name__, []).append(place)
        elif _is_operation_of_others(node):
            operations.setdefault(node.name(), []).append(place)
    sentences = [
        *_sentences(_FUNCTION, functions),
        *_sentences(_HOOK, {"": watched.hooks}),
        *_sentences(_OPERATION, operations),
    ]
    sentences = sentences or _sentences(_DETACHED, {"": watched.detached})
    return " ".join(sentences) or "No Function, hook or stopped gradient was found that explains it."


def _sentences(sentence: str, found: dict[str, list[str]]) -> list[str]:
    return [sentence.format(name=name, places=listed(places)) for name, places in found.items() if places]


def listed(names: Iterable[str]) -> str:
    """Return the first three different names, and how many more there are."""
    different = list(dict.fromkeys(names))
    return ", ".join(different[:3]) + (f" and {len(different) - 3} more" if len(different) > 3 else "")


class _Watched(PlacedNodes):
    """The nodes of a loss's graph, and where hooks were registered and tensors taken out of the graph."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.hooks: list[str] = []
        self.detached: list[str] = []

    @contextmanager
    def _following(self) -> Iterator[None]:
        register = Tensor.register_hook

        def noting(tensor: Tensor, hook: Any) -> Any:
            self.hooks.append(self.place)
            return register(tensor, hook)  # type: ignore[no-untyped-call]

        try:
            Tensor.register_hook = noting  # type: ignore[method-assign]
            with super()._following(), _Detachments(lambda: self.detached.append(self.place)):
                yield
        finally:
            Tensor.register_hook = register  # type: ignore[method-assign]


class _Detachments(TorchFunctionMode):
    """Calls back where a tensor with a gradient is taken out of the graph."""

    def __init__(self, note: Callable[[], None]) -> None:
        super().__init__()
        self._note = note

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call the function."""
        takes_out = function in _DETACHING or not torch.is_grad_enabled()
        if takes_out and any(isinstance(value, Tensor) and value.requires_grad for value in args[:2]):
            self._note()
        return function(*args, **(kwargs or {}))


_DETACHING = (Tensor.detach, torch.detach, Tensor.detach_, Tensor.data.__get__)  # type: ignore[attr-defined]
