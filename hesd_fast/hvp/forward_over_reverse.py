"""Exact products by forward over reverse: the directional derivative of the gradient as a function of the weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import Tensor
from torch.func import grad_and_value, jvp, vmap

from hesd_fast.errors import OperatorError
from hesd_fast.hvp.base import Parts, Strategy, Vectors, stacked
from hesd_fast.problem.loss_term import LossTerm

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
        term.note(value)

    def _gradient(self, term: LossTerm) -> tuple[Gradient, tuple[Tensor, ...]]:
        """Return the function weights -> (gradient, loss), and the weights."""

        def gradient(*weights: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
            return grad_and_value(lambda tensors: term.evaluate_at(tensors))(weights)

        return gradient, tuple(parameter.detach() for parameter in self.problem.parameters.values())
