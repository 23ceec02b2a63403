"""The search for eigenpairs: thick-restart Lanczos until they have converged, then a search for what it has missed."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from hesd_fast.estimators.eigenpairs_missed import HIDING_RISK, End, Look, Outcome
from hesd_fast.estimators.thick_restart import KrylovSpace, Order, RitzValues, move_rows
from hesd_fast.lanczos.block_tridiagonal import Array
from hesd_fast.operators.base import CurvatureOperator

ENDS = ("LA", "SA", "LM", "BE")

SAFETY = 0.8
"""Part of the tolerance that the estimate of a residual norm may take; rounding has the rest."""

NEGLIGIBLE = 0.5
"""Part of the residual norm allowed that vectors from the complement may have left when they join the basis."""

TIGHTER = 0.1
"""Factor of the tolerance where eigenvectors known better would help to find out what is missed."""

CHECKS = 16
"""How often in a cycle convergence is looked at, at most; it takes an eigenproblem of the order of the basis."""

EFFORT = 0.5
"""Products of a look for missed eigenvalues, per product of the search, after which the search had better go on."""

DEGREE = 5.0
"""Half the logarithm of the growth that a look needs: of what random vectors see in a hidden eigenvector, to all."""

ATTEMPTS = 24
"""Looks for missed eigenvalues at most."""

MOST_PROBES = 8
"""Random vectors at most that look for missed eigenvalues at a time."""


@dataclass(frozen=True)
class Wanted:
    """Which eigenvalues are wanted.

    Attributes
    ----------
    count : int
        k.
    which : {"LA", "SA", "LM", "BE"}
        The largest, the smallest, those of largest magnitude, or those of both ends: half of them (one more of the
        largest, if k is odd) from each.
    """

    count: int
    which: str

    def order(self, values: Array) -> Order:
        """Return the positions of values in ascending order, those that are wanted most first."""
        up = np.arange(len(values))
        if self.which == "SA":
            return up
        if self.which == "LM":
            return np.argsort(-np.abs(values), kind="stable")
        if self.which == "LA":
            return up[::-1]
        both = np.empty_like(up)
        both[0::2], both[1::2] = up[::-1][: (len(up) + 1) // 2], up[: len(up) // 2]
        return both

    def limits(self, found: Array, slack: float) -> list[tuple[float, float]]:
        """Return each end of the spectrum (1 or -1), and what no further eigenvalue may lie beyond there."""
        if self.which == "LM":
            least = float(np.abs(found).min()) + slack
            return [(1.0, least), (-1.0, -least)]
        ascending = np.sort(found)
        low = float(ascending[(self.count // 2 if self.which == "BE" else self.count) - 1]) - slack
        high = float(ascending[-((self.count + 1) // 2 if self.which == "BE" else self.count)]) + slack
        ends = {"LA": [(1.0, high)], "SA": [(-1.0, low)], "BE": [(1.0, high), (-1.0, low)]}[self.which]
        return ends if self.count > 1 else ends[:1]


@dataclass(frozen=True)
class SearchSettings:
    """What a search may do.

    Attributes
    ----------
    wanted : Wanted
        What is wanted.
    tolerance : float
        Residual norm, relative to the largest ``|Ritz value|``, at which a pair has converged.
    block_size, kept, max_products, seed : int
        Vectors of a block; Ritz vectors that a restart keeps; products at most; what chooses random vectors.
    check_missed : bool
        Whether to look for eigenvalues that the search has missed.
    """

    wanted: Wanted
    tolerance: float
    block_size: int
    kept: int
    max_products: int
    seed: int
    check_missed: bool


class Search:
    """A search for eigenpairs in a panel of memory; see :func:`hesd_fast.eigsh`.

    Parameters
    ----------
    operator : CurvatureOperator
        Multiplies panels.
    panel : tensor (rows, n)
        Memory of all vectors.
    settings : SearchSettings
        What is searched for, and how.

    Attributes
    ----------
    space : KrylovSpace
        After :meth:`run`, its first vectors are the Ritz vectors that are wanted.
    limits : dict of float to float
        For each end of the spectrum (1, -1) that was looked at, what no eigenvalue that was not found lies beyond.
    complete : bool
        Whether nothing that is wanted was missed, as far as the random vectors tell.
    """

    def __init__(self, operator: CurvatureOperator, panel: Tensor, settings: SearchSettings) -> None:
        self._operator, self._panel, self._settings = operator, panel, settings
        self.space = KrylovSpace(operator, panel)
        self.limits: dict[float, float] = {}
        self.complete = False
        self._spaces = [self.space]
        self._probes = 0
        self._tightness = SAFETY

    @property
    def products(self) -> int:
        """Vectors multiplied so far."""
        return sum(space.products for space in self._spaces)

    @property
    def most_products(self) -> int:
        """Vectors that the search multiplies at most."""
        return self._settings.max_products

    @property
    def _exhausted(self) -> bool:
        return self.products >= self._settings.max_products

    def run(self) -> None:
        """Search until everything wanted is found and nothing is missed, or products are spent."""
        converged = self._converge()
        for attempt in range(ATTEMPTS + 1):
            if not converged or not self._settings.check_missed or self._look_for_missed(attempt):
                return
            converged = self._converge()

    def _random(self, space: KrylovSpace, count: int) -> Array:
        start = space.join_random(count, self._settings.seed, self._probes)
        self._probes += count
        return start

    def _converge(self) -> bool:
        """Go on until the wanted pairs have converged, and leave their Ritz vectors and others as the basis."""
        space, wanted = self.space, self._settings.wanted
        while True:
            ritz = space.ritz()
            order = wanted.order(ritz.values)
            chosen = order[: wanted.count]
            done = space.complete or (len(order) >= wanted.count and self._have_converged(ritz, chosen))
            if done or space.full or self._exhausted:
                space.restart(ritz, order if space.complete else order[: self._settings.kept])
            if done or self._exhausted:
                return bool(done)
            if space.width == 0:
                self._random(space, self._settings.block_size)
            self._expand(space, self._settings.kept)

    def _have_converged(self, ritz: RitzValues, chosen: Order) -> bool:
        return bool((ritz.estimates[chosen] <= self._allowed()).all())

    @property
    def tolerance(self) -> float:
        """The residual norm at which a pair has converged."""
        return self._settings.tolerance * self.space.largest

    def _allowed(self) -> float:
        """Return the estimate of it at which the search is content."""
        return max(self._tightness * self.tolerance, self.space.epsilon * self.space.scale)

    def _expand(self, space: KrylovSpace, kept: int) -> None:
        """Take some blocks into a space, as many as it has room for at most."""
        for _ in range(max(1, (space.room - kept) // (CHECKS * max(space.width, 1)))):
            if space.full or space.width == 0 or self._exhausted:
                return
            space.expand()

    def _look_for_missed(self, attempt: int) -> bool:
        """Look in the complement of the basis for eigenvalues beyond those found; return whether the search is over.

        Where there are any, their vectors join the residual block, and with it the basis.
        """
        space, ends = self.space, self._ends()
        if space.complete:
            self.limits = {end.side: end.extreme(end.values[end.count :]) for end in ends}
            self.complete = True
            return True
        # Ritz vectors that are far from eigenvectors are better left to the complement, and lie aside meanwhile.
        choices = range(self._settings.wanted.count, 1 + min(end.known_rows() for end in ends))
        margins = [min(end.margin(rows) for end in ends) for rows in choices]
        inside = choices[int(np.argmax(margins))]
        if self._had_better_go_on(max(margins)):
            self._go_on(0)
            return self._converge() and self._look_for_missed(attempt)
        aside = space.order - inside + space.width
        room = len(self._panel) - aside
        move_rows(self._panel, inside, room, aside)
        outside = KrylovSpace(self._operator, self._panel[:room], locked=inside)
        outside.learn_from(space)
        self._spaces.append(outside)
        look = Look([end.of_rows(inside) for end in ends], HIDING_RISK / 2 ** (attempt + 1))
        outcome, ritz = self._explore(outside, look, min(2**attempt, MOST_PROBES))
        missed = look.beyond(ritz.values) if outcome is Outcome.MISSED else np.empty(0, dtype=np.intp)
        missed = missed[: min(room - inside - aside, (len(self._panel) - space.order) // 2 - space.width)]
        if len(missed):
            outside.restart(ritz, missed)
            move_rows(self._panel, inside, inside + aside, len(missed))
        move_rows(self._panel, room, inside, aside)
        space.learn_from(outside)
        if outcome in (Outcome.NOTHING, Outcome.SPENT) or attempt == ATTEMPTS:
            self.limits, self.complete = look.limits(ritz), outcome is Outcome.NOTHING
            return True
        self._go_on(len(missed))
        return False

    def _had_better_go_on(self, margin: float) -> bool:
        """Whether eigenvectors known better would make a look for missed ones cheaper than it is now.

        It takes about ``log(|Z|^2 / |Z u|^2) / sqrt(margin / spread)`` products: the polynomial of that degree that is
        largest at the limit and small on the spectrum of the complement is Chebyshev's.
        """
        floor = self.space.epsilon * self.space.scale
        if self._tightness * TIGHTER * self.tolerance < floor:
            return False
        steps = DEGREE * (2.0 * self.space.largest / margin) ** 0.5 if margin > 0.0 else np.inf
        return steps > EFFORT * self.products + 10

    def _ends(self) -> list[End]:
        """Return what the basis, of Ritz vectors, says of the ends of the spectrum."""
        space, wanted = self.space, self._settings.wanted
        values = np.diagonal(space.matrix)
        slack = max(self.tolerance, space.noise)
        limits = wanted.limits(values[: wanted.count], slack)
        return [End(side, limit, values, space.coupling, wanted.count, space.largest) for side, limit in limits]

    def _go_on(self, missed: int) -> None:
        """Take a step with vectors that were missed, or ask for vectors that are known better."""
        space = self.space
        if missed:
            space.join(missed)
        else:
            self._tightness *= TIGHTER
        if space.width == 0:
            self._random(space, self._settings.block_size)
        # What has converged in the complement has next to nothing left, which would make all later blocks wider.
        space.expand(NEGLIGIBLE * self._allowed() if missed else 0.0)

    def _explore(self, outside: KrylovSpace, look: Look, probes: int) -> tuple[Outcome, RitzValues]:
        """Go on in the complement until it is known whether anything is missed."""
        room = outside.room
        look.begin(self._random(outside, min(probes, max(room // 6, 1))))
        while True:
            ritz = outside.ritz()
            missed = look.beyond(ritz.values)
            over = self._exhausted or outside.width == 0
            if len(missed) and (over or (ritz.estimates[missed] <= NEGLIGIBLE * self._allowed()).all()):
                return Outcome.MISSED, ritz
            if len(missed) == 0 and outside.order and look.finds_nothing(ritz):
                return Outcome.NOTHING, ritz
            if self._exhausted:
                return Outcome.SPENT, ritz
            if over or (len(missed) == 0 and outside.order and not look.may_find_nothing(ritz)):
                return Outcome.UNCLEAR, ritz
            if outside.full:
                order = look.most_extreme(ritz.values)[: room // 2]
                look.restarted(ritz, order)
                outside.restart(ritz, order)
            self._expand(outside, room // 2)
