"""The gradient of a loss as something to differentiate, and whether that can be done."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node

from hesd_fast.errors import OperatorError
from hesd_fast.hvp.placed_nodes import PlacedNodes
from hesd_fast.problem.autograd_graph import graph_nodes, plain_name
from hesd_fast.problem.differentiation import filled
from hesd_fast.problem.exact_operations import OPERATIONS, operations_in
from hesd_fast.problem.loss_term import LossTerm
from hesd_fast.problem.parameters import norm_of
from hesd_fast.problem.prepared_problem import PreparedProblem

# What PyTorch says of an operation without a second derivative.
_NO_SECOND_DERIVATIVE = re.compile(
    r"derivative for '?(?P<op>[\w:.]+)'? is not implemented|differentiate twice|double.?backward|once_differentiable"
    r"|donated buffer",
    re.IGNORECASE,
)


def differentiate(values: Any, sources: Any, cotangents: Any = None, **options: bool) -> tuple[Tensor | None, ...]:
    """Return ``torch.autograd.grad`` in the precision of the forward pass, None for sources that are not used."""
    device = (sources if isinstance(sources, Tensor) else sources[0]).device
    with torch.autocast(device.type, enabled=False):
        found: tuple[Tensor | None, ...] = torch.autograd.grad(
            values, sources, cotangents, allow_unused=True, **options
        )
    return found


def refuse_dead_ends(derivatives: Iterable[Tensor]) -> None:
    """Raise a RuntimeError where a function refuses to be differentiated again.

    A once_differentiable function refuses only where the derivative coming in has a graph, and its refusal is a dead
    end that a second backward pass would take for a zero.
    """
    if any(node.name() == "torch::autograd::Error" for node in graph_nodes([one.grad_fn for one in derivatives])):
        raise RuntimeError("a function marked with @once_differentiable cannot be differentiated twice")


@dataclass
class Gradient:
    """The gradient of one batch's loss, with its graph: the entries that still depend on the parameters."""

    parameters: list[nn.Parameter]
    entries: list[Tensor] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)

    @classmethod
    def of(cls, problem: PreparedProblem, loss: Tensor, seed: Tensor | None = None) -> Gradient:
        """Differentiate a loss; ``seed`` is the derivative to start from, 1 by default."""
        gradient = cls(list(problem.parameters.values()))
        for i, entry in enumerate(differentiate(loss, gradient.parameters, seed, create_graph=True)):
            if entry is not None and entry.requires_grad:
                gradient.entries.append(entry)
                gradient.positions.append(i)
        return gradient

    @classmethod
    def with_second_derivative(cls, problem: PreparedProblem, loss: Tensor) -> Gradient:
        """Differentiate a loss, and raise a RuntimeError where a function refuses to be differentiated again."""
        gradient = cls.of(problem, loss, torch.ones_like(loss, requires_grad=True))
        refuse_dead_ends(gradient.entries)
        return gradient

    @staticmethod
    def first_order(problem: PreparedProblem, loss: Tensor) -> Tensor:
        """Return the gradient (n,) alone, without a graph."""
        parameters = list(problem.parameters.values())
        return problem.flatten(filled(differentiate(loss, parameters), parameters))

    def times(self, problem: PreparedProblem, direction: Tensor) -> Tensor:
        """Return the product (n,) with a vector (n,), and free the graph."""
        pairs = zip(self.parameters, problem.unflatten(direction), strict=True)
        parts = dict(self.multiply([part.to(p.dtype) for p, part in pairs], keep_graph=False))
        return problem.flatten(filled([parts.get(i) for i in range(len(self.parameters))], self.parameters))

    def multiply(
        self, vector: Sequence[Tensor | None], keep_graph: bool, batched: bool = False
    ) -> list[tuple[int, Tensor]]:
        """Return (position, product) for each parameter on which the gradient depends; batched, of b vectors.

        Parameters whose part of the vector is None take no part: the product is with the block of the others.
        """
        pairs = [(entry, vector[i]) for entry, i in zip(self.entries, self.positions, strict=True)]
        entries = [entry for entry, part in pairs if part is not None]
        if not entries:
            return []
        chosen = [i for i, part in enumerate(vector) if part is not None]
        products = differentiate(
            entries,
            [self.parameters[i] for i in chosen],
            [part for _, part in pairs if part is not None],
            retain_graph=keep_graph,
            is_grads_batched=batched,
        )
        return [(i, product) for i, product in zip(chosen, products, strict=True) if product is not None]


def product_along_gradient(problem: PreparedProblem, term: LossTerm) -> tuple[Tensor, Tensor]:
    """Return a vector (n,) that has much of the gradient in it, and the product of one batch's Hessian with it.

    An arbitrary direction has next to no curvature; that of the gradient has much, and differences see it. The row of
    an embedding's padding, which PyTorch takes for a constant, is left out.

    Raises
    ------
    OperatorError
        If an operation has no second derivative.
    """
    loss = term.evaluate()
    _refuse_operations(problem, term, loss)
    with naming_operations(problem, term):
        gradient = Gradient.with_second_derivative(problem, loss)
        slopes = dict(zip(gradient.positions, gradient.entries, strict=True))
        parameters = gradient.parameters
        flat = problem.flatten(filled([slopes.get(i) for i in range(len(parameters))], parameters))
        direction = direction_with(problem, flat)
        return direction, gradient.times(problem, direction)


def product_with(problem: PreparedProblem, term: LossTerm, direction: Tensor) -> Tensor:
    """Return the product (n,) of one batch's Hessian with a vector (n,), by a graph of its own."""
    with naming_operations(problem, term):
        return Gradient.of(problem, term.evaluate()).times(problem, direction)


def direction_with(problem: PreparedProblem, gradient: Tensor) -> Tensor:
    """Return the sum of a gradient and noise, of lengths 2 and 1 so that they never cancel, without rows of padding."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(problem.size, dtype=problem.dtype, generator=generator, device="cpu").to(problem.device)
    direction: Tensor = noise / norm_of([noise])
    length = norm_of([gradient])
    if 0.0 < length < float("inf"):
        direction += (gradient.double() * (2.0 / length)).to(direction.dtype)
    return clear_padding(problem, direction, padded_rows(problem))


def clear_padding(problem: PreparedProblem, vector: Tensor, padded: dict[int, int]) -> Tensor:
    """Overwrite the rows of an embedding's padding in a vector (n,) by zeros, and return it."""
    parts = problem.unflatten(vector)
    for position, row in padded.items():
        parts[position][row] = 0.0
    return vector


def padded_rows(problem: PreparedProblem) -> dict[int, int]:
    """Return the row of padding of each embedding, by the position of its parameter."""
    positions = {id(parameter): i for i, parameter in enumerate(problem.parameters.values())}
    return {positions[id(weight)]: row for weight, row in _paddings(problem) if id(weight) in positions}


def padding_with_other_uses(problem: PreparedProblem) -> str | None:
    """Return the name of a selected embedding with a row of padding that serves as another weight too, or None."""
    padded = {id(weight) for weight, _ in _paddings(problem)}
    others = {
        id(weight)
        for module in problem.model.modules()
        if not _has_padding(module)
        for weight in module._parameters.values()
    }
    return next((name for name, weight in problem.parameters.items() if id(weight) in padded & others), None)


def _paddings(problem: PreparedProblem) -> Iterator[tuple[nn.Parameter, int]]:
    for module in problem.model.modules():
        if _has_padding(module):
            yield module.weight, module.padding_idx  # type: ignore[misc]


def _has_padding(module: nn.Module) -> bool:
    return isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.padding_idx is not None


def _refuse_operations(problem: PreparedProblem, term: LossTerm, loss: Tensor) -> None:
    """Raise an OperatorError at operations that are known to hide something, or to be wrong."""
    operations = {node.name() for node in graph_nodes([loss.grad_fn])}
    if "CheckpointFunctionBackward" in operations:
        raise OperatorError(
            "the model uses reentrant activation checkpoints, which hide their parameters from torch.autograd.grad; "
            "call torch.utils.checkpoint with use_reentrant=False"
        )
    for name, node in operations_in(loss).items():
        if OPERATIONS[name].silent:
            places = ", ".join(_offending_places(problem, term, node)) or "the model"
            raise OperatorError(
                f"a derivative of PyTorch's {name} (in {places}) that the Hessian needs is wrong, and the operation "
                "cannot be replaced where it is, as in TorchScript or a compiled function; write it in Python, in "
                "ordinary operations, or leave the parameters before it out of the selection"
            )


@contextmanager
def naming_operations(problem: PreparedProblem, term: LossTerm) -> Iterator[None]:
    """Turn what PyTorch says of an operation without a second derivative into an OperatorError that names the place."""
    try:
        yield
    except RuntimeError as error:
        match = _NO_SECOND_DERIVATIVE.search(str(error))
        if match is None:
            raise
        raise OperatorError(_no_second_derivative(problem, term, match["op"], str(error))) from error


def _no_second_derivative(problem: PreparedProblem, term: LossTerm, operation: str | None, message: str) -> str:
    offending = _offending_places(problem, term, operation)
    names = operation or ", ".join(sorted(set(offending.values()))) or "an operation of the model or the loss"
    where = f"in {', '.join(offending)}, " if offending else ""
    remedy = (
        "replace it by an implementation of ordinary PyTorch operations, leave the parameters before it out, or use "
        "hvp='finite_differences', which needs first derivatives alone"
    )
    if "scaled_dot_product" in names:
        remedy = "do not force a flash or memory-efficient attention backend in the model; the MATH backend has one"
    elif "compile" in message.lower():
        remedy = "give the model without torch.compile, or use hvp='finite_differences'"
    elif "cudnn_rnn" in names:
        remedy = "run the model under torch.backends.cudnn.flags(enabled=False)"
    said = message.splitlines()[0]
    return f"{names} ({where}batch {term.index}) has no second derivative; {remedy}. PyTorch says: {said}"


def _offending_places(problem: PreparedProblem, term: LossTerm, operation: str | None) -> dict[str, str]:
    """Return the innermost places in model and loss that ran the operation, and the graph's name for it.

    Without an operation's name, the once_differentiable functions are looked for.
    """
    found: dict[str, str] = {}
    for place, node in PlacedNodes(problem.model).collect(term):
        if _is_offending(node, operation):
            found.setdefault(place, node.name())
    return found


def _is_offending(node: Node, operation: str | None) -> bool:
    if operation is None:
        backward = getattr(getattr(type(node), "_forward_cls", None), "backward", None)
        return getattr(backward, "__wrapped__", None) is not None
    return plain_name(node.name()) == plain_name(operation.split("::")[-1])
