"""What all operators built on the Jacobian of what a model computes share."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.func import jvp, vmap

from hesd_fast.engine import cuda
from hesd_fast.errors import OperatorError, ProblemError, first_line, raised_outside_of_libraries
from hesd_fast.hvp.base import ProductSum, Vectors, agrees, probe_vectors, quiet, stacked, vectors_of, with_row
from hesd_fast.hvp.second_derivatives import differentiate, refuse_dead_ends
from hesd_fast.hvp.wide_loss import Parts as WideParts
from hesd_fast.hvp.wide_loss import WideLoss
from hesd_fast.operators.base import ProblemOperator
from hesd_fast.problem.differentiation import filled, naming_refusals
from hesd_fast.problem.loss_term import LossTerm
from hesd_fast.problem.parameters import norm_of
from hesd_fast.problem.problem import Problem

TANGENT_BYTES = 2**28
"""Bytes that the products J v of a batch may take in forward mode, which computes many at once."""


class Jacobian:
    """The Jacobian J of a tensor with respect to the parameters, in products with vectors.

    J v is the derivative of w -> J^T w, which is linear in w: reverse mode twice. So it exists for every operation that
    has a second derivative, and with J^T v a product costs 4 F, with F the cost of the forward pass; J^T w is
    differentiated once, for all vectors, at 2 F. Forward mode has less to do, and takes fewer models.

    Parameters
    ----------
    values : tensor
        With its graph, which is kept until the Jacobian is gone.
    parameters : list of tensor
        What to differentiate by.
    """

    def __init__(self, values: Tensor, parameters: Sequence[Tensor]) -> None:
        self.values, self.parameters = values, parameters
        self._cotangent = torch.zeros_like(values, requires_grad=True)
        found = differentiate(values, parameters, self._cotangent, create_graph=True)
        self._entries = {i: entry for i, entry in enumerate(found) if entry is not None and entry.requires_grad}
        refuse_dead_ends(self._entries.values())

    def times(self, vector: list[Tensor]) -> Tensor:
        """Return J v, in the shape of the values."""
        if not self._entries:
            return torch.zeros_like(self.values)
        entries, parts = list(self._entries.values()), [vector[i] for i in self._entries]
        (product,) = differentiate(entries, self._cotangent, parts, retain_graph=True)
        return torch.zeros_like(self.values) if product is None else product


class JacobianOperator(ProblemOperator):
    """A matrix sum over batches of alpha J^T M J, with M a symmetric map of what the model computes of a batch.

    Parameters
    ----------
    problem : Problem
        Whose loss is of the form of :class:`hesd_fast.losses.OutputLoss`.
    compensated : bool
        Carry the rounding errors of adding up the batches (two-sum); costs a panel of memory.
    jvp : {"auto", "forward", "reverse"}
        How J v is computed: "forward" for forward mode, all vectors at once, "reverse" as in :class:`Jacobian`, "auto"
        for forward mode where it works and agrees with reverse mode.
    """

    needed: ClassVar[tuple[str, ...]]
    """Methods that the loss must have."""

    def __init__(self, problem: Problem, compensated: bool = False, jvp: str = "auto") -> None:
        super().__init__(problem)
        name = type(self).__name__
        missing = [method for method in self.needed if not callable(getattr(problem.loss, method, None))]
        if missing:
            raise ProblemError(
                f"{name} needs a loss that tells the model's outputs from what is done with them, and "
                f"{_name_of(problem.loss)} has no {' and no '.join(missing)}; use hesd_fast.losses.supervised or "
                "causal_lm, or write a hesd_fast.losses.OutputLoss"
            )
        if jvp not in ("auto", "forward", "reverse"):
            raise OperatorError(f"jvp is {jvp!r}; give 'auto', 'forward' or 'reverse'")
        self.compensated = compensated
        self.jvp = jvp
        self.reason = ""
        """Why "auto" takes reverse mode, if it does."""
        self._checked: set[int] = set()
        self._adjoint: set[int] = set()

    @property
    def method(self) -> str:
        """Return the mode of the Jacobian-vector products; the vector-Jacobian products are one backward pass each."""
        return f"jvp in {'reverse' if self.jvp == 'reverse' or self.reason else 'forward'} mode, vjp"

    @abstractmethod
    def _values(self, outputs: Tensor, batch: Any) -> Tensor:
        """Return the values to take the Jacobian of."""

    @abstractmethod
    def _middle(self, term: LossTerm, outputs: Tensor) -> tuple[Callable[[Tensor], Tensor], float]:
        """Return the map M of tangents, and alpha; let the term note the loss."""

    def _multiply(self, panel: Tensor, out: Tensor) -> None:
        problem = self.prepared
        total = ProductSum(problem, out, self.compensated)
        rows = vectors_of(problem, panel)
        with problem.session():
            for term in problem.terms():
                self._add_products(total, term, rows)
        total.finish()

    def _add_products(self, total: ProductSum, term: LossTerm, rows: Vectors) -> None:
        parameters = list(self.problem.parameters.values())
        outputs = self._outputs(term)
        with self._naming_refusals(term):
            middle, alpha = self._middle(term, outputs)
            values = self._values(outputs, term.batch)
            for j, tangent in self._tangents(term, values, rows):
                keep = j + 1 < len(rows)
                parts = differentiate(values, parameters, middle(tangent), retain_graph=keep)
                used = [(i, part) for i, part in enumerate(parts) if part is not None]
                total.add(j, with_row(used), alpha)
                del parts, used, tangent

    def products_of(self, term: LossTerm, panel: Tensor) -> Tensor:
        """Return a batch's part of the products with the rows of a panel, in a session."""
        total = ProductSum(self.prepared, torch.empty_like(panel))
        self._add_products(total, term, vectors_of(self.prepared, panel))
        return total.out

    def wide_products(self, loss: WideLoss, term: LossTerm, rows: Vectors) -> tuple[float, float, Iterator[WideParts]]:
        """Return a batch's loss in a wide precision, its weight, and its products with some vectors."""
        with loss.elsewhere():
            outputs = self._outputs(term)
            middle, alpha = self._middle(term, outputs)
            jacobian = Jacobian(self._values(outputs, term.batch), loss.leaves)
        value, term.value = term.value, None  # which is not that of the first pass

        def products() -> Iterator[WideParts]:
            for row in rows:
                with loss.elsewhere():
                    cotangent = middle(jacobian.times(row))
                    found = differentiate(jacobian.values, loss.leaves, cotangent, retain_graph=True)
                yield filled(found, loss.leaves)

        return float("nan") if value is None else float(value), alpha, products()

    def _tangents(self, term: LossTerm, values: Tensor, rows: Vectors) -> Iterator[tuple[int, Tensor]]:
        """Yield (j, J v_j) for all vectors, as few at a time as memory asks for."""
        size = max(TANGENT_BYTES // max(values.nbytes, 1), 1)
        for first in range(0, len(rows), size):
            chunk = rows[first : first + size]
            if self.jvp == "reverse" or self.reason:
                jacobian = Jacobian(values, list(self.problem.parameters.values()))
                self._check_adjoint(term, jacobian)
                for j in range(first, len(rows)):
                    yield j, jacobian.times(rows[j])
                return
            try:
                if term.index not in self._checked:
                    self._check(term, values)
                tangents = self._forward(term, chunk)
            except MemoryError:
                raise
            except Exception as error:  # what transforms raise at code they cannot take has no common type
                out_of_memory = isinstance(error, torch.cuda.OutOfMemoryError)
                if raised_outside_of_libraries(error) and not out_of_memory:
                    raise
                message = first_line(error)
                if self.jvp == "forward" and out_of_memory:
                    raise
                if self.jvp == "forward":
                    raise OperatorError(
                        f"jvp='forward' cannot differentiate this model; use 'reverse' or 'auto': {message}"
                    ) from error
                self.reason = message
            else:
                yield from enumerate(tangents, first)
                del tangents
                continue
            cuda.runtime.release_unused()  # after the error, whose frames hold what was made
            yield from ((first + j, tangent) for j, tangent in self._tangents(term, values, rows[first:]))
            return

    def _forward(self, term: LossTerm, rows: Vectors) -> Tensor:
        def function(*weights: Tensor) -> Tensor:
            return self._values(self._outputs(term, weights), term.batch)

        def product(*vector: Tensor) -> tuple[Tensor, Tensor]:
            return jvp(function, point, vector)  # type: ignore[return-value]

        point = tuple(parameter.detach() for parameter in self.problem.parameters.values())
        with quiet():
            # The values do not depend on the vectors, so they have no dimension for them.
            value, changes = vmap(product, out_dims=(None, 0), randomness="same")(*stacked(rows))  # type: ignore[arg-type]
        if value.requires_grad or changes.requires_grad:
            raise OperatorError("the model reaches a selected parameter by another way than its module's attribute")
        tangents: Tensor = changes
        return tangents

    def _check(self, term: LossTerm, values: Tensor) -> None:
        """Raise an OperatorError unless both modes agree on a batch; of each batch once, at the cost of one vector.

        They differ where PyTorch defines a derivative in one way only, as that of an embedding at ``padding_idx``.
        """
        (row,) = probe_vectors(self.prepared, 1)
        found = self._forward(term, [row])[0]
        wanted = Jacobian(values, list(self.problem.parameters.values())).times(row)
        difference, norm = norm_of([found - wanted]), norm_of([wanted])
        if not agrees(difference, norm, self.epsilon) and not self._reverse_is_wrong(term, values):
            raise OperatorError(
                f"forward mode is {difference:.2g} away from reverse mode, of norm {norm:.2g}, on batch {term.index}"
            )
        self._checked.add(term.index)

    def _reverse_is_wrong(self, term: LossTerm, values: Tensor) -> bool:
        """Whether forward mode was asked for and reverse mode is no measure of it: it fails its own check."""
        if self.jvp != "forward":
            return False
        try:
            self._check_adjoint(term, Jacobian(values, list(self.problem.parameters.values())))
        except OperatorError:
            return True
        return False

    def _check_adjoint(self, term: LossTerm, jacobian: Jacobian) -> None:
        """Raise an OperatorError unless J g is what it has to be for g = J^T w; of each batch once, at 4 F.

        <w, J g> is |g|^2. J g comes from a second differentiation, to which a backward pass without a graph is zero.
        """
        if term.index in self._adjoint:
            return
        values = jacobian.values
        generator = torch.Generator().manual_seed(0)
        w = torch.randn(values.shape, generator=generator, device="cpu").to(values.device, values.dtype)
        found = differentiate(values, jacobian.parameters, w, retain_graph=True)
        gradient = filled(found, jacobian.parameters)
        wanted = norm_of(gradient) ** 2
        product = float((w.double() * jacobian.times(gradient).double()).sum())
        if math.isfinite(wanted) and not agrees(abs(product - wanted), wanted, self.epsilon):
            raise OperatorError(
                f"{type(self).__name__} cannot multiply on batch {term.index}: products with the Jacobian and with its "
                f"transpose are not those of one matrix ({product:.4g} for {wanted:.4g}), as where the backward pass "
                "of an autograd Function leaves PyTorch, for NumPy or a kernel of one's own; write its backward in "
                "operations of PyTorch, or give it a jvp and take jvp='forward'"
            )
        self._adjoint.add(term.index)

    def _outputs(self, term: LossTerm, weights: Sequence[Tensor] | None = None) -> Tensor:
        outputs = term.outputs(weights)
        if not isinstance(outputs, Tensor) or not outputs.is_floating_point():
            got = f"dtype {outputs.dtype}" if isinstance(outputs, Tensor) else f"type {type(outputs).__name__}"
            raise ProblemError(
                f"the outputs of batch {term.index} are of {got}; loss.outputs has to return a floating-point tensor"
            )
        return outputs

    def _naming_refusals(self, term: LossTerm) -> AbstractContextManager[None]:
        return naming_refusals(
            lambda said: (
                f"{type(self).__name__} cannot multiply on batch {term.index}: the derivative of model or loss cannot "
                "be differentiated once more; replace the operation that PyTorch names by ordinary ones. "
                f"PyTorch says: {said}"
            )
        )


def loss_of(loss: Any, outputs: Tensor, batch: Any) -> Tensor:
    """Return what :class:`~hesd_fast.Problem` takes for the loss: a mean, or the first of (sum, count)."""
    result = loss.of_outputs(outputs, batch)
    value: Tensor = result[0] if isinstance(result, tuple) and len(result) == 2 else result
    return value


def _name_of(loss: Any) -> str:
    return str(getattr(loss, "__name__", type(loss).__name__))
