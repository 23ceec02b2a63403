"""What a strategy is, and the loop over batches that all of them share."""

from __future__ import annotations

import contextlib
import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from hesd_fast.engine import kernels
from hesd_fast.errors import OperatorError, first_line, raised_outside_of_libraries
from hesd_fast.hvp.derivative_check import check_derivatives
from hesd_fast.hvp.second_derivatives import Gradient
from hesd_fast.problem.batches import leaves
from hesd_fast.problem.differentiation import dense
from hesd_fast.problem.loss_term import LossTerm
from hesd_fast.problem.parameters import as_real, norm_of
from hesd_fast.problem.prepared_problem import PreparedProblem

Vectors = list[list[Tensor]]
"""One list per vector: a view of its elements for each parameter, in the parameter's shape and dtype."""

BlockVectors = Sequence[Sequence[Tensor | None]]
"""The same of vectors of blocks of the Hessian, with None for parameters outside of the block."""

Parts = list[tuple[int, Tensor]]
"""Position of a parameter and its part of some products, (rows, *shape); parameters left out have products of zero."""

LARGEST_DISAGREEMENT = 0.1
"""Relative difference of two ways to a product that no precision excuses."""


class Strategy(ABC):
    """One way to compute Hessian-vector products.

    Parameters
    ----------
    compensated : bool
        Carry the rounding error of adding up the batches in a second panel of out's size.
    memory_limit : int, optional
        Bytes that may be kept from one product to the next; None for no limit. Batches beyond it are done anew each
        time.

    Attributes
    ----------
    name : str
        How options and reports call the strategy.
    exact : bool
        Whether the products are right to rounding.
    family : str
        Strategies of one family keep the same things of a batch from one product to the next; "" keeps nothing.
    transforms : bool
        Whether it calls model, loss or their derivatives under function transforms of PyTorch, which take less code.
    checked_vectors : int
        How many vectors are multiplied to see that it is right; two where they are multiplied together.
    kept_bytes : int
        Bytes that it keeps now.
    is_full : bool
        Whether a batch has been left out because it did not fit.
    once_seconds : float
        What has been spent on programs that serve more than one batch.
    """

    name: ClassVar[str]
    exact: ClassVar[bool] = True
    family: ClassVar[str] = ""
    transforms: ClassVar[bool] = False
    checked_vectors: ClassVar[int] = 2

    def __init__(self, compensated: bool = False, memory_limit: int | None = None) -> None:
        self.compensated = compensated
        self.memory_limit = memory_limit
        self.kept_bytes = 0
        self.is_full = False
        self.once_seconds = 0.0
        self._kept: dict[int, Any] = {}

    def __getstate__(self) -> dict[str, Any]:
        # What is kept is of graphs, which no copy has.
        return {**vars(self), "_kept": {}, "kept_bytes": 0, "is_full": False}

    def prepare(self, problem: PreparedProblem) -> None:
        """Take a problem, and multiply on its first batch to see that the strategy can serve it.

        Raises
        ------
        OperatorError
            If an operation of model or loss has no second derivative, or one that this strategy cannot take or gets
            wrong; the message names it.
        """
        self.problem = problem
        with problem.session():
            check_derivatives(problem)
            self.check()

    def check(self) -> None:
        """Raise an OperatorError unless the strategy multiplies as plain double backward does."""
        rows = probe_vectors(self.problem, self.checked_vectors)
        wanted = ProductSum(self.problem, empty_panel(self.problem, len(rows)))
        term = self.problem.first_term()
        gradient = Gradient.of(self.problem, term.evaluate())
        for j, row in enumerate(rows):
            wanted.add(j, with_row(gradient.multiply(row, keep_graph=j + 1 < len(rows))), term.weight)
        for _ in range(2 if self.family else 1):  # the second time with what is kept
            self.compare(rows, wanted.out)

    def compare(self, rows: Vectors, wanted: Tensor) -> None:
        """Raise an OperatorError unless products on the first batch are those of plain double backward."""
        norm = norm_of([wanted])
        if not math.isfinite(norm):
            return  # the operator names the parameter
        term = self.problem.first_term()
        difference = norm_of([self.products_alone(term, rows).sub_(wanted)])
        if not agrees(difference, norm, self.problem.epsilon):
            raise OperatorError(
                f"hvp={self.name!r} gets the product of batch {term.index} wrong: it is {difference:.2g} away from "
                f"that of plain double backward, of norm {norm:.2g}, as some operation of model or loss has a "
                "derivative that PyTorch gets wrong there; use hvp='double_backward'"
            )

    def products_alone(self, term: LossTerm, rows: Vectors) -> Tensor:
        """Return the products (b, n) of one batch."""
        total = ProductSum(self.problem, empty_panel(self.problem, len(rows)))
        self._add_products(total, term, rows)
        return total.out

    def attempt(self, term: LossTerm, rows: Vectors) -> Iterator[tuple[int, Parts]]:
        """Yield the products of one batch; an OperatorError names the strategy where PyTorch cannot transform it."""
        if not self.transforms:
            yield from self.products(term, rows)
            return
        try:
            with quiet():
                yield from self.products(term, rows)
        except (OperatorError, torch.cuda.OutOfMemoryError, MemoryError):
            raise
        except Exception as error:  # what transforms raise at code they cannot take has no common type
            if raised_outside_of_libraries(error):
                raise
            raise OperatorError(
                f"hvp={self.name!r} cannot multiply by the Hessian of this problem; use hvp='double_backward', or "
                f"'auto'. PyTorch says: {first_line(error)}"
            ) from error

    @abstractmethod
    def products(self, term: LossTerm, rows: Vectors) -> Iterator[tuple[int, Parts]]:
        """Yield the products of one batch's Hessian with the vectors: the first row of a piece, and its parts."""

    def apply(self, panel: Tensor, out: Tensor) -> None:
        """Overwrite row j of ``out`` (b, n) by H times row j of ``panel`` (b, n)."""
        total = ProductSum(self.problem, out, self.compensated)
        rows = vectors_of(self.problem, panel)
        with self.problem.session():
            for term in self.problem.terms():
                self._add_products(total, term, rows)
        total.finish()

    def _add_products(self, total: ProductSum, term: LossTerm, rows: Vectors) -> None:
        for first, parts in self.attempt(term, rows):
            total.add(first, parts, term.weight)
            del parts

    def may_keep(self, term: LossTerm, tensors: Iterable[Tensor]) -> bool:
        """Whether the tensors may be kept, without those of the model and the batch; they count as kept if so.

        After the first batch that does not fit, none does.
        """
        if self.is_full:
            return False
        storages = {}
        for tensor in tensors:
            storage = tensor.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
        for owned in (*self.problem.model.parameters(), *(leaf for _, leaf in leaves(term.batch))):
            if isinstance(owned, Tensor) and owned.layout is torch.strided:
                storages.pop(owned.untyped_storage().data_ptr(), None)
        size = sum(storages.values())
        if self.memory_limit is not None and self.kept_bytes + size > self.memory_limit:
            self.is_full = True
            return False
        self.kept_bytes += size
        return True

    def take_over(self, other: Strategy) -> None:
        """Keep what another strategy of the same family keeps."""
        if self.family and self.family == other.family:
            self._kept, self.kept_bytes, self.is_full = dict(other._kept), other.kept_bytes, other.is_full

    def release(self) -> None:
        """Forget what is kept from one product to the next."""
        self._kept.clear()
        self.kept_bytes = 0
        self.is_full = False


def vectors_of(problem: PreparedProblem, panel: Tensor) -> Vectors:
    """Return views of the panel's rows, one per parameter, copied only where a parameter has another dtype."""
    parameters = list(problem.parameters.values())
    return [[view.to(p.dtype) for view, p in zip(problem.unflatten(row), parameters, strict=True)] for row in panel]


def empty_panel(problem: PreparedProblem, count: int) -> Tensor:
    """Return a panel (count, n) for vectors or products."""
    return kernels.empty_panel(count, problem.size, problem.dtype, problem.device)


def probe_vectors(problem: PreparedProblem, count: int, seed: int = 0) -> Vectors:
    """Return random vectors of signs."""
    panel = empty_panel(problem, count)
    kernels.fill_probes(panel, seed)
    return vectors_of(problem, panel)


class ProductSum:
    """Adds up products batch by batch.

    Parameters
    ----------
    problem : PreparedProblem
        Whose parameters the products have parts for.
    out : tensor (b, n)
        Overwritten by zeros, and added to.
    compensated : bool
        Carry the rounding errors in a second panel, to be added by :meth:`finish`.
    """

    def __init__(self, problem: PreparedProblem, out: Tensor, compensated: bool = False) -> None:
        self._offsets = problem.offsets
        self.out = out.zero_()
        self._compensation = torch.zeros_like(out) if compensated else None

    def add(self, first: int, parts: Parts, alpha: float) -> None:
        """Add alpha times the parts of some products to the rows from ``first`` on."""
        if not parts:
            return
        rows = slice(first, first + len(parts[0][1]))
        kernels.accumulate_hvp(
            self.out[rows],
            [dense_reals(part).reshape(len(part), -1) for _, part in parts],
            [self._offsets[position] for position, _ in parts],
            alpha=alpha,
            compensation=None if self._compensation is None else self._compensation[rows],
        )

    def finish(self) -> None:
        """Add what has been carried."""
        if self._compensation is not None:
            self.out += self._compensation


def agrees(difference: float, norm: float, epsilon: float) -> bool:
    """Whether two ways to a product of some norm differ by no more than rounding may do; not a number is too much."""
    return difference <= min(16.0 * math.sqrt(epsilon), LARGEST_DISAGREEMENT) * norm


def dense_reals(part: Tensor) -> Tensor:
    """Return a contiguous dense tensor of reals without a graph.

    PyTorch's derivative by a complex parameter a + i b is that by a plus i times that by b.
    """
    return as_real(dense(part).detach()).contiguous()


def with_row(parts: Parts) -> Parts:
    """Return the parts of one product as those of a panel of one row."""
    return [(position, part.unsqueeze(0)) for position, part in parts]


def stacked(rows: Vectors) -> list[Tensor]:
    """Return one tensor (b, *shape) per parameter."""
    return [torch.stack(views) for views in zip(*rows, strict=True)]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Leave out PyTorch's notes that an operation is batched by a loop, and those of its tracer on its own graphs."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*performance drop.*")
        warnings.filterwarnings("ignore", message=".*get_attr Node.*")
        yield
