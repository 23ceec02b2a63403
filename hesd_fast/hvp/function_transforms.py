"""Exact products by forward over reverse: the directional derivative of the gradient as a function of the weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.func import functionalize, grad_and_value, jvp, linearize, vmap

from hesd_fast.errors import OperatorError
from hesd_fast.hvp.base import Parts, Strategy, Vectors, stacked, with_row
from hesd_fast.problem import LossTerm

Gradient = Callable[..., tuple[Any, Any]]


class ForwardOverReverse(Strategy):
    """One batch after the other, all vectors in one batched directional derivative of the gradient: 3F + 6F b.

    Nothing is kept, and no graph is built: the least memory of all exact strategies. Some operations have no forward
    derivative of their backward pass.
    """

    name = "forward_over_reverse"
    transforms = True

    def products(self, term: LossTerm, rows: Vectors) -> Iterator[tuple[int, Parts]]:
        """Yield all products at once."""
        gradient, point = self._gradient(term)

        def product(*vector: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
            _, change, value = jvp(gradient, point, vector, has_aux=True)  # type: ignore[misc]
            return change, value

        # The loss does not depend on the vectors, so it has no dimension for them.
        batched = vmap(product, out_dims=(0, None), randomness="same")  # type: ignore[arg-type]
        changes, value = batched(*stacked(rows))
        self._note(term, [*changes, value], value)
        yield 0, list(enumerate(changes))

    def _note(self, term: LossTerm, results: Iterable[Tensor], value: Tensor) -> None:
        """Note the loss, which has to be a function of the weights that were put in alone."""
        if any(result.requires_grad for result in results):
            raise OperatorError(
                f"hvp={self.name!r} cannot differentiate this model: it reaches a selected parameter by another way "
                "than its module's attribute, as through a list (recurrent layers of torch.nn do); "
                "use hvp='double_backward'"
            )
        term.value = value.detach()

    def _gradient(self, term: LossTerm) -> tuple[Gradient, tuple[Tensor, ...]]:
        """Return the function weights -> (gradient, loss), and the weights."""

        def gradient(*weights: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
            return grad_and_value(lambda tensors: term.evaluate_at(tensors))(weights)

        return gradient, tuple(parameter.detach() for parameter in self.problem.parameters.values())


class Linearized(ForwardOverReverse):
    """The linear map v -> H v of each batch is traced once, with all that does not depend on v computed beforehand.

    Each product then runs the linear operations alone: 6F a vector, one vector at a time. Tracing takes some
    milliseconds an operation, and turns writes in place into operations that are none. Memory: what the map needs of
    the forward and backward pass, for as many batches as ``memory_limit`` allows; the others are done by
    :class:`ForwardOverReverse` each time.
    """

    name = "linearized"
    family = "linearized"

    def products(self, term: LossTerm, rows: Vectors) -> Iterator[tuple[int, Parts]]:
        """Yield one product after the other."""
        product = self._linear_map(term)
        if product is None:
            yield from ForwardOverReverse.products(self, term, rows)
            return
        for j, row in enumerate(rows):
            with torch.no_grad():
                changes = product(*row)
            yield j, with_row(list(enumerate(changes)))

    def _linear_map(self, term: LossTerm) -> Callable[..., Any] | None:
        if term.index in self._kept:
            product: Callable[..., Any] = self._kept[term.index]
            return product
        if self.is_full:
            return None
        gradient, point = self._gradient(term)
        with term.watched_random_streams() as drawn:
            (slopes, value), product = linearize(functionalize(gradient), *point)
        if drawn:
            # Tracing runs what does not depend on v twice, and the second time draws other numbers.
            raise OperatorError(
                f"hvp={self.name!r} cannot take a model or loss that draws random numbers, as dropout in train mode "
                "does; use hvp='double_backward' or mode='eval'"
            )
        self._note(term, [*slopes, value], value)
        if (operation := _written_constant(product)) is not None:
            raise OperatorError(
                f"hvp={self.name!r} cannot trace this model: {operation} writes to a tensor in place, which the second "
                "product would find changed; use hvp='double_backward', or operations that do not work in place"
            )
        with torch.no_grad():
            product(*point)  # what does not depend on the vector is computed at the first call
        if not self.may_keep(term, (item for item in _parts_of(product) if isinstance(item, Tensor))):
            return None
        change = _first_of(product)
        self._kept[term.index] = change
        return change


class LinearizedBatched(Linearized):
    """Traced as in :class:`Linearized`; all vectors in one call of the map, batched by ``vmap``."""

    name = "linearized_batched"

    def products(self, term: LossTerm, rows: Vectors) -> Iterator[tuple[int, Parts]]:
        """Yield all products at once."""
        product = self._linear_map(term)
        if product is None:
            yield from ForwardOverReverse.products(self, term, rows)
            return
        with torch.no_grad():
            changes = vmap(product)(*stacked(rows))
        yield 0, list(enumerate(changes))


def _first_of(product: Callable[..., Any]) -> Callable[..., Any]:
    """Return the map of the gradient alone, from that of (gradient, loss)."""
    return lambda *vector: product(*vector)[0]


def _parts_of(product: Any) -> Iterator[Tensor | torch.nn.Module]:
    """Yield the tensors and modules that a linearized function holds."""
    seen: set[int] = set()
    stack = [product]
    while stack:
        item = stack.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, Tensor):
            yield item
        elif isinstance(item, torch.nn.Module):
            yield item
            stack += [value for value in vars(item).values() if isinstance(value, Tensor)]
            stack += [*item.parameters(), *item.buffers(), *item.children()]
        elif isinstance(item, tuple | list):
            stack += item
        elif callable(item):
            stack += [cell.cell_contents for cell in getattr(item, "__closure__", None) or ()]
            stack += [*getattr(item, "args", ()), getattr(item, "func", None)]


def _written_constant(product: Any) -> str | None:
    """Return an operation that writes to something computed beforehand, which the next use would find changed; or None.

    A copy is none of them: what it writes to holds the same whenever it is read, however often the map is used.
    """
    for item in _parts_of(product):
        for node in item.graph.nodes if isinstance(item, torch.fx.GraphModule) else ():
            if not isinstance(node.target, torch._ops.OpOverload) or node.target is torch.ops.aten.copy_.default:
                continue
            for position, argument in enumerate(node.target._schema.arguments):
                if argument.alias_info is not None and argument.alias_info.is_write:
                    written = node.args[position] if position < len(node.args) else node.kwargs.get(argument.name)
                    if _is_constant(written):
                        return str(node.target)
    return None


def _is_constant(node: Any) -> bool:
    """Whether a node of a graph is a constant or a view of one."""
    while isinstance(node, torch.fx.Node) and isinstance(node.target, torch._ops.OpOverload) and node.args:
        returned = node.target._schema.returns
        if not returned or returned[0].alias_info is None:
            return False
        node = node.args[0]
    return isinstance(node, torch.fx.Node) and node.op == "get_attr"
