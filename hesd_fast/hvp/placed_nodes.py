"""Where in a model the nodes of an autograd graph were made."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node

from hesd_fast.problem.autograd_graph import graph_nodes
from hesd_fast.problem.loss_term import LossTerm


class PlacedNodes:
    """The nodes of a loss's graph, each with the innermost module that made it.

    Attributes
    ----------
    found : list of (str, Node)
        Place and node.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._seen: set[Node] = set()
        self._inside: list[str] = []
        self.found: list[tuple[str, Node]] = []

    @property
    def place(self) -> str:
        """Where the evaluation is now."""
        return self._inside[-1] if self._inside else "the loss"

    def collect(self, term: LossTerm) -> list[tuple[str, Node]]:
        """Evaluate a loss term and return its nodes with their places."""
        with self._following():
            loss = term.evaluate_moved()
        self._look(loss)
        return self.found

    def _look(self, values: Any) -> None:
        """Note what has been made since the last look: here."""
        roots = [leaf.grad_fn for leaf in torch.utils._pytree.tree_leaves(values) if isinstance(leaf, Tensor)]
        self.found += [(self.place, node) for node in graph_nodes(roots, self._seen)]

    @contextmanager
    def _following(self) -> Iterator[None]:
        handles: list[Any] = []
        try:
            for name, module in self._model.named_modules():
                place = f"module {name!r}" if name else "the model"

                def enter(_module: nn.Module, inputs: Any, options: Any, place: str = place) -> None:
                    self._look((inputs, options))  # made outside of the module
                    self._inside.append(place)

                def leave(_module: nn.Module, _inputs: Any, output: Any) -> None:
                    self._look(output)
                    self._inside.pop()

                handles.append(module.register_forward_pre_hook(enter, with_kwargs=True))
                handles.append(module.register_forward_hook(leave))
            yield
        finally:
            for handle in handles:
                handle.remove()
