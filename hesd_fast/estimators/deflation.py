"""An orthonormal basis that takes large eigenvalues out of a matrix, so that random probes see the rest alone."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from hesd_fast.engine import kernels
from hesd_fast.errors import OperatorError
from hesd_fast.lanczos.lanczos_run import LARGEST_ASYMMETRY
from hesd_fast.operators.base import CurvatureOperator

Array = npt.NDArray[np.float64]

BLOCK = 4
"""Directions that are added together: so many equal eigenvalues are found in one step."""

DEPENDENT = 1024.0
"""A product adds no direction where what is new of it is at most this many machine epsilons of the product.

Rounding of products makes such directions, and what they could take out is the square of that.
"""

STILL_NEW = 0.5
"""What is left of a unit vector outside of the others, or it is dropped as one of them."""


class Deflation:
    """An orthonormal basis V (d, n) that grows by products of the matrix A with its last vectors, or by random ones.

    Parameters
    ----------
    operator : CurvatureOperator
        The matrix, n x n.
    rows : int
        The most vectors of the basis.
    seed, first_probe : int
        Where in the table of Gaussian numbers its random vectors begin.

    Attributes
    ----------
    products : int
        Vectors multiplied so far.
    epsilon : float
        Machine epsilon of the coarsest arithmetic that products work in.
    """

    def __init__(self, operator: CurvatureOperator, rows: int, seed: int, first_probe: int) -> None:
        self.products = 0
        self._lengths: Array = np.zeros(0)  # of the products of the last vectors
        self._crossing = 0.0
        self._square: Array = np.zeros((0, 0))  # the matrix among the last vectors
        self._is_random = True
        self._operator, self._seed, self._next_probe = operator, seed, first_probe
        self._size = 0
        self._basis = new_panel(operator, rows)
        self._images = new_panel(operator, min(rows, BLOCK))
        self._last = 0  # of the images, those that are products of the last vectors
        self.epsilon = max(torch.finfo(operator.dtype).eps, getattr(operator, "epsilon", 0.0))

    @property
    def basis(self) -> Tensor:
        """V, (d, n)."""
        return self._basis[: self._size]

    @property
    def room(self) -> int:
        """How many vectors more there is memory for."""
        return len(self._basis) - self._size

    @property
    def goes_on(self) -> bool:
        """Whether products of the last vectors may have directions that the basis has not."""
        return self._last > 0

    def project(self, panel: Tensor) -> None:
        """Take out of the vectors of a panel what lies in the space of V."""
        if self._size:
            inside = kernels.panel_gram(self.basis, panel)
            again, _ = kernels.panel_project(panel, self.basis, inside, self_gram=False)
            assert again is not None
            kernels.panel_project(panel, self.basis, again, gram=False, self_gram=False)

    def grow(self, width: int, *, at_random: bool) -> tuple[Tensor, Tensor]:
        """Add up to ``width`` vectors and multiply them; return both (r, n), which the next call overwrites.

        Parameters
        ----------
        width : int
            At most `BLOCK`, and `room`.
        at_random : bool
            Random directions, for what the products of those before do not lead to; else the products of the last
            vectors, as in block Lanczos.
        """
        width = width if at_random else min(width, self._last)
        candidates = self._images[:width]
        if at_random:
            kernels.fill_probes(candidates, self._seed, first_probe=self._next_probe, kind="gaussian")
            self._next_probe += width
        else:
            candidates.div_(candidates.abs().max())  # so that it can be squared
        free = self._basis[self._size : self._size + width]
        self._last = self._orthonormalized(candidates, free)
        vectors, images = free[: self._last], self._images[: self._last]
        self._size += self._last
        if self._last:
            multiply(self._operator, vectors, images)
            self.products += self._last
            self._measure(images)
        self._is_random = at_random
        self._last = self._last if bool(images.any()) else 0
        return vectors, images

    def _orthonormalized(self, candidates: Tensor, out: Tensor) -> int:
        """Fill the first vectors of ``out`` with what is new in the candidates, which are lost; return how many."""
        longest = math.sqrt(float(as_array(kernels.panel_gram(candidates, candidates)).diagonal().max()))
        self.project(candidates)
        found = kernels.panel_orthonormalize(candidates, out, tolerance=DEPENDENT * self.epsilon * longest)
        if found.rank and found.weakest < math.sqrt(self.epsilon) * longest:
            # A weak direction has as much of V as rounding has left in a strong one of the same block.
            weak = candidates[: found.rank].copy_(out[: found.rank])
            self.project(weak)
            found = kernels.panel_orthonormalize(weak, out[: found.rank], tolerance=STILL_NEW)
        return found.rank

    def gain(self, mean: float) -> float | None:
        """Return by how much the last vectors lowered the square of the norm of what is left, for each of them.

        None where they were random, which says nothing of what their products will gain. The norm is that of
        ``(I - P) (A - mean) (I - P)``, with ``P = V^T V``.
        """
        if self._is_random or not self._last:
            return None
        # Each direction takes out its row, its column, and where they cross only once.
        square = self._square - mean * np.eye(self._last)
        return (2.0 * self._crossing + float((square**2).sum())) / self._last

    def gain_of_square(self, mean: float) -> float | None:
        """Return the same of ``A^2 - mean``, at least: of it, only the forms ``v' A^2 v`` are known."""
        if self._is_random or not self._last:
            return None
        return float(((self._lengths**2 - mean) ** 2).mean())

    def _measure(self, images: Tensor) -> None:
        """Keep what the products of the last vectors say of what these have taken out."""
        scale = float(images.abs().max()) or 1.0  # so that it can be squared
        within = as_array(kernels.panel_gram(self.basis, images)) / scale
        squares = as_array(kernels.panel_gram(images, images)).diagonal() / scale**2
        square = float(squares.sum())
        self._lengths = np.sqrt(squares) * scale
        self._square = within[-len(images) :] * scale
        self._crossing = max(square - float((within**2).sum()), 0.0) * scale**2
        check_symmetric(self._square, math.sqrt(square) * scale, self.epsilon)


def new_panel(operator: CurvatureOperator, rows: int) -> Tensor:
    """Return an uninitialized panel for vectors of an operator."""
    return kernels.empty_panel(rows, operator.size, operator.dtype, operator.device)


def multiply(operator: CurvatureOperator, panel: Tensor, out: Tensor) -> None:
    """Fill ``out`` with the products of a panel; an OperatorError where they are not finite."""
    result = operator.matmat(panel, out=out)
    if result is not out:  # an operator of the user's own may have made a panel of its own
        out.copy_(result)
    if bool(torch.isfinite(out.sum(dim=1)).all()):
        return
    places = (~torch.isfinite(out)).nonzero()
    if not len(places):
        return
    row, column = places[0].tolist()
    describe = getattr(operator, "describe", None)
    where = describe(column) if callable(describe) else f"column {column}"
    raise OperatorError(
        f"the product of vector {row} is {float(out[row, column])} at {where}; wanted finite numbers. Check weights, "
        "data and loss, or use float64"
    )


def check_symmetric(square: Array, scale: float, epsilon: float) -> None:
    """Raise an OperatorError where ``u'Av`` (k, k) differs from ``v'Au`` by too much of products of norm ``scale``."""
    difference = float(np.abs(square - square.T).max(initial=0.0))
    allowed = max(LARGEST_ASYMMETRY, 8.0 * epsilon) * scale
    if difference > allowed:
        raise OperatorError(
            f"the products are not those of one symmetric matrix: u'Av and v'Au differ by {difference:.3g}, at most "
            f"{allowed:.3g} is allowed. Likely causes are rounding, where the loss is close to zero (use float64), or "
            "a loss that changes from one product to the next; compare a few products with a dense Hessian"
        )


def as_array(matrix: object) -> Array:
    """Return a matrix that a kernel gave as a NumPy array."""
    return np.asarray(matrix, dtype=np.float64)
