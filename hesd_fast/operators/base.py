"""What a curvature operator is, and the checks that all of ours share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from hesd_fast.errors import OperatorError
from hesd_fast.hvp.base import Vectors
from hesd_fast.hvp.wide_loss import Parts, WideLoss
from hesd_fast.operators.not_finite import cause_of_nan
from hesd_fast.problem.loss_term import LossTerm
from hesd_fast.problem.parameters import memory_ends
from hesd_fast.problem.prepared_problem import PreparedProblem
from hesd_fast.problem.problem import Problem

if TYPE_CHECKING:
    from scipy.sparse.linalg import LinearOperator


WRAPPED = "curvature_operator"
"""The attribute of a SciPy operator that holds the operator it was made of."""


@runtime_checkable
class CurvatureOperator(Protocol):
    """A symmetric n x n matrix, known by its products with panels.

    An operator may also have ``describe(column) -> str``, which names a column in error messages.

    Examples
    --------
    >>> import torch
    >>> import hesd_fast as hesd
    >>> class Diagonal:
    ...     size, dtype, device, products = 3, torch.float64, torch.device("cpu"), 0
    ...     def matmat(self, panel, out=None):
    ...         self.products += len(panel)
    ...         return torch.mul(panel, torch.tensor([1.0, 2.0, 4.0], dtype=self.dtype), out=out)
    >>> tridiagonal = hesd.block_lanczos(Diagonal(), steps=3, block_size=1)
    >>> hesd.SpectralMeasure.from_tridiagonal(tridiagonal).nodes[0].round(6)
    array([1., 2., 4.])
    """

    @property
    def size(self) -> int:
        """Return n, the number of rows and columns."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """Return float32 or float64, the precision of every panel."""
        ...

    @property
    def device(self) -> torch.device:
        """Return where panels are."""
        ...

    @property
    def products(self) -> int:
        """Return how many vectors have been multiplied so far."""
        ...

    def matmat(self, panel: Tensor, out: Tensor | None = None) -> Tensor:
        """Return the panel (b, n) whose row j is H times row j of ``panel``; written to ``out`` if given."""
        ...


class OperatorBase(ABC):
    """A curvature operator whose panels are checked on entry; a subclass multiplies in ``_multiply``.

    Parameters
    ----------
    size : int
        n, the number of rows and columns.
    dtype : torch.dtype
        float32 or float64, the precision of every panel.
    device : torch.device
        Where panels are.
    """

    def __init__(self, size: int, dtype: torch.dtype, device: torch.device) -> None:
        self.size = size
        self.dtype = dtype
        self.device = device
        self.products = 0

    @abstractmethod
    def _multiply(self, panel: Tensor, out: Tensor) -> None:
        """Overwrite row j of ``out`` by H times row j of ``panel``."""

    def describe(self, column: int) -> str:
        """Return what a column is called in error messages."""
        return f"column {column}"

    def matmat(self, panel: Tensor, out: Tensor | None = None) -> Tensor:
        """Multiply a panel.

        Parameters
        ----------
        panel : tensor (b, n)
            One vector per row, each contiguous.
        out : tensor (b, n), optional
            Overwritten by the products; must not overlap ``panel``.

        Returns
        -------
        tensor (b, n)
            Row j is H times row j of ``panel``; ``out`` if it was given.

        Raises
        ------
        OperatorError
            For a panel or out of another shape, dtype, device or stride, and where a product is not finite.
        """
        out = self._admit(panel, out)
        if len(panel):
            self._multiply(panel.detach(), out)
            self._finish(panel, out)
        return out

    def _admit(self, panel: Tensor, out: Tensor | None) -> Tensor:
        """Return where the products belong; an OperatorError for what cannot be multiplied or written to."""
        self._check_panel("panel", panel)
        if panel.ndim != 2:
            raise OperatorError(f"the panel has shape {tuple(panel.shape)}; give (b, {self.size}), or use matvec")
        if out is None:
            with torch.inference_mode(False):  # an inference tensor could not be written to in a session
                out = torch.empty(panel.shape, dtype=self.dtype, device=self.device)
        else:
            self._check_panel("out", out)
            if out.shape != panel.shape:
                raise OperatorError(f"out has shape {tuple(out.shape)}; give the panel's, {tuple(panel.shape)}")
            if out.is_inference():
                raise OperatorError("out was made in inference mode and cannot be written to; make it outside")
            if _overlap(panel, out):
                raise OperatorError("out and the panel share memory; give out memory of its own")
        return out

    def _finish(self, panel: Tensor, out: Tensor) -> None:
        """Check and count the products."""
        self._check_finite(panel, out)
        self.products += len(panel)

    def _remedy(self, vector: Tensor) -> str:  # noqa: ARG002
        """Return what to do about a product (1, n) that is not finite."""
        return "finite numbers are wanted: check the matrix, or use a higher precision"

    def matvec(self, vector: Tensor) -> Tensor:
        """Return H times one vector (n,), as a vector (n,)."""
        if not isinstance(vector, Tensor) or vector.ndim != 1:
            got = f"shape {tuple(vector.shape)}" if isinstance(vector, Tensor) else f"type {type(vector).__name__}"
            raise OperatorError(f"matvec got a vector of {got}; give a tensor of shape ({self.size},)")
        return self.matmat(vector[None])[0]

    def to_scipy(self) -> LinearOperator:
        """Return a SciPy ``LinearOperator`` (n, n) that takes and gives float64 arrays on the CPU.

        The products themselves have the operator's own precision.
        """
        from scipy.sparse.linalg import LinearOperator

        def matmat(columns: np.ndarray[Any, np.dtype[Any]]) -> np.ndarray[Any, np.dtype[np.float64]]:
            rows = np.ascontiguousarray(columns.reshape(self.size, -1).T)
            products = self.matmat(torch.from_numpy(rows).to(self.device, self.dtype))
            result: np.ndarray[Any, np.dtype[np.float64]] = products.T.double().cpu().numpy().reshape(columns.shape)
            return result

        shape = (self.size, self.size)
        found = LinearOperator(shape, matvec=matmat, matmat=matmat, rmatvec=matmat, dtype=np.float64)
        setattr(found, WRAPPED, self)  # its products are not as precise as its dtype says
        return found

    def _check_panel(self, name: str, panel: Any) -> None:
        if not isinstance(panel, Tensor):
            raise OperatorError(f"{name} is of type {type(panel).__name__}; give a tensor (b, {self.size})")
        if panel.ndim == 0 or panel.shape[-1] != self.size:
            raise OperatorError(f"{name} has shape {tuple(panel.shape)}; give (b, {self.size})")
        if panel.dtype != self.dtype:
            raise OperatorError(f"{name} has dtype {panel.dtype}; give {self.dtype}")
        if panel.device != self.device:
            raise OperatorError(f"{name} is on {panel.device}; give it on {self.device}")
        if self.size > 1 and panel.stride(-1) != 1:
            raise OperatorError(
                f"{name} has stride {panel.stride(-1)} within its vectors; make them contiguous with .contiguous()"
            )

    def _check_finite(self, panel: Tensor, out: Tensor) -> None:
        # A sum is not finite as soon as one number is not; where finite numbers overflow, the loop below finds nothing.
        if bool(torch.isfinite(out.sum(dim=1)).all()):
            return
        for name, vectors in (("the panel given", panel), ("the product", out)):
            bad = (~torch.isfinite(vectors)).nonzero()
            if len(bad):
                row, column = bad[0].tolist()
                found = f"{name} holds {float(vectors[row, column])} in vector {row} at {self.describe(column)}"
                raise OperatorError(f"{found}; {self._remedy(panel[row : row + 1])}")


class ProblemOperator(OperatorBase):
    """An operator on the selected parameters of a problem, one column per parameter element.

    The problem is prepared when it is needed first, at the first product.
    """

    def __init__(self, problem: Problem) -> None:
        if not isinstance(problem, Problem):
            raise OperatorError(
                f"{type(self).__name__} got {type(problem).__name__}; give a Problem, as in Problem(model, loss, data)"
            )
        super().__init__(problem.size, problem.dtype, problem.device)
        self.problem = problem

    @property
    def prepared(self) -> PreparedProblem:
        """The problem, its data read."""
        return self.problem.prepare()

    @property
    def epsilon(self) -> float:
        """Machine epsilon of the coarsest selected parameter, which limits the accuracy of the products."""
        return self.problem.epsilon

    @property
    @abstractmethod
    def method(self) -> str:
        """Return how products are made, for reports."""

    def release(self) -> None:
        """Let go of what is kept from one product to the next."""

    @property
    def not_comparable(self) -> str | None:
        """Why products of single batches say nothing about those of the run; None where they do."""
        return None

    @abstractmethod
    def products_of(self, term: LossTerm, panel: Tensor) -> Tensor:
        """Return a batch's part of the products with the rows of a panel, made as those of a run, in a session."""

    @abstractmethod
    def wide_products(self, loss: WideLoss, term: LossTerm, rows: Vectors) -> tuple[float, float, Iterator[Parts]]:
        """Return a batch's loss in a wide precision, its weight, and its products with some vectors, each once."""

    def _multiply_anew(self, panel: Tensor, out: Tensor) -> None:
        """Multiply without what is kept from one product to the next."""
        self._multiply(panel, out)

    def _remedy(self, vector: Tensor) -> str:
        wanted = "finite numbers are wanted"
        if not bool(torch.isfinite(vector).all()):
            return f"{wanted}: give vectors of finite numbers"
        cause = cause_of_nan(lambda: self._multiply_anew(vector, torch.empty_like(vector)))
        if not cause:
            return f"{wanted}: check weights, data and loss for numbers near overflow, or use a higher precision"
        remedy = (
            "write it so that it has a derivative there, scale the loss or use a higher precision if numbers overflow, "
            "or leave the parameters before it out of the selection"
        )
        if cause.startswith("the second"):
            remedy += ", or use hvp='finite_differences', which needs first derivatives alone"
        return f"{cause}; {wanted}: {remedy}"

    def describe(self, column: int) -> str:
        """Return the name of the parameter that a column belongs to."""
        return f"column {column} (parameter {self.problem.describe(column)!r})"


def _overlap(one: Tensor, other: Tensor) -> bool:
    """Whether the memory from the first to the last element of two panels overlaps."""
    if not (one.numel() and other.numel()):
        return False
    (start, end), (other_start, other_end) = memory_ends(one), memory_ends(other)
    return start < other_end and other_start < end
