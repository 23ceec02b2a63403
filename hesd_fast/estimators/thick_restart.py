"""Thick-restart block Lanczos: a Krylov space that is cut back to its best Ritz vectors whenever its memory is full."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from hesd_fast.engine import kernels
from hesd_fast.errors import OperatorError
from hesd_fast.lanczos.block_tridiagonal import NOISE_MULTIPLE, RITZ_ROUNDING, Array
from hesd_fast.lanczos.lanczos_run import BREAKDOWN_MULTIPLE, SMALLEST_SCALE, check_symmetry
from hesd_fast.operators.base import CurvatureOperator

Order = npt.NDArray[np.intp]

TILE_BYTES = 2**24
TILE_SHARE = 1 / 16
"""Memory for the part of the new basis that is made at a time, before it takes the place of the old one: so many bytes
at most, and so much of the basis."""

ORTHOGONAL = 16.0
"""Overlap of a new vector with the basis that is let be, in machine epsilons of its norm."""

MOST_SWEEPS = 4
"""Projections of a block against the whole basis; two are enough but where nearly nothing is left of a block."""

WEAK = 1e-2
"""Share of the norm of a block's vectors below which the overlaps of a direction count as magnified."""


@dataclass(frozen=True)
class RitzValues:
    """The eigenpairs ``T = S Theta S^T`` of a Krylov space.

    Attributes
    ----------
    values : ndarray (k,)
        Ritz values in ascending order.
    vectors : ndarray (k, k)
        ``S``, a Ritz vector's coordinates in each column.
    couplings : ndarray (k, p)
        ``S^T B``: what is left of ``H y - theta y`` for each Ritz vector, in coordinates of the residual block.
    estimates : ndarray (k,)
        The norms of its rows, which are the residual norms but for rounding.
    """

    values: Array
    vectors: Array
    couplings: Array
    estimates: Array


class KrylovSpace:
    """Rows ``V`` and ``R``, orthonormal, with ``H V = T V + B R`` (each set of vectors read as rows).

    Parameters
    ----------
    operator : CurvatureOperator
        Multiplies panels.
    panel : tensor (rows, n)
        Memory of all vectors: the locked ones, then V, then R, then as many rows as R has for its products.
    locked : int
        First rows of the panel that V and R are kept orthogonal to; then ``H`` is to be read as its part in the
        complement of their span.

    Attributes
    ----------
    matrix, coupling : ndarray (k, k), (k, p)
        ``T`` and ``B``.
    products : int
        Vectors multiplied so far.
    scale : float
        The largest norm of a product so far.
    largest : float
        The largest ``|Ritz value|`` so far.
    recurrence_error : float
        How far measured products ``Q H Q^T`` were from symmetric.

    References
    ----------
    Wu and Simon, SIMAX 22(2), 2000 (thick restart); Stewart, SIMAX 23(3), 2002, and Zhou and Saad, Numerical
    Algorithms 47(4), 2008 (the same for blocks, as a Krylov-Schur decomposition).
    """

    def __init__(self, operator: CurvatureOperator, panel: Tensor, locked: int = 0) -> None:
        self._operator = operator
        self._panel = panel
        self.locked = locked
        self.matrix: Array = np.zeros((0, 0))
        self.coupling: Array = np.zeros((0, 0))
        self.products = 0
        self.scale = 0.0
        self.largest = 0.0
        self.recurrence_error = 0.0
        self.epsilon = max(torch.finfo(operator.dtype).eps, getattr(operator, "epsilon", 0.0))
        self._first_coupled = locked  # rows before it couple with the next products by rounding alone

    @property
    def order(self) -> int:
        """Vectors of V."""
        return len(self.matrix)

    @property
    def width(self) -> int:
        """Vectors of R; 0 where the space is invariant."""
        return int(self.coupling.shape[1])

    @property
    def end(self) -> int:
        """The row of the panel where R begins."""
        return self.locked + self.order

    @property
    def basis(self) -> Tensor:
        """V, a view (k, n) of the panel."""
        return self._panel[self.locked : self.end]

    @property
    def residual_block(self) -> Tensor:
        """R, a view (p, n) of the panel."""
        return self._panel[self.end : self.end + self.width]

    @property
    def full(self) -> bool:
        """Whether there is no room for another block and its products."""
        return self.end + 2 * max(self.width, 1) > len(self._panel)

    @property
    def room(self) -> int:
        """Rows of the panel that are not locked."""
        return len(self._panel) - self.locked

    @property
    def complete(self) -> bool:
        """Whether V spans everything."""
        return self.end == self._operator.size

    @property
    def noise(self) -> float:
        """How far rounding and noise of the products may have moved a Ritz value."""
        return max(RITZ_ROUNDING * self.epsilon * self.scale, NOISE_MULTIPLE * self.recurrence_error)

    def learn_from(self, other: KrylovSpace) -> None:
        """Take over what another space of the same operator has seen of its products."""
        self.scale = max(self.scale, other.scale)
        self.largest = max(self.largest, other.largest)
        self.recurrence_error = max(self.recurrence_error, other.recurrence_error)

    def join(self, count: int) -> Array:
        """Take the ``count`` rows after R into R, and return ``L`` (count, p): what of them is in the new R, ``L R``.

        Their parts in the span of V and R are dropped, and with them vectors that have no other part.
        """
        before = self.width
        self._remove(self._panel[: self.end + before], self._panel[self.end + before : self.end + before + count])
        factor = self._orthonormalize(self._panel[self.end : self.end + before + count], tolerance=None)
        self.coupling = self.coupling @ factor[:before]
        return factor[before:]

    def join_random(self, count: int, seed: int, first_probe: int) -> Array:
        """Take Gaussian vectors into R, as many as there are dimensions left at most; see :meth:`join`."""
        taken = self.end + self.width
        rows = self._panel[taken : taken + min(count, self._operator.size - taken)]
        if len(rows):
            kernels.fill_probes(rows, seed, first_probe=first_probe, kind="gaussian")
        return self.join(len(rows))

    def expand(self, negligible: float = 0.0) -> None:
        """Take R into V, and its products, made orthogonal, as the next R: reads the basis twice.

        Directions of the next R are dropped where H couples them by no more than ``negligible``, or than rounding.
        """
        width, end = self.width, self.end
        block, products = self.residual_block, self._panel[end + width : end + 2 * width]
        self._multiply(block, products)
        tolerance = max(BREAKDOWN_MULTIPLE * self.epsilon * self.scale, negligible)
        order, before = self.order, self.matrix
        self.matrix = np.zeros((order + width, order + width))
        self.matrix[:order, :order] = before
        self.matrix[:order, order:], self.matrix[order:, :order] = self.coupling, self.coupling.T
        coefficients = self._remove(self._panel[: self.end], products, self._first_coupled, tolerance)
        # The coefficients of rows that H couples are B again, but for noise and what the products lack in symmetry.
        coupled = coefficients[self._first_coupled : end]
        self._note_asymmetry(coupled - self.matrix[self._first_coupled - self.locked : -width, -width:])
        diagonal = coefficients[end:]
        self._note_asymmetry(diagonal - diagonal.T)
        self.matrix[-width:, -width:] = (diagonal + diagonal.T) / 2
        factor = self._orthonormalize(products, tolerance)
        self.coupling = np.concatenate([np.zeros((order, factor.shape[1])), factor])
        self._first_coupled = end

    def ritz(self) -> RitzValues:
        """Return the eigenpairs of T."""
        values, vectors = np.linalg.eigh(self.matrix)
        self.largest = max(self.largest, float(np.abs(values).max(initial=0.0)))
        couplings = vectors.T @ self.coupling
        return RitzValues(values, vectors, couplings, np.linalg.norm(couplings, axis=1))

    def restart(self, ritz: RitzValues, kept: Order) -> None:
        """Replace V by the Ritz vectors that are named, in that order, without a second copy of it."""
        end = self.end
        combine_in_place(ritz.vectors[:, kept].T, self.basis)
        self.matrix = np.diag(ritz.values[kept])
        self.coupling = ritz.couplings[kept]
        move_rows(self._panel, end, self.end, self.width)
        self._first_coupled = self.locked

    def _multiply(self, block: Tensor, products: Tensor) -> None:
        """Multiply, and learn how large products are."""
        result = self._operator.matmat(block, out=products)
        if result is not products:  # an operator of the user's own may have made a panel of its own
            products.copy_(result)
        self.products += len(block)
        largest = float(np.sqrt(np.diagonal(_numbers(kernels.panel_gram(products, products))).max()))
        if not np.isfinite(largest) or (largest < SMALLEST_SCALE and bool(products.any())):
            raise OperatorError(_unusable(products, self._operator))
        self.scale = max(self.scale, largest)

    def _remove(self, basis: Tensor, rows: Tensor, first_coupled: int = 0, tolerance: float = 0.0) -> Array:
        """Make rows orthogonal to a basis, of which those before one have next to no part in them.

        Returns the coefficients (k, b) of what was removed. Rows shorter than the tolerance count as nothing.
        """
        coefficients = np.zeros((len(basis), len(rows)))
        if len(basis) == 0:
            return coefficients
        coefficients[first_coupled:] = _numbers(kernels.panel_gram(basis[first_coupled:], rows))
        part, skipped = coefficients[first_coupled:].copy(), first_coupled
        for _ in range(MOST_SWEEPS):
            overlaps, gram = kernels.panel_project(rows, basis, part, gram_only=skipped)
            part, norms = _numbers(overlaps), np.sqrt(np.diagonal(_numbers(gram)))
            if (np.linalg.norm(part, axis=0) <= ORTHOGONAL * self.epsilon * np.maximum(norms, tolerance)).all():
                break
            coefficients, skipped = coefficients + part, 0
        return coefficients

    def _orthonormalize(self, rows: Tensor, tolerance: float | None) -> Array:
        """Orthonormalize rows that are orthogonal to V, in place; return the factor (b, p) that gives them back."""
        before = np.sqrt(np.diagonal(_numbers(kernels.panel_gram(rows, rows))))
        found = kernels.panel_orthonormalize(rows, tolerance=tolerance)
        factor = _numbers(found.factor)
        if not found.rank or found.weakest >= WEAK * before.max():
            return factor
        # Small directions were magnified, and with them what they had in common with V.
        units = rows[: found.rank]
        self._remove(self._panel[: self.end], units)
        return factor @ _numbers(kernels.panel_orthonormalize(units).factor)

    def _note_asymmetry(self, difference: Array) -> None:
        """Remember how far products are from symmetric; raise an OperatorError if that is not rounding."""
        self.recurrence_error = max(self.recurrence_error, float(np.abs(difference).max(initial=0.0)))
        check_symmetry(self.recurrence_error, self.scale, self.epsilon)


def combine_in_place(transform: Array, panel: Tensor) -> None:
    """Replace the first rows of a panel (k, n) by ``transform`` (r, k) times it, r <= k, a tile at a time."""
    rows = len(transform)
    size = min(TILE_BYTES, int(TILE_SHARE * panel.numel() * panel.element_size()))
    columns = max(size // (max(rows, 1) * panel.element_size()) // 64, 1) * 64
    buffer = kernels.empty_panel(rows, min(columns, panel.shape[1]), panel.dtype, panel.device)
    for begin in range(0, panel.shape[1], columns):
        tile = panel[:, begin : begin + columns]
        combined = buffer[:, : tile.shape[1]]
        kernels.panel_combine(transform, tile, combined)
        tile[:rows].copy_(combined)


def move_rows(panel: Tensor, source: int, target: int, count: int) -> None:
    """Copy rows of a panel to other rows of it, which may overlap."""
    order = range(count) if target < source else range(count - 1, -1, -1)
    for row in order:
        if source != target:
            panel[target + row].copy_(panel[source + row])


def _numbers(matrix: Any) -> Array:
    """Return a small matrix that a kernel gave as an array."""
    return np.asarray(matrix)


def _unusable(products: Tensor, operator: CurvatureOperator) -> str:
    """Return what is wrong with products that are not finite, or too large or too small to be squared."""
    places = (~torch.isfinite(products)).nonzero()
    if len(places) == 0:
        return (
            "the products are too large or too small to be squared in float64; multiply the loss, or the matrix, by a "
            "power of two that brings its curvature near 1"
        )
    row, column = places[0].tolist()
    describe = getattr(operator, "describe", None)
    where = describe(column) if callable(describe) else f"column {column}"
    return (
        f"the product of vector {row} is {float(products[row, column])} at {where}; wanted finite numbers. "
        "Check weights, data and loss, or use float64"
    )
