"""The tightest bounds that the moments of a probe put on its distribution function and on integrals."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import scipy  # its parts are loaded when they are first used, which takes as long as all the rest

from hesd_fast.lanczos.block_tridiagonal import Array
from hesd_fast.spectrum.jacobi_matrix import Jacobi

HINGE_POINTS = 40
"""Rules tried before the best one is refined, when a hinge is bounded."""

GRID_POINTS = 48
REFINED_NODES = 16


def hinge_bounds(jacobi: Jacobi, threshold: float) -> tuple[float, float]:
    """Return the tightest bounds that the moments ``0 ... 2s`` put on the integral of ``max(x - threshold, 0)``.

    Every rule with ``s + 1`` nodes has all these moments. The rule with a node at the kink gives the least value: the
    polynomial of degree ``2s`` that meets the hinge at the kink and touches it at the other nodes lies below it. The
    greatest value is that of the rule whose polynomial touches the hinge at every node, so lies above it; as all rules
    have the moments, it is the one with the largest value, and is found by maximization over the family. A node that
    moves from the kink to where the rule of the kink has its next node runs through the family once.

    Far tighter than integrating `cdf_bounds`: the hinge is linear but for its kink, and what the distribution does
    elsewhere does not matter. Widened by a rounding allowance. Costs about ``2 * HINGE_POINTS`` eigenproblems of order
    ``s + 1``.

    References
    ----------
    Karlin and Studden, *Tchebycheff Systems*, 1966. After one step the upper bound is that of Scarf, *A min-max
    solution of an inventory problem*, 1958.
    """

    def values(points: Array) -> Array:
        nodes, weights = jacobi.radau(points)
        return np.asarray((weights * np.clip(nodes - threshold, 0.0, None)).sum(axis=1))

    nodes, weights = jacobi.radau(np.array([threshold]))
    low = float(weights[0] @ np.clip(nodes[0] - threshold, 0.0, None))
    beyond = nodes[0][nodes[0] > threshold + jacobi.position]
    # The best node may be close to either end, and arbitrarily far away where the rule of the kink has no next node.
    near = np.geomspace(1e-6, 0.5, HINGE_POINTS // 2)
    if beyond.size:
        points = threshold + (float(beyond[0]) - threshold) * np.concatenate((near, 1.0 - near[-2::-1]))
    else:
        points = threshold + max(jacobi.scale, abs(threshold)) * np.geomspace(1e-6, 1e6, 2 * HINGE_POINTS)
    found = values(points)
    best = int(np.argmax(found))
    left, right = points[max(best - 1, 0)], points[min(best + 1, points.size - 1)]
    refined = scipy.optimize.minimize_scalar(
        lambda share: -float(values(np.array([left + share * (right - left)]))[0]),
        bounds=(0.0, 1.0),
        method="bounded",
        options={"xatol": 1e-5},
    )
    high = max(low, float(found[best]), -float(refined.fun))
    # Nodes move by `position`; a change r of the unit probe z changes z^T f(H) z by 2 r ||f(H) z|| + r^2 ||f(H)||.
    second_moment = math.hypot(float(jacobi.diagonal[0]), float(jacobi.offdiagonal[0]))
    allowance = jacobi.position + 2.0 * jacobi.rounding * second_moment + jacobi.rounding**2 * jacobi.scale
    return max(0.0, low - allowance), high + allowance


@dataclass(frozen=True, eq=False)
class CDFBand:
    """Bounds ``low <= mu((-inf, x)) <= mu((-inf, x]) <= high`` of one probe's measure at increasing points.

    Attributes
    ----------
    points, low, high : ndarray, shape (r,)
        The points and the bounds there; both bounds increase.
    power, power_norm : float
        A moment ``(integral of |x|^power)^(1/power)`` of the measure, which bounds what lies beyond the last point.
    """

    points: Array
    low: Array
    high: Array
    power: float
    power_norm: float

    def reflected(self) -> CDFBand:
        """Return the band of the measure of ``-H``."""
        return CDFBand(-self.points[::-1], 1.0 - self.high[::-1], 1.0 - self.low[::-1], self.power, self.power_norm)

    def tail_moment(self, threshold: float, exponent: float) -> tuple[float, float]:
        """Return bounds of the integral of ``x^exponent`` over ``x > threshold >= 0``.

        With ``G(x) = mu((x, inf))`` the integral is ``t^p G(t) + integral over x > t of G(x) d(x^p)``. ``G`` decreases,
        so left sums over the points bound it from above and right sums from below, whatever the spacing of the points.
        The part beyond the last point ``X`` is at most ``M^p G(X)^(1 - p/q)`` with ``M`` the power norm of order ``q``
        (Hölder). ``exponent`` must not exceed ``q``.
        """
        keep = self.points > threshold
        powers = np.concatenate(([threshold], self.points[keep])) ** exponent
        # Bounds of G at the threshold come from the nearest point on either side of it.
        below = self.points <= threshold
        most = 1.0 - np.concatenate(([self.low[below][-1] if below.any() else 0.0], self.low[keep]))
        above = self.points >= threshold
        least = 1.0 - np.concatenate(([self.high[above][0] if above.any() else 1.0], self.high[keep]))
        cells = np.diff(powers)
        low = powers[0] * least[0] + float(cells @ least[1:])
        high = powers[0] * most[0] + float(cells @ most[:-1])
        beyond = float(self.power_norm**exponent * max(most[-1], 0.0) ** (1.0 - exponent / self.power))
        return low, high + beyond


def cdf_bounds(jacobi: Jacobi, points: Array) -> tuple[Array, Array]:
    """Return the tightest bounds that the moments ``0 ... 2s`` put on ``mu((-inf, x))`` and ``mu((-inf, x])``.

    Each rule with the prescribed node ``x`` gives

        ``sum of weights of nodes < x  <=  mu((-inf, x))  <=  mu((-inf, x])  <=  sum of weights of nodes <= x``,

    widened by the rounding allowances. Shapes are those of ``points``, (r,); costs ``r`` eigenproblems of order
    ``s + 1``.

    References
    ----------
    Chebyshev-Markov-Stieltjes inequalities: Akhiezer, *The Classical Moment Problem*, 1965, section 2.5.
    """
    nodes, weights = jacobi.radau(points)
    below = nodes < points[:, None] - jacobi.position
    up_to = nodes <= points[:, None] + jacobi.position
    return _widen((weights * below).sum(axis=1), (weights * up_to).sum(axis=1), jacobi.rounding)


def cdf_band(jacobi: Jacobi, threshold: float, exponent: float) -> CDFBand:
    """Return a band fit for integrating ``|x|^exponent`` over ``|x| > threshold > 0``.

    A Gauss-Radau rule bounds the distribution at every one of its nodes, not only at the prescribed one, so all nodes
    of all rules are kept. Points are prescribed on a logarithmic grid on both sides of zero, and close to the Gauss
    nodes of largest ``weight * |node|^exponent``: around a node of weight ``w`` and residual ``rho`` the band is
    ``w / (1 + (distance / rho)^2)`` wide. Costs at most ``2 * GRID_POINTS + 4 * REFINED_NODES`` eigenproblems of order
    ``s + 1``.
    """
    nodes, weights, residuals = jacobi.gauss()
    top = 2.0 * max(threshold, float(np.abs(nodes).max()) + float(residuals.max()))
    grid = np.geomspace(max(threshold, top * jacobi.rounding), top, GRID_POINTS)
    largest = np.argsort(-weights * np.abs(nodes) ** exponent)[:REFINED_NODES]
    distance = np.maximum(residuals[largest], 2.0 * jacobi.position)
    near = [nodes[largest] + factor * distance for factor in (-16.0, -2.0, 2.0, 16.0)]
    nodes, weights = jacobi.radau(np.concatenate((-grid, grid, *near)))

    sums = np.concatenate((np.zeros((nodes.shape[0], 1)), np.cumsum(weights, axis=1)), axis=1)
    low, high = np.empty_like(nodes), np.empty_like(nodes)
    for rule, row in enumerate(nodes):
        low[rule] = sums[rule, np.searchsorted(row, row - jacobi.position, side="left")]
        high[rule] = sums[rule, np.searchsorted(row, row + jacobi.position, side="right")]
    low, high = _widen(low.ravel(), high.ravel(), jacobi.rounding)
    order = np.argsort(nodes, axis=None)
    # A distribution function increases, so each bound holds on one side of its point too.
    low = np.maximum.accumulate(low[order])
    high = np.minimum.accumulate(high[order][::-1])[::-1]
    return CDFBand(nodes.ravel()[order], low, high, *jacobi.power_norm())


def _widen(low: Array, high: Array, rounding: float) -> tuple[Array, Array]:
    """Widen bounds of a mass by what an error ``rounding`` of the unit probe vector can do.

    A projection of mass ``M`` changes by at most ``2 sqrt(M) r + r^2``, and the rest, ``1 - M``, by the same amount.
    """

    def allowance(mass: Array) -> Array:
        smaller = np.clip(np.minimum(mass, 1.0 - mass), 0.0, None)
        return np.asarray(2.0 * rounding * np.sqrt(smaller) + rounding**2)

    return np.clip(low - allowance(low), 0.0, 1.0), np.clip(high + allowance(high), 0.0, 1.0)
