"""One batch's loss in a wider precision than the model's, to compare with; the model itself stays as it is."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from hesd_fast.problem.differentiation import filled
from hesd_fast.problem.loss_term import LossTerm
from hesd_fast.problem.prepared_problem import PreparedProblem

Parts = list[Tensor]
"""One tensor for each selected parameter."""

COPIES = 12
"""Wide vectors of n that a comparison may take in all, beside the graph of one batch in the wide precision."""


def wide_bytes(problem: PreparedProblem, graph_bytes: int, wide: torch.dtype = torch.float64) -> int:
    """Return the memory that a comparison takes, given the bytes of one batch's graph in the model's precision."""
    narrowest = min(parameter.itemsize for parameter in problem.parameters.values())
    return COPIES * wide.itemsize * problem.size + wide.itemsize * graph_bytes // narrowest


class WideLoss:
    """Losses of batches as functions of weights in a wide precision, whatever the precision of the model.

    Parameters
    ----------
    problem : PreparedProblem
        In a session.
    wide : torch.dtype
        float64, or float32.

    Attributes
    ----------
    leaves : list of tensor
        The weights that losses are functions of.
    """

    def __init__(self, problem: PreparedProblem, wide: torch.dtype = torch.float64) -> None:
        self.problem, self.wide = problem, wide
        self.leaves: Parts = []
        self.move(None)

    def move(self, steps: Sequence[Tensor] | None) -> None:
        """Let the weights be those of the model, and steps further if they are given."""
        weights = [widened(parameter.detach(), self.wide) for parameter in self.problem.parameters.values()]
        if steps is not None:
            weights = [weight + step for weight, step in zip(weights, steps, strict=True)]
        self.leaves = [weight.detach().requires_grad_() for weight in weights]

    def evaluate(self, term: LossTerm) -> Tensor:
        """Return a batch's loss at these weights, with its graph."""
        with self.elsewhere():
            return term.evaluate_moved()

    def gradient(self, loss: Tensor, create_graph: bool = False) -> Parts:
        """Return the derivative of a loss by the weights."""
        with self.elsewhere():
            found = torch.autograd.grad(loss, self.leaves, create_graph=create_graph, allow_unused=True)
        return filled(found, self.leaves)

    def multiply(self, gradient: Parts, vector: Sequence[Tensor], keep_graph: bool = False) -> Parts:
        """Return the product of the Hessian with a vector, from a gradient with its graph."""
        pairs = [(entry, part) for entry, part in zip(gradient, vector, strict=True) if entry.requires_grad]
        found: Sequence[Tensor | None] = [None] * len(gradient)
        if pairs:
            entries, parts = zip(*pairs, strict=True)
            with self.elsewhere():
                found = torch.autograd.grad(entries, self.leaves, parts, allow_unused=True, retain_graph=keep_graph)
        return filled(found, self.leaves)

    @contextmanager
    def elsewhere(self) -> Iterator[None]:
        """Let model and loss find the wide weights; a backward pass may call them again."""
        parameters = self.problem.parameters.values()
        replacements = {id(parameter): leaf for parameter, leaf in zip(parameters, self.leaves, strict=True)}
        with self.problem.replaced(self.leaves), InWidePrecision(replacements, self.wide):
            yield


class InWidePrecision(TorchFunctionMode):
    """Lets every operation of PyTorch work in a wide precision, and on other tensors in the place of some parameters.

    Autocast leaves float64 alone; for float32 it is switched off around each operation.

    Parameters
    ----------
    replacements : dict of int to tensor
        By the ``id`` of a parameter, the tensor that takes its place, however the model comes by the parameter.
    wide : torch.dtype
        float64, or float32.
    """

    def __init__(self, replacements: dict[int, Tensor], wide: torch.dtype = torch.float64) -> None:
        super().__init__()
        self._replacements = replacements
        self._wide = wide
        self._dtypes = _WIDER[wide]

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call the function with everything in the wide precision."""
        function = _CASTS[self._wide].get(function, function)
        args, kwargs = tree_map(self._widened, args), tree_map(self._widened, kwargs or {})
        with nullcontext() if self._wide is torch.float64 else _without_autocast():
            found = function(*args, **kwargs)
        # What is made of no tensor has the default dtype, which other threads use as well.
        return found if any(isinstance(value, Tensor) for value in args) else tree_map(self._widened_leaf, found)

    def _widened(self, value: Any) -> Any:
        if isinstance(value, torch.dtype):
            return self._dtypes.get(value, value)
        if not isinstance(value, Tensor):
            return value
        return widened(self._replacements.get(id(value), value), self._wide)

    def _widened_leaf(self, value: Any) -> Any:
        if not isinstance(value, Tensor) or value.dtype not in self._dtypes or value.grad_fn is not None:
            return value
        return widened(value.detach(), self._wide).requires_grad_(value.requires_grad)


def widened(tensor: Tensor, wide: torch.dtype = torch.float64) -> Tensor:
    """Return a tensor in a wide precision; itself where it has none that is narrower."""
    dtype = _WIDER[wide].get(tensor.dtype)
    return tensor if dtype is None else tensor.to(dtype)


@contextmanager
def _without_autocast() -> Iterator[None]:
    with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
        yield


_NARROW = {torch.bfloat16: torch.float32, torch.float16: torch.float32}
_WIDER: dict[torch.dtype, dict[torch.dtype, torch.dtype]] = {
    torch.float32: _NARROW,
    torch.float64: {
        **dict.fromkeys((torch.float32, *_NARROW), torch.float64),
        torch.complex64: torch.complex128,
    },
}

_CASTS: dict[torch.dtype, dict[Any, Any]] = {
    torch.float32: {Tensor.half: Tensor.float, Tensor.bfloat16: Tensor.float},
    torch.float64: {Tensor.float: Tensor.double, Tensor.half: Tensor.double, Tensor.bfloat16: Tensor.double},
}
