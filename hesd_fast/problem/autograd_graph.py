"""Walks through the graph that autograd keeps of a computation."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from torch.autograd.graph import Node


def graph_nodes(roots: Iterable[Node | None], seen: set[Node] | None = None) -> Iterator[Node]:
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


def plain_name(name: str) -> str:
    """Return an operation's name without spelling: ``aten::_some_op_backward`` and ``SomeOpBackward0`` agree."""
    return re.sub(r"_|backward\d*$", "", name.lower())
