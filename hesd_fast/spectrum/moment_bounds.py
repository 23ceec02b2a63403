"""The tightest bounds that the moments of a probe put on its distribution function and on integrals."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from hesd_fast.lanczos.block_tridiagonal import Array
from hesd_fast.spectrum.jacobi_matrix import Jacobi

STEP = 0.3
"""Of the integrals over ``log y``, whose error is ``exp(-pi^2 / STEP)``."""

DECADES = 13
"""Decades below the spectrum's scale that the integrals begin at; as many digits come out."""

PHASES = 8
"""Rules tried at each of the scales, when the best rule is searched for."""

SCALES = 12

ZOOMS = 6
"""How often the best one is searched for more finely, sixteen times each."""

GRID_POINTS = 48
REFINED_NODES = 16


class HingeFamily:
    """Integrals of ``max(x - t, 0)`` and of its square by all rules with ``s + 1`` nodes and the moments ``0 ... 2s``.

    These rules are those of the Jacobi matrix with one more row, whose diagonal entry ``gamma`` is free. With ``z = t +
    iy``, the Gauss rule's ``F(z) = e_1^T (J - z)^{-1} e_1`` becomes

        ``F(z) + beta_s^2 r(z)^2 / (gamma - z - beta_s^2 g(z))``,

    where ``r`` and ``g`` are the entries ``(1, s)`` and ``(s, s)`` of ``(J - z)^{-1}``. Because ``|d|`` is ``2 / pi``
    times the integral of ``d^2 / (d^2 + y^2)`` over ``y > 0``, the integral of the hinge is that of the Gauss rule and
    ``1 / pi`` times the integral over ``y > 0`` of ``-y`` times the imaginary part of what has been added; for the
    square it is ``-y^2`` and the real part. The trapezoidal rule in ``log y`` converges geometrically. So a rule costs
    as many operations as there are ``y``, and no eigenvalue problem.

    Parameters
    ----------
    jacobi : Jacobi
        A matrix of at least two rows, with a last coupling that is not zero.
    threshold : float
        The kink ``t``.
    """

    def __init__(self, jacobi: Jacobi, threshold: float) -> None:
        values, first, last = jacobi.eigenvectors
        self.unit = max(jacobi.scale, abs(threshold))
        distances = (values - threshold) / self.unit
        squared_coupling = (jacobi.offdiagonal[-1] / self.unit) ** 2
        # r falls off like y^-s
        most = math.log(10.0) * (2.0 + DECADES / (values.size - 1))
        heights = np.exp(np.arange(-math.log(10.0) * DECADES, most, STEP))
        inverse = 1.0 / (distances - 1j * heights[:, None])
        corner, cross = np.einsum("ys,es->ey", inverse, np.stack((last**2, first * last)))
        self.centres = 1j * heights + squared_coupling * corner
        added = (STEP / math.pi) * squared_coupling * cross**2 * heights
        self.factors = np.stack((1j * heights * added, -(heights**2) * added))
        above = np.clip(distances, 0.0, None)
        self.gauss = np.array([first**2 @ above, first**2 @ above**2])

    def integrals(self, gammas: Array) -> Array:
        """Return the two integrals, in units of ``self.unit`` and its square, by rules: shape (2, rules)."""
        # a matrix product would have the threads of BLAS spin for it
        added = np.einsum("py,yr->pr", self.factors, 1.0 / (gammas - self.centres[:, None]))
        return np.asarray(self.gauss[:, None] + added.real)

    def greatest(self, power: int) -> float:
        """Return the greatest integral of ``max(x - t, 0)^power`` in the family, in units of the eigenvalues.

        The rules are a circle, ``gamma`` being infinite for the Gauss rule, and either integral has one maximum on it:
        where it is stationary, the polynomial of degree ``2s`` that touches the integrand at every node exists, and
        their difference changes its sign nowhere. From the centre ``t + iy + beta_s^2 g(t + iy)`` a rule is seen at the
        angle ``arccot((gamma - Re centre) / Im centre)``; even angles are fit for nodes about as far from the kink as
        ``y``. The best one of all lies between its neighbours; two on either side, for one may be the same but for
        rounding.
        """
        chosen = self.centres[np.linspace(0, self.centres.size - 1, SCALES).astype(int)]
        angles = (np.arange(PHASES) + 0.5) * math.pi / PHASES
        gammas = np.sort((chosen.real[:, None] + chosen.imag[:, None] / np.tan(angles)).ravel())
        found = self.integrals(gammas)[power - 1]
        best = int(np.argmax(found))
        ends = gammas[[best - 2, (best + 2) % gammas.size]]
        # the centre from which they are farthest apart
        spread = [np.diff(_angles(centre, np.array([ends[1], gammas[best], ends[0]]))) % math.pi for centre in chosen]
        centre = chosen[int(np.argmax([gap.min() for gap in spread]))]
        right, left = (float(angle) for angle in _angles(centre, ends)[::-1])
        if left <= right:
            left += math.pi
        high = max(float(found[best]), float(self.gauss[power - 1]))
        for _ in range(ZOOMS):
            angles = np.linspace(right, left, 18)[1:-1]
            found = self.integrals(centre.real + centre.imag / np.tan(angles))[power - 1]
            best = int(np.argmax(found))
            high = max(high, float(found[best]))
            step = (left - right) / 17
            right, left = float(angles[best]) - step, float(angles[best]) + step
        return high * self.unit**power


def _angles(centre: complex, gammas: Array) -> Array:
    """Return the angles, from 0 to pi, at which a centre sees rules; they fall as ``gamma`` grows."""
    return np.asarray(np.arctan2(centre.imag, gammas - centre.real))


def hinge_bounds(jacobi: Jacobi, threshold: float) -> tuple[float, float]:
    """Return the tightest bounds that the moments ``0 ... 2s`` put on the integral of ``max(x - threshold, 0)``.

    Every rule with ``s + 1`` nodes has all these moments. The rule with a node at the kink gives the least value: the
    polynomial of degree ``2s`` that meets the hinge at the kink and touches it at the other nodes lies below it. The
    greatest value is that of the rule whose polynomial touches the hinge at every node, so lies above it; as all rules
    have the moments, it is the one with the largest value, and is found by maximization over the family.

    Far tighter than integrating `cdf_bounds`: the hinge is linear but for its kink, and what the distribution does
    elsewhere does not matter. Widened by a rounding allowance. Costs an eigenproblem of order ``s + 1``, and about
    ``200 s`` operations for the family.

    References
    ----------
    Karlin and Studden, *Tchebycheff Systems*, 1966. After one step the upper bound is that of Scarf, *A min-max
    solution of an inventory problem*, 1958.
    """
    nodes, weights = jacobi.radau(np.array([threshold]))
    low = float(weights[0] @ np.clip(nodes[0] - threshold, 0.0, None))
    high = max(low, _greatest_hinges(jacobi, threshold, (1,))[0])
    # Nodes move by `position`; a change r of the unit probe z changes z^T f(H) z by 2 r ||f(H) z|| + r^2 ||f(H)||.
    second_moment = math.hypot(float(jacobi.diagonal[0]), float(jacobi.offdiagonal[0]))
    allowance = jacobi.position + 2.0 * jacobi.rounding * second_moment + jacobi.rounding**2 * jacobi.scale
    return max(0.0, low - allowance), high + allowance


def greatest_square_beyond(jacobi: Jacobi, threshold: float) -> float:
    """Return an upper bound of the integral of ``x^2`` over ``x > threshold >= 0``.

    With ``d = x - threshold`` it is ``d^2 + 2 threshold d + threshold^2``, and each part has the tightest bound that
    the moments ``0 ... 2s`` allow, widened by a rounding allowance. Costs what `hinge_bounds` does.
    """
    mass = 1.0 - float(cdf_bounds(jacobi, np.array([threshold]))[0][0])
    hinge, square = _greatest_hinges(jacobi, threshold, (1, 2))
    found = square + 2.0 * threshold * hinge + threshold**2 * mass
    # As for the hinge: of f(x) = x^2 beyond the threshold, ||f(H) z|| is at most ||H|| sqrt(z^T f(H) z).
    moved = jacobi.position
    return found + 4.0 * moved * math.sqrt(found) + 2.0 * moved**2


def _greatest_hinges(jacobi: Jacobi, threshold: float, powers: tuple[int, ...]) -> list[float]:
    """Return the greatest integral of ``max(x - threshold, 0)^power`` that the moments allow, for powers 1 and 2."""
    if jacobi.offdiagonal[-1] == 0.0:  # they allow one measure
        nodes, weights, _ = jacobi.gauss()
        return [float(weights @ np.clip(nodes - threshold, 0.0, None) ** power) for power in powers]
    if jacobi.diagonal.size == 1:
        mean, deviation = float(jacobi.diagonal[0]) - threshold, float(jacobi.offdiagonal[0])
        ends = (0.5 * (mean + math.hypot(mean, deviation)), max(mean, 0.0) ** 2 + deviation**2)
        return [ends[power - 1] for power in powers]
    family = HingeFamily(jacobi, threshold)
    return [family.greatest(power) for power in powers]


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
