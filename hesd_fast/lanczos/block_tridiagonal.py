"""The block tridiagonal matrix that block Lanczos leaves behind, and its Ritz values."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from hesd_fast.engine import _engine
from hesd_fast.errors import CheckpointError, ProblemError
from hesd_fast.estimate import Estimate, ProductError
from hesd_fast.records import read_record

Array: TypeAlias = npt.NDArray[np.float64]

ORTHOGONAL_MODES = ("full", "partial")
"""Reorthogonalization modes that keep the whole basis orthogonal."""

RITZ_ROUNDING = 16.0
"""Rounding allowance of a Ritz value, in units of ``epsilon * max|Ritz value|``."""

SOLVER_ROUNDING = 8.0
"""The same for the eigenvalue problem of order ``k``, in units of ``2^-52 * sqrt(k) * max|Ritz value|``.

About ``k`` rotations act on each entry; independent rounding errors add up like the square root of their number. Runs
with known spectra were off by up to ``2 sqrt(k)``, those with many copies of converged Ritz values most.
"""

NOISE_MULTIPLE = 8.0
"""Allowance of a Ritz value for the noise of the products, in units of the measured recurrence error.

The recurrence error is the largest of many entries of a perturbation; its norm is larger by a factor that was below 8
in float32 products of trained networks.
"""


@dataclass(frozen=True, eq=False)
class BlockTridiagonal:
    """The matrix ``T = Q H Q^T`` of ``m`` block Lanczos steps, with all that is needed to judge it.

    The probes are the rows of ``Z = L_0 Q_0``, the rows of ``Q_j`` are orthonormal, and

        ``H Q_j = C_{j-1}^T Q_{j-1} + A_j Q_j + C_j Q_{j+1}``   (each ``Q_j`` read as a set of row vectors).

    Blocks may shrink from one step to the next (deflation), never grow.

    Attributes
    ----------
    size : int
        Order ``n`` of ``H``.
    start : ndarray, shape (b, p_0)
        ``L_0``; ``b`` probes, of which ``p_0`` are linearly independent.
    diagonal : tuple of m ndarrays
        ``A_0 ... A_{m-1}``; ``A_j`` is symmetric of order ``p_j``.
    offdiagonal : tuple of m ndarrays
        ``C_0 ... C_{m-1}``; ``C_j`` has shape ``(p_j, p_{j+1})``. The last one couples to the block that was not
        taken; it has no columns when the Krylov space is invariant.
    epsilon : float
        Unit roundoff of the coarsest arithmetic that the products and the recurrence worked in, such as ``2**-23``.
    reorthogonalization : str
        The mode that made this matrix. Only ``"full"`` and ``"partial"`` make the bounds derived from it rigorous.
    products : int
        Number of Hessian-vector products spent.
    orthogonality : float or None
        Measured ``max |Q Q^T - I|``, or None when it was not measured.
    breakdown : bool
        Whether the Krylov space became invariant, so that all results are exact up to rounding.
    probe_kind : str
        ``"sphere"``, ``"gaussian"`` or ``"rademacher"`` for random probes. Any other word means vectors that somebody
        chose; then no sampling error is attached to anything.
    recurrence_error : float or None
        Largest deviation of the measured projections ``Q H Q^T`` from a symmetric block tridiagonal matrix, in the
        units of ``H``: the noise and asymmetry of the Hessian products. None when it was not measured.
    product_error : ProductError or None
        How far the eigenvalues of the matrix that was multiplied may be from those that exact products would show. None
        when products were not compared with others in a wider precision.
    basis_dtype, basis_place : str or None
        What the basis was kept in (``"float32"``) and where (``"memory"`` or ``"disk"``); None when not known.
    basis_vectors_read : int or None
        How many vectors of the basis its projections read, each reading counted.

    Raises
    ------
    ProblemError
        If there is no step, a shape does not fit, a block grows, a diagonal block is not symmetric, or a number is not
        finite.

    References
    ----------
    Golub and Meurant, *Matrices, Moments and Quadrature with Applications*, Princeton 2010, section 4.7.

    Examples
    --------
    >>> import torch, hesd_fast as hesd
    >>> run = hesd.block_lanczos(torch.diag(torch.arange(1.0, 7.0)), steps=3, block_size=2)
    >>> run.block_sizes, run.matrix().shape, run.products
    ((2, 2, 2), (6, 6), 6)
    >>> [round(eigenvalue.value, 4) for eigenvalue in run.top(2)]
    [6.0, 5.0]
    """

    size: int
    start: Array
    diagonal: tuple[Array, ...]
    offdiagonal: tuple[Array, ...]
    epsilon: float
    reorthogonalization: str
    products: int
    orthogonality: float | None
    breakdown: bool
    probe_kind: str = "rademacher"
    recurrence_error: float | None = None
    product_error: ProductError | None = None
    basis_dtype: str | None = None
    basis_place: str | None = None
    basis_vectors_read: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "start", _frozen(self.start))
        object.__setattr__(self, "diagonal", tuple(_frozen(block) for block in self.diagonal))
        object.__setattr__(self, "offdiagonal", tuple(_frozen(block) for block in self.offdiagonal))
        self._validate()
        object.__setattr__(self, "diagonal", tuple(_frozen((a + a.T) / 2) for a in self.diagonal))

    def _validate(self) -> None:
        if not self.diagonal or len(self.diagonal) != len(self.offdiagonal):
            raise ProblemError(
                f"a block tridiagonal matrix needs at least one step and as many off-diagonal as diagonal blocks, got "
                f"{len(self.diagonal)} diagonal and {len(self.offdiagonal)} off-diagonal blocks; take a Lanczos step"
            )
        if self.start.ndim != 2 or 0 in self.start.shape or self.start.shape[1] > self.start.shape[0]:
            raise ProblemError(
                f"start must have shape (b, p_0) with b >= p_0 >= 1, got {self.start.shape}; pass L_0 of Z = L_0 Q_0"
            )
        rows = self.start.shape[1]
        for step, (a, c) in enumerate(zip(self.diagonal, self.offdiagonal, strict=True)):
            if rows == 0 or a.shape != (rows, rows) or c.ndim != 2 or c.shape[0] != rows or c.shape[1] > rows:
                raise ProblemError(
                    f"step {step} has a diagonal block of shape {a.shape} and an off-diagonal block of shape "
                    f"{c.shape}, wanted ({rows}, {rows}) and ({rows}, at most {rows}) with {rows} >= 1; "
                    "check the block sizes"
                )
            rows = c.shape[1]
        for name, blocks in (("start", (self.start,)), ("diagonal", self.diagonal), ("offdiagonal", self.offdiagonal)):
            if not all(np.isfinite(block).all() for block in blocks):
                raise ProblemError(f"{name} holds a number that is not finite; check the Hessian products")
        if not 0.0 < self.epsilon < 1.0:
            raise ProblemError(f"epsilon must be a unit roundoff in (0, 1), got {self.epsilon!r}; pass 2**-23 for fp32")
        if self.reorthogonalization in ORTHOGONAL_MODES and sum(self.block_sizes) > self.size:
            raise ProblemError(f"{sum(self.block_sizes)} basis vectors do not fit into size={self.size}; check size")
        for name in ("products", "orthogonality", "recurrence_error", "basis_vectors_read"):
            value = getattr(self, name)
            if value is not None and not 0.0 <= value < math.inf:
                raise ProblemError(f"{name} must be finite and not negative, got {value!r}; it counts or measures")
        if self.breakdown != (self.offdiagonal[-1].shape[1] == 0):
            raise ProblemError(
                f"breakdown={self.breakdown} contradicts a last coupling of shape {self.offdiagonal[-1].shape}; "
                "a breakdown leaves a coupling without columns"
            )
        for step, a in enumerate(self.diagonal):
            asymmetry = float(np.abs(a - a.T).max())
            if asymmetry > math.sqrt(self.epsilon) * float(np.abs(a).max()):
                raise ProblemError(
                    f"the diagonal block of step {step} is asymmetric by {asymmetry:.3g}, more than sqrt(epsilon) of "
                    "its largest entry; the operator must be one fixed symmetric matrix"
                )

    @property
    def probes(self) -> int:
        """Number of probes ``b``."""
        return int(self.start.shape[0])

    @property
    def steps(self) -> int:
        """Number of block steps ``m``."""
        return len(self.diagonal)

    @property
    def block_sizes(self) -> tuple[int, ...]:
        """The sizes ``p_0 ... p_{m-1}`` of the blocks that were taken."""
        return tuple(int(a.shape[0]) for a in self.diagonal)

    @property
    def knows_all(self) -> bool:
        """Whether the basis is orthogonal and spans the whole space, so that the Ritz values are all eigenvalues."""
        is_orthogonal = self.reorthogonalization in ORTHOGONAL_MODES or self.steps == 1
        return is_orthogonal and sum(self.block_sizes) == self.size

    def matrix(self) -> Array:
        """Return the dense symmetric ``T``, shape ``(k, k)`` with ``k`` the sum of the block sizes."""
        ends = np.cumsum((0, *self.block_sizes))
        dense = np.zeros((int(ends[-1]), int(ends[-1])))
        for step, a in enumerate(self.diagonal):
            here = slice(ends[step], ends[step + 1])
            dense[here, here] = a
            if step + 1 < self.steps:
                following = slice(ends[step + 1], ends[step + 2])
                dense[here, following] = self.offdiagonal[step]
                dense[following, here] = self.offdiagonal[step].T
        return dense

    @property
    def norm_bound(self) -> float:
        """The largest sum of magnitudes in a row of ``T``, and the norm of the last coupling: never below ``||T||``."""
        above = [np.zeros(self.block_sizes[0]), *(np.abs(c).sum(axis=0) for c in self.offdiagonal[:-1])]
        below = [*(np.abs(c).sum(axis=1) for c in self.offdiagonal[:-1]), np.zeros(self.block_sizes[-1])]
        rows = [np.abs(a).sum(axis=1) + u + v for a, u, v in zip(self.diagonal, above, below, strict=True)]
        last = self.offdiagonal[-1]
        return max(float(row.max()) for row in rows) + (float(np.linalg.norm(last, 2)) if last.size else 0.0)

    def truncated(self, steps: int) -> BlockTridiagonal:
        """Return what block Lanczos would have left after its first ``steps`` steps; exact.

        Raises
        ------
        ProblemError
            If ``steps`` is not in ``1 ... m``.
        """
        steps = self._checked_steps(steps)
        return replace(
            self,
            diagonal=self.diagonal[:steps],
            offdiagonal=self.offdiagonal[:steps],
            products=min(self.products, sum(self.block_sizes[:steps])),
            breakdown=self.breakdown and steps == self.steps,
        )

    @cached_property
    def _band(self) -> tuple[int, Array, Array]:
        """``T / 2^e`` as the engine wants band matrices, ``e``, and ``C_{m-1} / 2^e``, all in another basis.

        Blocks ``U_j`` with ``U_0 = I`` make each ``U_j^T C_j U_{j+1}`` triangular, which halves the bandwidth. The
        leading rows are those of fewer steps.
        """
        largest = max(float(np.abs(block).max(initial=0.0)) for block in (*self.diagonal, *self.offdiagonal))
        exponent = math.frexp(largest)[1]
        width = max(self.block_sizes)
        band = np.zeros((sum(self.block_sizes), width + 1))
        basis, coupling, row = np.eye(self.block_sizes[0]), np.empty((0, self.block_sizes[0])), 0
        for a, c in zip(self.diagonal, self.offdiagonal, strict=True):
            # the rows of T that begin in this block: what couples it to the block before, and its lower triangle
            rows = np.ldexp(np.concatenate((coupling.T, basis.T @ a @ basis), axis=1), -exponent)
            for i, values in enumerate(rows):
                length = min(coupling.shape[0] + i, width) + 1
                end = coupling.shape[0] + i + 1
                band[row + i, width + 1 - length :] = values[end - length : end]
            row += len(rows)
            coupling = basis.T @ c
            if width > 1 and row < len(band):
                basis, triangle = np.linalg.qr(coupling.T)
                coupling = triangle.T
            else:
                basis = np.eye(c.shape[1])
        return exponent, band, np.ldexp(coupling, -exponent)

    def _checked_steps(self, steps: int) -> int:
        if not 1 <= steps <= self.steps:
            raise ProblemError(f"steps must be between 1 and {self.steps}, got {steps}; nothing longer was computed")
        return steps

    def noise(self, largest: float) -> float:
        """Return how far rounding and noise may have moved a Ritz value, ``largest`` being the largest magnitude."""
        return max(self.rounding * largest, NOISE_MULTIPLE * (self.recurrence_error or 0.0))

    @property
    def rounding(self) -> float:
        """Rounding allowance of a Ritz value, relative to the largest magnitude: of the run and of the solver."""
        return max(RITZ_ROUNDING * self.epsilon, SOLVER_ROUNDING * 2.0**-52 * math.sqrt(sum(self.block_sizes)))

    @property
    def shift(self) -> ProductError:
        """The error of the products; zero where it is not known."""
        return self.product_error or ProductError(0.0, 0.0, 0.0)

    def ritz(self) -> tuple[Array, Array, Array]:
        """Return Ritz values (k,) in ascending order, the eigenvectors of ``T`` (k, k) as columns, residual norms (k,).

        Some eigenvalue of ``H`` lies within the residual norm of each Ritz value. The norm is
        ``||C_{m-1}^T E_m^T s_i||`` plus `noise`, so it does not fall to zero at a breakdown. Costs one dense symmetric
        eigenproblem of order ``k``.

        References
        ----------
        Golub and Meurant, 2010, section 4.7; Parlett, *The Symmetric Eigenvalue Problem*, SIAM 1998, theorem 4.5.1.
        """
        values, vectors = np.linalg.eigh(self.matrix())
        coupling = self.offdiagonal[-1]
        return values, vectors, self.residual_norms(values, vectors[-coupling.shape[0] :].T @ coupling)

    def residual_norms(self, values: Array, couplings: Array) -> Array:
        """Return the residual norms (k,) of Ritz values that couple like that to the next step, noise included."""
        return np.asarray(np.linalg.norm(couplings, axis=1) + self.noise(self.scale(values)))

    def scale(self, values: Array) -> float:
        """Return a bound of the order of ``||H||``, given the Ritz values.

        These may cancel where the products do not: one step from a probe with ``z^T H z = 0``.
        """
        coupling = self.offdiagonal[-1]
        return max(float(np.abs(values).max()), float(np.linalg.norm(coupling, 2)) if coupling.size else 0.0)

    def ritz_ends(self) -> tuple[Array, Array, Array]:
        """Return Ritz values (k,), ``L_0 E_1^T S`` of shape (b, k), and ``S^T E_m C_{m-1}`` of shape (k, p_m).

        That is all that quadrature needs of the eigenvectors ``S``: what each probe sees of each Ritz vector, and how
        each Ritz vector couples to the step that was not taken. With ``w`` the block size, about ``6 k^2 w`` operations
        for a tridiagonal matrix with the same eigenvalues, and ``16 k^2 w`` for these; `ritz` takes ``9 k^3``.
        """
        exponent, _, coupling = self._band
        values, ends = self._ends(self.steps, coupling)
        return values, ends[:, : self.probes].T, np.ldexp(ends[:, self.probes :], exponent)

    def quadrature(self, steps: int | None = None) -> tuple[Array, Array]:
        """Return the nodes (k,) and, for each probe, the weights (b, k) of the Gauss rule of the first ``steps`` steps.

        Those of `SpectralMeasure.from_tridiagonal(tridiagonal.truncated(steps))`, for less. All steps by default.

        Raises
        ------
        ProblemError
            If ``steps`` is not in ``1 ... m``.
        """
        steps = self._checked_steps(self.steps if steps is None else steps)
        values, ends = self._ends(steps, np.empty((self.block_sizes[steps - 1], 0)))
        seen = ends.T**2
        return values, seen / seen.sum(axis=1, keepdims=True)

    def _ends(self, steps: int, coupling: Array) -> tuple[Array, Array]:
        """Return the Ritz values of ``steps`` steps in ascending order, and ``S^T [E_1 L_0^T, E_m coupling]``."""
        exponent, band, _ = self._band
        order = sum(self.block_sizes[:steps])
        rows = np.zeros((order, self.probes + coupling.shape[1]))
        rows[: self.start.shape[1], : self.probes] = self.start.T
        rows[order - coupling.shape[0] :, self.probes :] = coupling
        diagonal, offdiagonal, rows = _engine.tridiagonalize_band(band[:order], rows)
        values, ends = _engine.tridiagonal_eigenvalues(diagonal[None], offdiagonal[None], rows[None])
        ascending = np.argsort(values[0], kind="stable")
        return np.ldexp(values[0, ascending], exponent), ends[0, ascending]

    def top(self, k: int, which: str = "largest") -> tuple[Estimate, ...]:
        """Return the ``k`` largest Ritz values in descending order, or the smallest in ascending order.

        Each interval, the Ritz value plus and minus its residual norm, certainly holds an eigenvalue of ``H``. What is
        certain beyond that, and what is not:

        - The i-th largest eigenvalue is not below the i-th Ritz value less the noise (Cauchy's interlacing theorem);
          the i-th smallest not above it plus the noise.
        - An eigenvalue that the probes have missed may lie between two of the values, or beyond the first; only
          `SpectralMeasure.lambda_max` and `lambda_min` say how far beyond.
        - An eigenvalue of multiplicity ``q`` shows at most ``b`` times, so fewer than ``q`` times with fewer probes.
        - Intervals that overlap may hold the same eigenvalue.

        Residual norms include the noise of the products, which is measured on the run and allowed for with a margin,
        see `noise`; it is not a bound. Intervals also include their error in a wider precision, where that is known.
        Costs what `ritz_ends` does.

        Parameters
        ----------
        k : int
            How many, at most the number of Ritz values, which is the sum of the block sizes.
        which : {"largest", "smallest"}
            From which end of the spectrum.

        Raises
        ------
        ProblemError
            If ``k`` or ``which`` is not one of these, or the basis was not kept orthogonal, so that copies of one
            eigenvalue would count as several.

        References
        ----------
        Parlett, *The Symmetric Eigenvalue Problem*, SIAM 1998, theorems 4.5.1 and 10.1.1.
        """
        self._check_top(k, which)
        values, _, couplings = self.ritz_ends()
        residuals = self.residual_norms(values, couplings)
        order = slice(None, None, -1) if which == "largest" else slice(None)
        pairs = zip(values[order][:k].tolist(), residuals[order][:k].tolist(), strict=True)
        shift, method = self.shift.largest, "residual norm and noise"
        return tuple(Estimate(value, value - error - shift, value + error + shift, method) for value, error in pairs)

    def _check_top(self, k: Any, which: Any) -> None:
        found = sum(self.block_sizes)
        if isinstance(k, bool) or not isinstance(k, (int, np.integer)) or k < 1:
            raise ProblemError(f"k is {k!r}; wanted a positive integer, how many eigenvalues to return")
        if k > found:
            raise ProblemError(
                f"k is {k}, and the run has {found} Ritz values; ask for fewer, or take more steps or probes"
            )
        if which not in ("largest", "smallest"):
            raise ProblemError(f"which is {which!r}; wanted 'largest' or 'smallest'")
        if self.reorthogonalization not in ORTHOGONAL_MODES:
            raise ProblemError(
                f"the run had reorthogonalization={self.reorthogonalization!r}, where copies of an eigenvalue appear "
                "that would count as several; run it again with 'full' or 'partial'"
            )

    def to_dict(self) -> dict[str, Any]:
        """Return a dictionary that JSON can hold; numbers come back bit for bit."""
        return {
            "size": int(self.size),
            "start": self.start.tolist(),
            "diagonal": [block.tolist() for block in self.diagonal],
            "offdiagonal": [block.tolist() for block in self.offdiagonal],
            "epsilon": float(self.epsilon),
            "reorthogonalization": self.reorthogonalization,
            "products": int(self.products),
            "orthogonality": None if self.orthogonality is None else float(self.orthogonality),
            "breakdown": bool(self.breakdown),
            "probe_kind": self.probe_kind,
            "recurrence_error": None if self.recurrence_error is None else float(self.recurrence_error),
            "product_error": None if self.product_error is None else asdict(self.product_error),
            "basis_dtype": self.basis_dtype,
            "basis_place": self.basis_place,
            "basis_vectors_read": None if self.basis_vectors_read is None else int(self.basis_vectors_read),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> BlockTridiagonal:
        """Return the matrix that `to_dict` wrote.

        Raises
        ------
        CheckpointError
            If an entry, which is named, is missing, unknown or of another kind, or they describe no block tridiagonal
            matrix.
        """
        try:
            matrix = read_record(cls, data)
            check_symmetric(matrix, data["diagonal"])
            return matrix
        except CheckpointError as error:
            raise CheckpointError(f"this is not a saved block tridiagonal matrix: {error}; save it again") from error


def check_symmetric(matrix: BlockTridiagonal, written: Any, where: str = "diagonal") -> None:
    """Raise a CheckpointError unless the diagonal blocks are exactly those written; the class makes them symmetric."""
    for step, (block, rows) in enumerate(zip(matrix.diagonal, written, strict=True)):
        if block.tolist() != [list(row) for row in rows]:
            raise CheckpointError(f"{where}[{step}] is not symmetric, as every diagonal block is that was saved")


def _frozen(array: npt.ArrayLike) -> Array:
    copy = np.array(array, dtype=np.float64)
    copy.flags.writeable = False
    return copy
