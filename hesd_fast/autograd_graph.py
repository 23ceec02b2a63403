"""Walks through the graph that autograd keeps of a computation."""

from __future__ import annotations

from collections.abc import Iterator

from torch.autograd.graph import Node


def graph_nodes(roots: list[Node | None], seen: set[Node] | None = None) -> Iterator[Node]:
    """Yield the nodes of an autograd graph that are not in ``seen``, and add them to it."""
    seen = set() if seen is None else seen
    stack = [root for root in roots if root is not None]
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        yield node
        stack.extend(following for following, _ in node.next_functions if following is not None)
