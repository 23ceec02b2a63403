"""Exact products by differentiating the gradient backwards once more."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from hesd_fast.errors import OperatorError
from hesd_fast.hvp.base import BlockVectors, Parts, Strategy, Vectors, probe_vectors, stacked, with_row
from hesd_fast.hvp.second_derivatives import Gradient, naming_operations
from hesd_fast.problem.autograd_graph import graph_nodes
from hesd_fast.problem.loss_term import LossTerm


class ReverseOverReverse(Strategy):
    """What strategies share that differentiate a gradient backwards, one vector after the other."""

    checked_vectors = 1

    def __init__(self, compensated: bool = False, memory_limit: int | None = None) -> None:
        super().__init__(compensated, memory_limit)
        self._checked: set[int] = set()

    def products(self, term: LossTerm, rows: Vectors) -> Iterator[tuple[int, Parts]]:
        """Yield one product after the other; the last one frees the graph, so only one exists at a time."""
        yield from self.block_products(term, rows)

    def block_products(self, term: LossTerm, rows: BlockVectors) -> Iterator[tuple[int, Parts]]:
        """Yield the products of one batch's diagonal blocks, each with a vector of its own, as :meth:`products` does.

        A block's backward pass leaves out what lies before its parameters.
        """
        with naming_operations(self.problem, term):
            gradient, kept = self.gradient(term)
            for j, row in enumerate(rows):
                yield j, with_row(gradient.multiply(row, keep_graph=kept or j + 1 < len(rows)))

    def gradient(self, term: LossTerm) -> tuple[Gradient, bool]:
        """Return the gradient of a batch, and whether its graph is kept."""
        return self.checked_gradient(term, term.evaluate()), False

    def checked_gradient(self, term: LossTerm, loss: Tensor) -> Gradient:
        """Return the gradient of a loss; at a batch that is new, an OperatorError if it hides a second derivative."""
        if term.index in self._checked:
            return Gradient.of(self.problem, loss)
        gradient = Gradient.with_second_derivative(self.problem, loss)
        self._checked.add(term.index)
        return gradient


class DoubleBackward(ReverseOverReverse):
    """One batch and one vector after the other.

    Per batch, one forward pass and one differentiable gradient serve all b vectors; each vector then costs one backward
    pass through the gradient: about 3F + 6F b in all, with F the cost of a forward pass (Pearlmutter, Neural
    Computation 6(1), 1994). Memory: the graph of one batch's gradient. A parameter that the loss does not use, or uses
    linearly, gets zeros.
    """

    name = "double_backward"

    def check(self) -> None:
        """Do nothing: this is what the others are compared with."""


class DoubleBackwardBatched(ReverseOverReverse):
    """One batch after the other, all vectors in one batched backward pass (``is_grads_batched``).

    The same operations as :class:`DoubleBackward`; matrix products see b times as many columns, and the transient
    memory of the last backward pass is b times as large. An operation that PyTorch cannot batch runs in a loop.
    """

    name = "double_backward_batched"
    transforms = True
    checked_vectors = 2

    def products(self, term: LossTerm, rows: Vectors) -> Iterator[tuple[int, Parts]]:
        """Yield all products at once."""
        with naming_operations(self.problem, term):
            gradient, kept = self.gradient(term)
            yield 0, gradient.multiply(stacked(rows), keep_graph=kept, batched=True)


class KeptGraph(ReverseOverReverse):
    """The graph of each batch's gradient is kept from one product to the next: 6F a vector.

    Weights and data do not change, so neither do the graphs. Memory: what the graphs save, for as many batches as
    ``memory_limit`` allows; the others are done anew each time.
    """

    name = "kept_graph"
    family = "kept_graph"

    def check(self) -> None:
        """Raise an OperatorError unless a graph gives its first product, plain double backward's, a second time."""
        rows = probe_vectors(self.problem, self.checked_vectors)
        term = self.problem.first_term()
        first = self.products_alone(term, rows)
        if term.index in self._kept:
            self.compare(rows, first)

    def gradient(self, term: LossTerm) -> tuple[Gradient, bool]:
        """Return the gradient of a batch, and whether its graph is kept."""
        if term.index in self._kept:
            kept: Gradient = self._kept[term.index]
            return kept, True
        gradient = gradient_to_keep(self, term)
        keep = self.may_keep(term, _saved_in_graph(gradient))
        if keep:
            self._kept[term.index] = gradient
        return gradient, keep


class KeptGraphBatched(DoubleBackwardBatched, KeptGraph):
    """Graphs kept as in :class:`KeptGraph`, all vectors in one batched backward pass."""

    name = "kept_graph_batched"

    def check(self) -> None:
        """Raise an OperatorError unless the strategy multiplies as plain double backward does."""
        Strategy.check(self)


def gradient_to_keep(strategy: ReverseOverReverse, term: LossTerm) -> Gradient:
    """Return the gradient of a batch with a graph that may be used after the batch is over; else an OperatorError."""
    with _saving_hooks() as hooks:
        loss = term.evaluate()
    if hooks:
        # They run when the graph is used, and find the buffers and random streams of that time.
        raise OperatorError(
            f"hvp={strategy.name!r} cannot keep graphs of a model that uses activation checkpoints or other hooks on "
            "saved tensors; use hvp='double_backward', or take the checkpoints out"
        )
    return strategy.checked_gradient(term, loss)


@contextlib.contextmanager
def _saving_hooks() -> Iterator[list[saved_tensors_hooks]]:
    """Collect the hooks on saved tensors that are put to use meanwhile."""
    found: list[saved_tensors_hooks] = []
    enter = saved_tensors_hooks.__enter__

    def noting(hooks: saved_tensors_hooks) -> None:
        found.append(hooks)
        enter(hooks)

    saved_tensors_hooks.__enter__ = noting  # type: ignore[method-assign]
    try:
        yield found
    finally:
        saved_tensors_hooks.__enter__ = enter  # type: ignore[method-assign]


def _saved_in_graph(gradient: Gradient) -> Iterator[Tensor]:
    for node in graph_nodes([entry.grad_fn for entry in gradient.entries]):
        yield from _saved_tensors(node)


def _saved_tensors(node: object) -> Iterator[Tensor]:
    for name in dir(node):
        if name.startswith("_saved_") or name == "saved_tensors":
            try:
                value = getattr(node, name)
            except RuntimeError:  # freed, as after a backward pass that kept nothing
                continue
            for item in value if isinstance(value, tuple | list) else (value,):
                if isinstance(item, Tensor) and item.layout is torch.strided:
                    yield item
