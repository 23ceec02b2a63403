"""Scalar Jacobi matrices, and their Gauss and Gauss-Radau rules."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import scipy  # its parts are loaded when they are first used, which takes as long as all the rest

from hesd_fast.lanczos.block_tridiagonal import NOISE_MULTIPLE, Array, BlockTridiagonal

ROUNDING = 8.0
"""Relative rounding allowance of the bounds, in units of the roundoff."""

SMALLEST_ROUNDOFF = 2.0**-26
"""Roundoff below which the allowance does not fall.

Close to a Gauss node the extended matrix has an entry of about ``coupling^2 / distance``, and a double precision
eigensolver then errs by ``2^-52`` times that. At a distance of ``sqrt(2^-52)`` both errors are equal.
"""


@dataclass(frozen=True, eq=False)
class Jacobi:
    """The Jacobi matrix of one probe's spectral measure.

    Attributes
    ----------
    diagonal : ndarray, shape (s,)
        Recurrence coefficients ``alpha_1 ... alpha_s``.
    offdiagonal : ndarray, shape (s,)
        ``beta_1 ... beta_s``; the last couples to the step that was not taken, and is 0 when the measure has only ``s``
        points.
    scale : float
        A bound of the order of ``||H||``, which rounding allowances are relative to.
    rounding : float
        Relative rounding allowance: of node positions in units of ``scale``, and of the unit probe vector.
    """

    diagonal: Array
    offdiagonal: Array
    scale: float
    rounding: float

    @property
    def position(self) -> float:
        """How far a node may be from where exact arithmetic puts it."""
        return self.rounding * self.scale

    def reflected(self) -> Jacobi:
        """Return the Jacobi matrix of the measure of ``-H``."""
        return Jacobi(-self.diagonal, self.offdiagonal, self.scale, self.rounding)

    def gauss(self) -> tuple[Array, Array, Array]:
        """Return the ``s`` Gauss nodes, their weights, and the residual norms of the nodes, each of shape (s,)."""
        values, vectors = _eigen(self.diagonal, self.offdiagonal[:-1])
        return values, vectors[0] ** 2, self.offdiagonal[-1] * np.abs(vectors[-1])

    def radau(self, points: Array) -> tuple[Array, Array]:
        """Return, for each point, the nodes and weights of the rule with ``s + 1`` nodes of which the point is one.

        Each rule has all the moments ``0 ... 2s`` of the measure. A point closer to a Gauss node than the rounding
        allowance is moved by less than that allowance. Shapes are ``(points, s + 1)``; costs one symmetric
        eigenproblem of order ``s + 1`` per point.

        References
        ----------
        Golub, *Some modified matrix eigenvalue problems*, SIAM Review 15(2), 1973, section 7.
        """
        order = self.diagonal.size + 1
        if self.offdiagonal[-1] == 0.0:  # the Gauss rule is the measure; the point joins it with no weight
            values, masses, _ = self.gauss()
            nodes = np.column_stack((np.tile(values, (points.size, 1)), points))
            weights = np.tile(np.append(masses, 0.0), (points.size, 1))
            ascending = np.argsort(nodes, axis=1)
            return np.take_along_axis(nodes, ascending, axis=1), np.take_along_axis(weights, ascending, axis=1)
        pivot = _keep_away_from_zero(self._last_pivot(points), self.position / 2)
        last = points + self.offdiagonal[-1] ** 2 / pivot
        nodes, weights = np.empty((points.size, order)), np.empty((points.size, order))
        for point, entry in enumerate(last):
            values, vectors = _eigen(np.append(self.diagonal, entry), self.offdiagonal)
            nodes[point], weights[point] = values, vectors[0] ** 2
        return nodes, weights

    def _last_pivot(self, points: Array) -> Array:
        """Return ``1 / (e_s^T (J - x I)^{-1} e_s)``, the last pivot of the factorization of ``J - x I``."""
        # The least pivot keeps the next one finite; it moves a node by far less than rounding (as in Sturm counts).
        least = np.finfo(np.float64).tiny * max(1.0, float((self.offdiagonal**2).max()))
        pivot: Array = self.diagonal[0] - points
        for alpha, beta in zip(self.diagonal[1:], self.offdiagonal[:-1], strict=True):
            pivot = alpha - points - beta**2 / _keep_away_from_zero(pivot, least)
        return pivot

    def power_norm(self) -> tuple[float, float]:
        """Return ``q`` and ``(integral of |x|^q)^(1/q)`` for the largest order ``q`` known, exact up to rounding.

        The order is ``2s``. It is infinite, and the norm is ``max |node|``, when the measure has only ``s`` points.
        """
        if self.offdiagonal[-1] == 0.0:
            return math.inf, float(np.abs(self.gauss()[0]).max()) + self.position
        steps = self.diagonal.size
        diagonal = np.append(self.diagonal, 0.0) / self.scale  # its last entry, which is unknown, is never reached
        offdiagonal = self.offdiagonal / self.scale
        vector = np.zeros(steps + 1)
        vector[0] = 1.0
        for _ in range(steps):
            product = diagonal * vector
            product[:-1] += offdiagonal * vector[1:]
            product[1:] += offdiagonal * vector[:-1]
            vector = product
        return 2.0 * steps, float(self.scale * np.linalg.norm(vector) ** (1.0 / steps))


def jacobi_of_probe(tridiagonal: BlockTridiagonal, matrix: Array, probe: int) -> Jacobi:
    """Return the Jacobi matrix of one probe's spectral measure, by Lanczos on the small matrix ``T``.

    Takes at most ``m`` steps, because ``T`` has the probe's moments only up to ``2m``: the ``m`` diagonal and ``m - 1``
    inner coefficients need the moments up to ``2m - 1``, and the last coupling, which needs moment ``2m``, takes
    ``C_{m-1}`` as well. After a breakdown ``T`` has all moments, and the recurrence goes on to its own end. Fully
    reorthogonalized, in double precision. Costs one product with ``T`` per step.

    Parameters
    ----------
    tridiagonal : BlockTridiagonal
        The block tridiagonal matrix.
    matrix : ndarray, shape (k, k)
        Its dense form, ``tridiagonal.matrix()``, made once for all probes.
    probe : int
        Which row of ``tridiagonal.start`` to start from.

    References
    ----------
    Golub and Meurant, 2010, sections 4.1 and 7.3.
    """
    order = matrix.shape[0]
    coupling = tridiagonal.offdiagonal[-1]
    scale = float(np.abs(matrix).sum(axis=1).max()) + (float(np.linalg.norm(coupling, 2)) if coupling.size else 0.0)
    negligible = 32.0 * order * np.finfo(np.float64).eps * scale
    start = tridiagonal.start[probe]
    vector = np.zeros(order)
    vector[: start.size] = start / np.linalg.norm(start)
    steps = order if tridiagonal.breakdown else tridiagonal.steps
    basis = np.empty((steps, order))
    alphas: list[float] = []
    betas: list[float] = []
    for step in range(steps):
        basis[step] = vector
        product = matrix @ vector
        alphas.append(float(vector @ product))
        for _ in range(2):  # twice is enough
            product -= basis[: step + 1].T @ (basis[: step + 1] @ product)
        beta = float(np.linalg.norm(product))
        if step + 1 == steps:
            beta = float(np.hypot(beta, np.linalg.norm(coupling.T @ vector[-coupling.shape[0] :])))
        betas.append(beta if beta > negligible else 0.0)
        if betas[-1] == 0.0:
            break
        vector = product / beta
    rounding = ROUNDING * max(tridiagonal.epsilon, SMALLEST_ROUNDOFF)
    if scale > 0.0:
        rounding = max(rounding, NOISE_MULTIPLE * (tridiagonal.recurrence_error or 0.0) / scale)
    return Jacobi(np.array(alphas), np.array(betas), scale, rounding)


def _keep_away_from_zero(values: Array, least: float) -> Array:
    return np.asarray(np.where(np.abs(values) < least, np.copysign(least, values), values))


def _eigen(diagonal: Array, offdiagonal: Array) -> tuple[Array, Array]:
    """Return eigenvalues and eigenvectors of a symmetric tridiagonal matrix, in ``O(s^2)``.

    This driver calls no threaded BLAS. For many small matrices, threads cost far more than they bring. It gives up on
    some matrices with many nearly equal eigenvalues, as ghost copies are; QR iteration does not.
    """
    try:
        values, vectors = scipy.linalg.eigh_tridiagonal(diagonal, offdiagonal, lapack_driver="stemr")
    except np.linalg.LinAlgError:
        values, vectors = scipy.linalg.eigh_tridiagonal(diagonal, offdiagonal, lapack_driver="stev")
    return np.asarray(values, dtype=np.float64), np.asarray(vectors, dtype=np.float64)
