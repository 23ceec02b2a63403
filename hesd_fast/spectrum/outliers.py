"""The eigenvalues that stand apart from the bulk of a spectrum, and their number by a stated rule."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import scipy  # its parts are loaded when they are first used, which takes as long as all the rest

from hesd_fast.estimate import Estimate
from hesd_fast.lanczos.block_tridiagonal import ORTHOGONAL_MODES, Array
from hesd_fast.spectrum.converged_eigenvalues import FEWEST_PROBES
from hesd_fast.spectrum.extreme_eigenvalues import HIDING_RISK, mass_norm
from hesd_fast.spectrum.ritz_pairs import RitzPairs

GAP_RATIO = 2.0
"""How much wider than every gap further in the gap is that separates outliers from the bulk."""

LARGEST_SHARE = 0.1
"""Share of the spectrum, at one of its ends, beyond which eigenvalues are a part of the bulk."""

BESIDE = 100.0
"""Residual norms around an outlier within which nothing is said about a second eigenvalue."""

POINTS = 12
"""Places tried from each end of a gap between outliers."""


@dataclass(frozen=True)
class Outliers:
    """The eigenvalues that stand apart from the bulk.

    Attributes
    ----------
    below, above : tuple of Estimate
        Those below and above the bulk, from the end of the spectrum inwards. Each interval, the Ritz value plus and
        minus its residual norm, certainly holds an eigenvalue.
    number_below, number_above : Estimate
        How many eigenvalues lie there. There are not fewer than the lower end; infinity as the upper end says that
        there may be more.
    bulk : tuple of float
        The smallest and the largest Ritz value of the bulk.

    Examples
    --------
    >>> import hesd_fast as hesd, numpy as np
    >>> matrix = np.diag(np.concatenate((np.linspace(-1.0, 1.0, 96), [2.0, 3.0, 3.2, 7.0])))
    >>> outliers = hesd.SpectralMeasure.from_tridiagonal(hesd.block_lanczos(matrix, steps=15, block_size=4)).outliers
    >>> print(outliers)
    4 above the bulk
    >>> print(*outliers.above)
    7 [7, 7] 3.2 [3.2, 3.2] 3 [3, 3] 2 [2, 2]
    """

    below: tuple[Estimate, ...]
    above: tuple[Estimate, ...]
    number_below: Estimate
    number_above: Estimate
    bulk: tuple[float, float]

    @property
    def ends_of_bulk(self) -> tuple[float, float]:
        """The middles of the gaps on either side of the bulk; infinite where there are no outliers."""
        low, high = self.bulk
        return (
            0.5 * (self.below[-1].value + low) if self.below else -math.inf,
            0.5 * (self.above[-1].value + high) if self.above else math.inf,
        )

    @property
    def all(self) -> tuple[Estimate, ...]:
        """All of them in ascending order."""
        return self.below + self.above[::-1]

    def __str__(self) -> str:
        if math.isnan(self.number_above.value):
            return f"not known: {self.number_above.method}"
        counts = [
            f"{'' if number.high == number.low else 'at least '}{number.value:.0f} {side}"
            for side, number in (("above", self.number_above), ("below", self.number_below))
            if number.value
        ]
        return f"{', '.join(counts)} the bulk" if counts else "none"


def find_outliers(ritz: RitzPairs, beyond: tuple[float, float]) -> Outliers:
    """Return the outliers by this rule, applied to either end of the spectrum.

    Ritz values are taken from the end inwards, up to the middle of the spectrum's weight. The gap after each is the
    distance to the next one, less both residual norms. It is divided by the widest distance of neighbouring Ritz values
    further in. Where that ratio is largest, and at least `GAP_RATIO`, the Ritz values outside the gap are outliers, if
    they are no more than `LARGEST_SHARE` of the spectrum.

    Eigenvalues of random matrices repel each other, so that a gap like this is rare in their bulk. In a bulk of
    independent numbers it is not, and the ends of a heavy tail may count as outliers. Few steps place the nodes of the
    bulk far from each other, and an outlier nearer to it than twice that distance is not seen to be one.

    The number is no less than that of the Ritz values found (Cauchy's interlacing theorem). It is no larger, at a risk
    of 2.5 % for each eigenvalue, where the moments leave no room for another one that the probes have missed, see
    `extreme_eigenvalues.missed_eigenvalue_distance`, and where two probes can tell equal eigenvalues apart.

    Parameters
    ----------
    ritz : RitzPairs
        The Ritz values of a run. Where eigenvalues have copies, nothing is said.
    beyond : tuple of float
        How far below the smallest and above the largest Ritz value an eigenvalue may lie.
    """
    nodes, mode = ritz.values, ritz.tridiagonal.reorthogonalization
    if mode not in ORTHOGONAL_MODES:
        return unknown_outliers(nodes, f"with reorthogonalization={mode!r} eigenvalues have copies")
    shares = ritz.weights.mean(axis=0)
    above = count_beyond_gap(nodes[::-1], ritz.residuals[::-1], shares[::-1], ritz.tridiagonal.size)
    below = count_beyond_gap(-nodes, ritz.residuals, shares, ritz.tridiagonal.size)
    found = [Estimate(v, v - r, v + r, "residual norm and noise") for v, r in zip(nodes, ritz.residuals, strict=True)]
    return Outliers(
        tuple(found[:below]),
        tuple(found[: nodes.size - above - 1 : -1]),
        _number(ritz, -1.0, below, beyond[0]),
        _number(ritz, 1.0, above, beyond[1]),
        (float(nodes[below]), float(nodes[nodes.size - above - 1])),
    )


def unknown_outliers(nodes: Array, reason: str) -> Outliers:
    """Return what is known of outliers where nothing is, and why."""
    number = Estimate(math.nan, 0.0, math.inf, reason)
    return Outliers((), (), number, number, (float(nodes[0]), float(nodes[-1])))


def count_beyond_gap(values: Array, residuals: Array, shares: Array, size: int) -> int:
    """Return how many Ritz values lie outside the gap that ends the bulk, from values in descending order."""
    seen = np.cumsum(shares)
    middle = int(np.searchsorted(seen, 0.5 * seen[-1]))
    distances = values[:middle] - values[1 : middle + 1]
    if middle == 0:
        return 0
    # the widest distance further in than each gap; a bulk of a single place has none
    inner = np.append(np.maximum.accumulate(distances[::-1])[::-1][1:], 0.0)
    gaps = distances - residuals[:middle] - residuals[1 : middle + 1]
    few = np.maximum(seen[:middle], np.arange(1, middle + 1) / size) <= LARGEST_SHARE
    wide = few & (gaps > 0.0) & (gaps >= GAP_RATIO * inner)
    if not wide.any():
        return 0
    with np.errstate(divide="ignore", over="ignore"):
        ratios = np.where(wide, gaps / inner, 0.0)
    return int(np.flatnonzero(ratios == ratios.max())[-1]) + 1


def _number(ritz: RitzPairs, side: float, found: int, beyond: float) -> Estimate:
    """Return how many eigenvalues there are beyond the bulk at the upper (side = 1) or lower end."""
    if not found:
        return Estimate(0.0, 0.0, math.inf, "no gap is wide enough to call what lies beyond it outliers")
    if not ritz.random or ritz.tridiagonal.probes < FEWEST_PROBES:
        return Estimate(
            float(found), float(found), math.inf, "interlacing; fewer than two random probes cannot exclude others"
        )
    if _has_room(ritz, side, found, beyond):
        return Estimate(float(found), float(found), math.inf, "interlacing; the moments leave room for others")
    return Estimate(
        float(found),
        float(found),
        float(found),
        "interlacing, and the moments leave no room for others at a risk of 2.5 %",
    )


def _has_room(ritz: RitzPairs, side: float, found: int, beyond: float) -> bool:
    """Whether an eigenvalue that the probes have missed may lie outside the gap, not beside those found."""
    order = slice(None, None, -1) if side > 0 else slice(None)
    values, residuals = side * ritz.values[order][: found + 1], BESIDE * ritz.residuals[order][:found]
    if beyond > residuals[0] or residuals.max() > 0.25 * (values[found - 1] - values[found]):
        return True
    if ritz.couplings.shape[1] == 0:
        return False
    ends = np.append(values[1:found] + residuals[1:], 0.5 * (values[found - 1] + values[found]))
    free = np.column_stack((ends, values[:found] - residuals))
    low, high = free[free[:, 0] < free[:, 1]].T  # the last is there always, from the middle of the gap
    near = np.geomspace(1e-4, 0.5, POINTS)
    fractions = np.concatenate(([0.0], near, 1.0 - near, [1.0]))
    points = (low[:, None] + (high - low)[:, None] * fractions).ravel()
    # the chi-squared quantile; scipy.stats has it by name, and takes long to import
    needed = 2.0 * float(scipy.special.gammaincinv(ritz.tridiagonal.probes / 2, HIDING_RISK))
    inverses = 1.0 / (ritz.values - side * points[:, None])
    return any(mass_norm((ritz.seen * x) @ ritz.couplings, ritz.couplings * x[:, None]) >= needed for x in inverses)
