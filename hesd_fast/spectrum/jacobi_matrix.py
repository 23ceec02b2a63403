"""Scalar Jacobi matrices, and their Gauss and Gauss-Radau rules."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from hesd_fast.engine import _engine
from hesd_fast.lanczos.block_tridiagonal import NOISE_MULTIPLE, Array
from hesd_fast.spectrum.ritz_pairs import RitzPairs

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
        mirrored = Jacobi(-self.diagonal, self.offdiagonal, self.scale, self.rounding)
        values, first, last = self.eigenvectors
        # the same but for the signs of every other row, so the last entries all keep or all change theirs
        vars(mirrored)["eigenvectors"] = (-values[::-1], first[::-1], last[::-1])
        return mirrored

    @cached_property
    def eigenvectors(self) -> tuple[Array, Array, Array]:
        """The eigenvalues, and the first and the last entries of their unit eigenvectors, each of shape (s,)."""
        ends = np.zeros((1, self.diagonal.size, 2))
        ends[0, 0, 0] = ends[0, -1, 1] = 1.0
        values, ends = _eigen(self.diagonal[None], self.offdiagonal[None], ends)
        return values[0], ends[0, :, 0], ends[0, :, 1]

    def gauss(self) -> tuple[Array, Array, Array]:
        """Return the ``s`` Gauss nodes, their weights, and the residual norms of the nodes, each of shape (s,)."""
        values, first, last = self.eigenvectors
        return values, first**2, self.offdiagonal[-1] * np.abs(last)

    def radau(self, points: Array) -> tuple[Array, Array]:
        """Return, for each point, the nodes and weights of the rule with ``s + 1`` nodes of which the point is one.

        Each rule has all the moments ``0 ... 2s`` of the measure. A point closer to a Gauss node than the rounding
        allowance is moved by less than that allowance. Shapes are ``(points, s + 1)``; costs one tridiagonal
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
        entry = points + self.offdiagonal[-1] ** 2 / _keep_away_from_zero(self._last_pivot(points), self.position / 2)
        diagonal = np.empty((points.size, order))
        diagonal[:, :-1], diagonal[:, -1] = self.diagonal, entry
        offdiagonal = np.zeros((points.size, order))
        offdiagonal[:, :-1] = self.offdiagonal
        first = np.zeros((points.size, order, 1))
        first[:, 0] = 1.0
        nodes, first = _eigen(diagonal, offdiagonal, first)
        return nodes, first[:, :, 0] ** 2

    def _last_pivot(self, points: Array) -> Array:
        """Return ``1 / (e_s^T (J - x I)^{-1} e_s)``, the last pivot of the factorization of ``J - x I``."""
        values, _, last = self.eigenvectors
        distances = _keep_away_from_zero(values - points[:, None], float(np.finfo(np.float64).eps) * self.position)
        inverse = (last**2 / distances).sum(axis=1)
        return np.asarray(1.0 / _keep_away_from_zero(inverse, float(np.finfo(np.float64).tiny)))

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


def jacobi_matrices(ritz: RitzPairs) -> tuple[Jacobi, ...]:
    """Return the Jacobi matrix of each probe's spectral measure, by Lanczos on the Ritz values.

    Takes at most ``m`` steps, because the Ritz values have the probe's moments only up to ``2m``: the ``m`` diagonal
    and ``m - 1`` inner coefficients need the moments up to ``2m - 1``, and the last coupling, which needs moment
    ``2m``, takes ``C_{m-1}`` as well. After a breakdown they have all moments, and the recurrence goes on to its own
    end. By orthogonal transformations, in double precision. Costs ``k m (30 + 6 b)`` operations per probe.

    References
    ----------
    Golub and Meurant, 2010, sections 4.1 and 7.3. Gragg and Harwood, *The numerically stable reconstruction of Jacobi
    matrices from spectral data*, Numer. Math. 44, 1984.
    """
    tridiagonal, order = ritz.tridiagonal, ritz.values.size
    scale = tridiagonal.norm_bound
    exponent = math.frexp(scale)[1]
    seen = ritz.seen / np.abs(ritz.seen).max(axis=1, keepdims=True)
    diagonals, offdiagonals = _engine.jacobi_matrices(
        np.ldexp(ritz.values, -exponent)[None],
        seen / np.linalg.norm(seen, axis=1, keepdims=True),
        np.ldexp(ritz.couplings, -exponent),
        order if tridiagonal.breakdown else tridiagonal.steps,
    )
    rounding = ROUNDING * max(tridiagonal.epsilon, SMALLEST_ROUNDOFF)
    if scale > 0.0:
        rounding = max(rounding, NOISE_MULTIPLE * (tridiagonal.recurrence_error or 0.0) / scale)
    negligible = 32.0 * order * np.finfo(np.float64).eps * scale
    found = []
    for alphas, betas in zip(np.ldexp(diagonals, exponent), np.ldexp(offdiagonals, exponent), strict=True):
        betas[betas <= negligible] = 0.0
        end = int(np.argmin(betas)) + 1 if (betas == 0.0).any() else betas.size
        found.append(Jacobi(alphas[:end], betas[:end], scale, rounding))
    return tuple(found)


def _keep_away_from_zero(values: Array, least: float) -> Array:
    return np.asarray(np.where(np.abs(values) < least, np.copysign(least, values), values))


def _eigen(diagonal: Array, offdiagonal: Array, rows: Array) -> tuple[Array, Array]:
    """Return eigenvalues of many symmetric tridiagonal matrices, ascending, and rows of their eigenvectors, in O(s^2).

    Shapes are (matrices, s) of the diagonals and, their last entries without meaning, of what is beside them, and
    (matrices, s, rows) of the transposed rows.
    """
    exponent = math.frexp(max(float(np.abs(diagonal).max()), float(np.abs(offdiagonal).max())))[1]
    scaled = np.ldexp(diagonal, -exponent), np.ldexp(offdiagonal, -exponent)
    values, rows = _engine.tridiagonal_eigenvalues(*scaled, rows)
    ascending = np.argsort(values, axis=1, kind="stable")
    return (
        np.ldexp(np.take_along_axis(values, ascending, axis=1), exponent),
        np.take_along_axis(rows, ascending[:, :, None], axis=1),
    )
