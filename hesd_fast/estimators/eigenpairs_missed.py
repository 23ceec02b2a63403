"""What random vectors say of eigenvalues that a search for eigenpairs has not found."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from enum import Enum, auto

import numpy as np
import numpy.typing as npt
import scipy

from hesd_fast.estimators.thick_restart import Order, RitzValues
from hesd_fast.lanczos.block_tridiagonal import Array
from hesd_fast.spectrum.extreme_eigenvalues import HIDING_RISK

__all__ = ["HIDING_RISK", "End", "HiddenMass", "Look", "Outcome"]

OUTER = np.geomspace(1e-14, 4.0, 60)
"""Distances beyond the limit, in units of the largest ``|Ritz value|``, of what is tried where the limit fails."""

INNER = 32
"""How many numbers between the limit and the next Ritz value are tried, the limit included."""

FAR = 0.1
"""Residual norm, in units of the distance from the limit, from which a Ritz vector is far from an eigenvector."""


class HiddenMass:
    """How much of random vectors can lie in an eigenvector that a restarted Krylov space has not found.

    Let ``u`` be a unit eigenvector with eigenvalue ``x``. From ``H V = T V + B R`` follows
    ``V u = (x - T)^{-1} B R u``, so with the Ritz pairs ``T = S Theta S^T`` what ``u`` has in each row of V is a known
    linear function of ``R u``. After a restart R is among the rows of V; so what it has in the first rows, and in the
    random vectors ``Z = L R`` that the space was begun with, is ``Z u = F(x) R u``, where ``F`` is a product with a
    factor for each cycle. ``|V u|^2 + |R u|^2 <= 1`` bounds ``R u``, hence ``|Z u|^2 <= M(x)``, the squared norm of
    ``F (I + G^T G)^{-1/2}`` with ``G = (x - Theta)^{-1} S^T B`` of the last cycle. For one cycle it is the weight of
    the Gauss-Radau rule with a node at ``x``, as in
    :func:`~hesd_fast.spectrum.extreme_eigenvalues.missed_eigenvalue_distance`.

    Outside of the Ritz values ``M`` falls with the distance. Random vectors seldom see so little of a given ``u``:
    ``|Z u|^2`` of ``b`` Gaussian vectors has a chi-squared distribution with ``b`` degrees of freedom.

    Parameters
    ----------
    start : ndarray (b, p)
        ``L``.
    points : ndarray (q,)
        Where ``M`` is wanted, from the outermost number on inwards; all on one side of the spectrum.
    """

    def __init__(self, start: Array, points: Array) -> None:
        self._points = points
        self._factor = np.broadcast_to(start, (len(points), *start.shape))
        self._first = 0

    def restarted(self, ritz: RitzValues, kept: Order) -> None:
        """Remember a cycle that ends with a restart, which leaves these Ritz vectors before R."""
        self._factor = self._with_cycle(ritz, slice(None))
        self._first = len(kept)

    def _with_cycle(self, ritz: RitzValues, chosen: slice) -> Array:
        """Return ``F`` at some points, for the R of now."""
        factor = self._factor[chosen]
        rows = ritz.vectors[self._first : self._first + factor.shape[2]]
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            inverse = 1.0 / (self._points[chosen, None] - ritz.values)
            return np.asarray(factor @ ((rows * inverse[:, None, :]) @ ritz.couplings))

    def at_points(self, ritz: RitzValues, chosen: slice = slice(None)) -> Array:
        """Return ``M`` at some points; it is infinite at a point on a Ritz value, or where no R is in V yet.

        Costs ``q k b p`` operations for q points, and ``q`` factorizations of order ``p``.
        """
        points = self._points[chosen]
        if len(ritz.values) < self._first + self._factor.shape[2]:
            return np.full(len(points), np.inf)
        factor = self._with_cycle(ritz, chosen)
        unit = np.broadcast_to(np.eye(factor.shape[2]), (len(factor), factor.shape[2], factor.shape[2]))
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            couplings = ritz.couplings / (points[:, None] - ritz.values)[:, :, None]
            finite = np.isfinite(factor).all(axis=(1, 2)) & np.isfinite(couplings).all(axis=(1, 2))
            triangle: Array = np.asarray(
                np.linalg.qr(np.concatenate([unit[finite], couplings[finite]], axis=1), mode="r")
            )
            visible = np.linalg.solve(triangle.swapaxes(1, 2), factor[finite].swapaxes(1, 2))
            masses = np.full(len(factor), np.inf)
            masses[finite] = np.linalg.norm(visible, 2, axis=(1, 2)) ** 2
        return masses


class Outcome(Enum):
    """What a look into the complement of a basis has found."""

    NOTHING = auto()
    MISSED = auto()
    UNCLEAR = auto()
    SPENT = auto()


@dataclass(frozen=True, eq=False)
class End:
    """One end of the spectrum, and what a basis of Ritz vectors, ``H V = Theta V + B R``, says of it.

    Attributes
    ----------
    side : float
        1 for the largest eigenvalues, -1 for the smallest.
    limit : float
        Nothing but what was found may lie beyond it.
    values, couplings : ndarray (k,), (k, p)
        ``Theta`` and ``B``.
    count : int
        How many of the first values have been found.
    scale : float
        The largest ``|Ritz value|``.
    """

    side: float
    limit: float
    values: Array
    couplings: Array
    count: int
    scale: float

    def extreme(self, values: Array) -> float:
        """Return the most extreme of some values; infinite, on the far side, if there is none."""
        return self.side * float((self.side * values).max(initial=-np.inf))

    def of_rows(self, rows: int) -> End:
        """Return the same for a basis of the first rows alone; the others belong to the complement."""
        return replace(self, values=self.values[:rows], couplings=self.couplings[:rows])

    def known_rows(self) -> int:
        """Return how many rows there are before the first one, of those not found, that is far from an eigenvector."""
        far = np.linalg.norm(self.couplings, axis=1) > FAR * self.side * (self.limit - self.values)
        far[: self.count] = False
        return int(np.argmax(far)) if far.any() else max(len(far) - 1, self.count)

    def margin(self, rows: int) -> float:
        """Return the room for the eigenvalues of the complement of the first rows.

        It begins at the Ritz values of the other rows and ends where something might lie beyond the limit.
        """
        end = self.of_rows(rows).reaches(np.array([self.limit]))[0]
        return self.side * (float(end) - self.extreme(self.values[rows:]))

    def candidates(self) -> Array:
        """Return numbers that the search may turn out to have missed nothing beyond, the outermost first."""
        outer = self.limit + self.side * self.scale * OUTER
        rest = self.extreme(self.values[self.count :])
        if not np.isfinite(rest):
            rest = self.limit - self.side * self.scale
        return np.concatenate([outer[::-1], np.linspace(self.limit, rest, INNER, endpoint=False)])

    def reaches(self, candidates: Array) -> Array:
        """Return how far the complement may reach so that nothing lies beyond each candidate but what was found.

        Let ``D`` be the complement's part of ``H``, with all its eigenvalues on the near side of a number ``y``, itself
        on the near side of the candidate ``x``. By Haynsworth's inertia theorem ``H`` has as many eigenvalues above
        ``x`` as ``D``, which has none, and the Schur complement ``Theta - x + B R (x - D)^{-1} R^T B^T``, which is at
        most ``Theta - x + B B^T / (x - y)``; and that has as many positive eigenvalues as ``Theta - x`` where ``x - y``
        is at least the largest eigenvalue of ``B^T (x - Theta)^{-1} B``. What was found makes the latter smaller, and
        is left out.

        References
        ----------
        Haynsworth, Linear Algebra and its Applications 1(1), 1968 (inertia).
        """
        distances = self.side * (candidates[:, None] - self.values)
        valid = (distances[:, self.count :] > 0.0).all(axis=1)
        with np.errstate(divide="ignore", invalid="ignore"):
            inverse = np.where(distances > 0.0, 1.0 / distances, 0.0)
        pulls = np.einsum("ki,qk,kj->qij", self.couplings, inverse, self.couplings)
        largest = np.linalg.eigvalsh(pulls)[:, -1] if pulls.shape[1] else np.zeros(len(candidates))
        return np.where(valid, candidates - self.side * np.maximum(largest, 0.0), -self.side * np.inf)


class Look:
    """A look into the complement of a basis, for eigenvalues beyond limits.

    Parameters
    ----------
    ends : sequence of End
        What the basis says of each end of the spectrum.
    risk : float
        At each end, the probability that the random vectors are so unlucky that the bound does not hold.
    """

    def __init__(self, ends: Sequence[End], risk: float) -> None:
        self._ends = ends
        self._risk = risk
        self._candidates = [end.candidates() for end in ends]
        self._reaches = [end.reaches(x) for end, x in zip(ends, self._candidates, strict=True)]
        self._masses: list[HiddenMass] = []
        self._least = 0.0

    def begin(self, start: Array) -> None:
        """Take note of ``L``, shape (b, p), with ``L R`` the random vectors in the complement."""
        self._least = 2.0 * float(scipy.special.gammaincinv(len(start) / 2, self._risk))
        self._masses = [HiddenMass(start, points) for points in self._reaches]

    def restarted(self, ritz: RitzValues, kept: Order) -> None:
        """Take note of a restart."""
        for mass in self._masses:
            mass.restarted(ritz, kept)

    def beyond(self, values: Array) -> Order:
        """Return the positions of the values that are beyond the limit of an end."""
        return np.flatnonzero(np.any([end.side * values > end.side * end.limit for end in self._ends], axis=0))

    def most_extreme(self, values: Array) -> Order:
        """Return the positions of values in ascending order, those next to the ends first."""
        up = np.arange(len(values))
        if len(self._ends) == 1:
            return up[::-1] if self._ends[0].side > 0 else up
        return np.argsort(-np.abs(up - (len(up) - 1) / 2), kind="stable")

    def finds_nothing(self, ritz: RitzValues) -> bool:
        """Whether nothing lies beyond the limits but what was found, but for the risk."""
        return all(bool(known.all()) for known in self._known(ritz, slice(len(OUTER), len(OUTER) + 1)))

    def may_find_nothing(self, ritz: RitzValues) -> bool:
        """Whether going on may tell so, of a complement that has these Ritz values."""
        return all(
            end.side * end.extreme(ritz.values) < end.side * reaches[len(OUTER)]
            for end, reaches in zip(self._ends, self._reaches, strict=True)
        )

    def limits(self, ritz: RitzValues) -> dict[float, float]:
        """Return, for each end of the spectrum, the closest limit beyond which there is nothing but what was found."""
        limits = {}
        for end, candidates, known in zip(self._ends, self._candidates, self._known(ritz, slice(None)), strict=True):
            last = len(known) if known.all() else int(np.argmin(known))
            limits[end.side] = float(candidates[last - 1]) if last else end.side * float("inf")
        return limits

    def _known(self, ritz: RitzValues, chosen: slice) -> Iterator[npt.NDArray[np.bool_]]:
        """Yield, for each end, which of some candidates nothing lies beyond but what was found, but for the risk."""
        for end, reaches, mass in zip(self._ends, self._reaches, self._masses, strict=True):
            ahead = end.side * (reaches[chosen] - end.extreme(ritz.values))
            invariant = ritz.couplings.shape[1] == 0
            yield ahead >= 0.0 if invariant else (ahead > 0.0) & (mass.at_points(ritz, chosen) < self._least)
