"""The spectral measure that the quadrature gives, and the bounds it comes with."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from hesd_fast.errors import ProblemError
from hesd_fast.estimate import Estimate
from hesd_fast.lanczos.block_tridiagonal import RITZ_ROUNDING, Array, BlockTridiagonal
from hesd_fast.spectrum.converged_eigenvalues import Settled, settle
from hesd_fast.spectrum.extreme_eigenvalues import reach_beyond
from hesd_fast.spectrum.jacobi_matrix import Jacobi, cdf_bounds, jacobi_of_probe

ArrayFunction: TypeAlias = Callable[[Array], npt.ArrayLike]

WEIGHT_SUM_TOLERANCE = 1e-6
RANDOM_PROBES = ("rademacher", "gaussian")
CHUNK_ENTRIES = 1 << 22


class SpectralMeasure:
    """A discrete measure on the eigenvalue axis: the mean of one discrete measure per probe.

    Made from a `BlockTridiagonal` it estimates the eigenvalue density of ``H`` and knows how well. Made from bare nodes
    and weights it is taken as the measure itself: bounds are then points, or the spread over its probes.

    Parameters
    ----------
    nodes, weights : sequence of array_like, or array_like of shape (k,)
        One pair of arrays per probe, or a single pair for one probe. The weights of each probe sum to 1.
    size : int, optional
        Order ``n`` of the matrix, needed for its trace only.

    Attributes
    ----------
    nodes, weights : tuple of ndarrays
        One pair per probe, nodes ascending. All probes of a tridiagonal share their nodes.
    weight_sums : ndarray, shape (b,)
        What the weights of each probe summed to before they were normalized; 1 for Rademacher probes.
    size : int or None
        Order of the matrix.
    tridiagonal : BlockTridiagonal or None
        Where the measure comes from.
    settled : Settled or None
        Which nodes are known eigenpairs, whose share is 1/n exactly.

    Raises
    ------
    ProblemError
        If there are no nodes, lengths differ, a number is not finite, a weight is below ``-1e-6``, or the weights of a
        probe miss a sum of 1 by more than ``1e-6``.
    """

    def __init__(
        self,
        nodes: Sequence[npt.ArrayLike] | npt.ArrayLike,
        weights: Sequence[npt.ArrayLike] | npt.ArrayLike,
        *,
        size: int | None = None,
    ) -> None:
        node_arrays, weight_arrays = _per_probe(nodes, "nodes"), _per_probe(weights, "weights")
        if len(node_arrays) != len(weight_arrays) or any(
            x.shape != w.shape for x, w in zip(node_arrays, weight_arrays, strict=False)
        ):
            raise ProblemError(
                f"nodes of lengths {[x.size for x in node_arrays]} do not match weights of lengths "
                f"{[w.size for w in weight_arrays]}; pass one weight per node for each probe"
            )
        if size is not None and size < 1:
            raise ProblemError(f"size must be the order of a matrix, at least 1, got {size}")
        for probe, w in enumerate(weight_arrays):
            if w.min() < -WEIGHT_SUM_TOLERANCE or abs(w.sum() - 1.0) > WEIGHT_SUM_TOLERANCE:
                raise ProblemError(
                    f"the weights of probe {probe} have the least value {w.min():.3g} and the sum {w.sum():.9g}, "
                    f"wanted no negative weight and a sum of 1 within {WEIGHT_SUM_TOLERANCE:g}; normalize them"
                )
        orders = [np.argsort(x, kind="stable") for x in node_arrays]
        self.nodes = tuple(_readonly(x[order]) for x, order in zip(node_arrays, orders, strict=True))
        self.weights = tuple(
            _readonly(np.clip(w, 0.0, None)[order]) for w, order in zip(weight_arrays, orders, strict=True)
        )
        self.weight_sums = _readonly(np.array([w.sum() for w in weight_arrays]))
        self.size = size
        self.tridiagonal: BlockTridiagonal | None = None
        self.settled: Settled | None = None
        self._ritz: tuple[Array, Array, Array] | None = None
        self._reaches: dict[float, float] = {}

    @classmethod
    def from_tridiagonal(cls, tridiagonal: BlockTridiagonal) -> SpectralMeasure:
        """Return the Gauss quadrature of block Lanczos: nodes are Ritz values, ``w_ij = (e_j^T L_0 E_1^T s_i)^2 / n``.

        The weights of probe ``j`` sum to ``||z_j||^2 / n``. That sum is kept in ``weight_sums`` and divided out. All
        moments ``0 ... 2m - 1`` of every probe are exact. Costs one symmetric eigenproblem of order ``k``.

        Raises
        ------
        ProblemError
            If a probe is zero.

        References
        ----------
        Ubaru, Chen, Saad, SIMAX 38(4), 2017; Golub and Meurant, 2010, section 6.6.
        """
        values, vectors, residuals = tridiagonal.ritz()
        start = tridiagonal.start
        weights = (start @ vectors[: start.shape[1]]) ** 2 / tridiagonal.size
        sums = (start**2).sum(axis=1) / tridiagonal.size
        if not (sums > 0.0).all():
            raise ProblemError(f"probe {int(np.argmin(sums))} is the zero vector; every probe must have a direction")
        measure = cls([values] * tridiagonal.probes, list(weights / sums[:, None]), size=tridiagonal.size)
        measure.weight_sums = _readonly(sums)
        measure.tridiagonal = tridiagonal
        measure.settled = settle(tridiagonal, values, residuals, (weights / sums[:, None]).mean(axis=0))
        measure._ritz = values, vectors, residuals
        return measure

    @property
    def probes(self) -> int:
        """Number of probes ``b``."""
        return len(self.nodes)

    @property
    def rounding(self) -> float:
        """Roundoff relative to ``max|node|`` up to which a node is known; double precision for a bare measure."""
        return RITZ_ROUNDING * max(2.0**-52, self.tridiagonal.epsilon if self.tridiagonal is not None else 0.0)

    @property
    def noise(self) -> float:
        """How far rounding and noisy products may have moved a node."""
        if self.tridiagonal is None:
            return self.rounding * self.largest_magnitude
        return self.tridiagonal.noise(self.largest_magnitude)

    @property
    def largest_magnitude(self) -> float:
        """The largest ``|node|``."""
        return float(max(np.abs(x).max() for x in self.nodes))

    @cached_property
    def jacobi(self) -> tuple[Jacobi, ...]:
        """The Jacobi matrix of each probe's measure; empty for a bare measure."""
        if self.tridiagonal is None:
            return ()
        matrix = self.tridiagonal.matrix()
        return tuple(jacobi_of_probe(self.tridiagonal, matrix, probe) for probe in range(self.probes))

    def integrate(self, function: ArrayFunction) -> float:
        """Return the integral of ``function``, which maps an array of nodes to an array, averaged over the probes."""
        pairs = zip(self.nodes, self.weights, strict=True)
        return float(np.mean([w @ np.asarray(function(x), dtype=np.float64) for x, w in pairs]))

    def moment(self, order: int) -> float:
        """Return the moment of the given order; exact for the probes up to order ``2m - 1``."""
        if order < 0:
            raise ProblemError(f"a moment needs an order of at least 0, got {order}")
        return self.integrate(lambda x: x**order)

    def mean(self) -> float:
        """Return the mean eigenvalue, ``trace / n``."""
        return self.moment(1)

    def cdf(self, x: npt.ArrayLike) -> Array:
        """Return the weight of the nodes at or below each ``x``: a step function, not a bound."""
        points = _points(x)
        pairs = zip(self.nodes, self.weights, strict=True)
        return np.asarray(np.mean([_step(nodes, w, points, "right") for nodes, w in pairs], axis=0))

    def cdf_bounds(self, x: npt.ArrayLike) -> tuple[Array, Array]:
        """Return ``(low, high)`` with ``low <= mu((-inf, x)) <= mu((-inf, x]) <= high`` for the probes' measure ``mu``.

        ``mu`` is the exact measure ``(1/b) sum_j sum_i (z_j^T u_i)^2 / ||z_j||^2`` of this run's probes; how far it is
        from the density of ``H`` is the sampling error, see `variance_bound`. The bounds are the tightest that the
        moments of each probe allow, widened by a rounding allowance. They are rigorous with full or partial
        reorthogonalization, and approximate with a window or with none. Of a bare measure both are its step function.

        Shapes are that of ``x``. Costs one symmetric eigenproblem of order ``m + 1`` per point and probe.

        References
        ----------
        Golub and Meurant, 2010, section 6.2; Akhiezer, *The Classical Moment Problem*, 1965, section 2.5.
        """
        points = _points(x)
        if not self.jacobi:
            pairs = list(zip(self.nodes, self.weights, strict=True))
            below = np.mean([_step(nodes, w, points, "left") for nodes, w in pairs], axis=0)
            return np.asarray(below), self.cdf(points)
        bounds = [cdf_bounds(jacobi, points.ravel()) for jacobi in self.jacobi]
        low = np.mean([low for low, _ in bounds], axis=0).reshape(points.shape)
        high = np.mean([high for _, high in bounds], axis=0).reshape(points.shape)
        return low, high

    def density(self, grid: npt.ArrayLike, sigma: float | None = None) -> Array:
        """Return the density of the measure smoothed with a Gaussian of standard deviation ``sigma``, on a grid.

        ``sigma`` defaults to 1 % of the distance between the extreme nodes; when all nodes are equal, to 1 % of their
        magnitude, or to 0.01 when they are zero. Costs ``grid * nodes`` exponentials.

        Raises
        ------
        ProblemError
            If ``sigma`` is not positive and finite.
        """
        points = _points(grid)
        nodes, weights = self._merged()
        if sigma is None:
            sigma = 0.01 * (float(nodes[-1] - nodes[0]) or self.largest_magnitude or 1.0)
        if not (sigma > 0.0 and math.isfinite(sigma)):
            raise ProblemError(f"sigma must be positive and finite, got {sigma!r}; pass a width in eigenvalue units")
        flat = points.ravel()
        result = np.empty(flat.size)
        chunk = max(1, CHUNK_ENTRIES // nodes.size)
        for begin in range(0, flat.size, chunk):
            scaled = (flat[begin : begin + chunk, None] - nodes[None]) / sigma
            result[begin : begin + chunk] = np.exp(-0.5 * scaled**2) @ weights
        return (result / (sigma * math.sqrt(2.0 * math.pi))).reshape(points.shape)

    def wasserstein1(self, other: SpectralMeasure | npt.ArrayLike) -> float:
        """Return the Wasserstein-1 distance to another measure, or to the density of an array of eigenvalues.

        The distance is the area between the two distribution functions, in units of the eigenvalues.
        """
        if not isinstance(other, SpectralMeasure):
            eigenvalues = np.asarray(other, dtype=np.float64).ravel()
            other = SpectralMeasure(eigenvalues, np.full(eigenvalues.size, 1.0 / max(eigenvalues.size, 1)))
        (ours, our_weights), (theirs, their_weights) = self._merged(), other._merged()
        places = np.concatenate((ours, theirs))
        jumps = np.concatenate((our_weights, -their_weights))
        order = np.argsort(places, kind="stable")
        return float(np.abs(np.cumsum(jumps[order])[:-1]) @ np.diff(places[order]))

    @property
    def lambda_max(self) -> Estimate:
        """The largest eigenvalue: the largest Ritz value, and how far beyond it an eigenvalue can hide.

        The largest eigenvalue is not below the Ritz value. It is above the interval only if the probes see so little
        of its eigenvector as happens with probability 0.025; see `extreme_eigenvalues.reach_beyond`. Both ends include
        an allowance for rounding and for the measured noise of the products. For probes that are not random the upper
        end is the residual norm: some eigenvalue lies within it, not certainly the largest. For a bare measure: the
        range of the largest nodes of its probes.
        """
        return self._extreme(1.0)

    @property
    def lambda_min(self) -> Estimate:
        """The smallest eigenvalue: the smallest Ritz value, and how far beyond it an eigenvalue can hide.

        The mirror image of `lambda_max`.
        """
        mirrored = self._extreme(-1.0)
        return Estimate(-mirrored.value, -mirrored.high, -mirrored.low, mirrored.method)

    def _extreme(self, sign: float) -> Estimate:
        """Return the estimate of the largest eigenvalue of ``sign * H``."""
        extremes = [float((sign * x).max()) for x in self.nodes]
        value = max(extremes)
        if self.tridiagonal is None:
            return Estimate(value, min(extremes), value, "the nodes of the measure, range over its probes")
        method = (
            "room that the moments leave for an eigenvalue the probes have missed" if self.random else "residual norm"
        )
        return Estimate(value, value - self.noise, value + self._reach(sign) + self.noise, f"{method}, and noise")

    def _reach(self, sign: float) -> float:
        """Return how far beyond the extreme Ritz value an eigenvalue may lie, 0 for a bare measure."""
        if self.tridiagonal is not None and self._ritz is not None:
            values, vectors, residuals = self._ritz
            for side, residual in ((-1.0, float(residuals[0])), (1.0, float(residuals[-1]))):
                found = reach_beyond(self.tridiagonal, values, vectors, side) if self.random else residual
                self._reaches[side] = found
            self._ritz = None  # the vectors may be large
        return self._reaches.get(sign, 0.0)

    @property
    def trace(self) -> Estimate:
        """The trace of ``H``: settled eigenvalues, and ``n`` times the mean of the others with two standard errors.

        A Rademacher quadratic form ``z^T H z`` has a variance of at most ``2 ||H||_F^2``, and the probes are
        independent. Of a bare measure: two standard errors of the mean over its probes.

        Raises
        ------
        ProblemError
            If the measure does not know the size of the matrix.
        """
        if self.size is None:
            raise ProblemError("the trace needs the order of the matrix, got size=None; pass size=n to SpectralMeasure")
        mean = self.mean()
        if self.settled is None:
            margin = 2.0 * standard_error([float(w @ x) for x, w in zip(self.nodes, self.weights, strict=True)])
            method = "two standard errors over the measure's probes"
        else:
            mean += self.settled.correction(np.positive)
            margin = self.mean_error
            method = "two standard errors of the random probes" if self.random else "rounding; the probes were given"
        return Estimate(self.size * mean, self.size * (mean - margin), self.size * (mean + margin), method)

    @property
    def mean_rounding(self) -> float:
        """Allowance of the mean for rounding and noise.

        An error ``r`` of a unit probe ``z`` moves ``z^T H z`` by ``2 r ||H z||``; the recurrence error is the noise of
        such a product.
        """
        noise = 0.0 if self.tridiagonal is None else self.tridiagonal.recurrence_error or 0.0
        return 2.0 * self.rounding * math.sqrt(self._second_moment()) + noise

    @property
    def mean_error(self) -> float:
        """Two standard errors of the mean eigenvalue, with settled eigenvalues exact, and the allowances."""
        settled = 0.0 if self.settled is None else self.settled.uncertainty(np.positive)
        return 2.0 * self.sampling_error(self.unsettled_square_bound()) + self.mean_rounding + settled

    @property
    def random(self) -> bool:
        """Whether the probes are random, so that a sampling error is known."""
        return self.tridiagonal is not None and self.tridiagonal.probe_kind in RANDOM_PROBES

    def variance_bound(self, function: ArrayFunction) -> float:
        """Return the standard error of the integral of ``function`` that the random probes cause.

        It is ``sqrt(2 * integral of f^2 / (n b))``: for Rademacher probes the variance of ``z^T f(H) z / n`` is at most
        ``2 ||f(H)||_F^2 / n^2``. The integral of ``f^2`` is itself taken by quadrature. Zero for a bare measure and for
        probes that are not random: those are taken as they are.
        """
        return self.sampling_error(self.integrate(lambda x: np.asarray(function(x), dtype=np.float64) ** 2))

    def sampling_error(self, square_integral: float) -> float:
        """Return ``sqrt(2 * square_integral / (n b))``, see `variance_bound`; zero when the probes are not random."""
        if not self.random or self.size is None:
            return 0.0
        return math.sqrt(2.0 * square_integral / (self.size * self.probes))

    def unsettled_square_bound(self) -> float:
        """Return an upper estimate of the sum of squares, over n, of the eigenvalues that are not settled.

        The probes' second moment without the settled nodes, and two of its own standard errors.
        """
        square = self._second_moment()
        if self.settled is None:
            return square
        square -= float(self.settled.eigenvalues**2 @ self.settled.seen)
        rest = ~self.settled.mask
        weights = np.mean(self.weights, axis=0)[rest]
        fourth = float(weights @ self.nodes[0][rest] ** 4)
        if self.tridiagonal is not None and self.tridiagonal.steps < 3:  # too few for the quadrature of a fourth power
            most = self.largest_magnitude + max(self._reach(-1.0), self._reach(1.0))
            fourth = max(fourth, most**2 * max(square, 0.0))
        return max(square, 0.0) + 2.0 * self.sampling_error(fourth) + self.rounding * self._second_moment()

    def _second_moment(self) -> float:
        """Return ``||H z||^2 / ||z||^2`` averaged over the probes, exact also after one step."""
        if self.tridiagonal is None:
            return self.moment(2)
        # alpha_1^2 + beta_1^2 is the second moment of a Jacobi matrix, beta_1 known even if no second step was taken.
        return float(np.mean([j.diagonal[0] ** 2 + j.offdiagonal[0] ** 2 for j in self.jacobi]))

    def _merged(self) -> tuple[Array, Array]:
        """Return the nodes of all probes in ascending order and their weights in the mean measure."""
        nodes = np.concatenate(self.nodes)
        weights = np.concatenate(self.weights) / self.probes
        order = np.argsort(nodes, kind="stable")
        return nodes[order], weights[order]


def standard_error(values: Sequence[float]) -> float:
    """Return the standard error of the mean of independent values; zero for a single one."""
    if len(values) < 2:
        return 0.0
    return float(np.std(values, ddof=1) / math.sqrt(len(values)))


def _per_probe(values: Sequence[npt.ArrayLike] | npt.ArrayLike, name: str) -> list[Array]:
    rows: Sequence[npt.ArrayLike] = list(values) if isinstance(values, (Sequence, np.ndarray)) else [values]
    if rows and all(np.ndim(row) == 0 for row in rows):
        rows = [np.asarray(rows)]
    arrays = [np.array(row, dtype=np.float64) for row in rows]
    if not arrays or any(a.ndim != 1 or a.size == 0 for a in arrays):
        raise ProblemError(
            f"{name} must be one non-empty list of numbers per probe, got shapes {[a.shape for a in arrays]}; "
            "pass a list of 1-D arrays, or one 1-D array for a single probe"
        )
    if not all(np.isfinite(a).all() for a in arrays):
        raise ProblemError(f"{name} hold a number that is not finite; check the Hessian products")
    return arrays


def _points(x: npt.ArrayLike) -> Array:
    points = np.asarray(x, dtype=np.float64)
    if not np.isfinite(points).all():
        raise ProblemError("a point of evaluation is not finite; pass finite eigenvalue positions")
    return points


def _step(nodes: Array, weights: Array, points: Array, side: str) -> Array:
    sums = np.concatenate(([0.0], np.cumsum(weights)))
    index = np.searchsorted(nodes, points, side="left" if side == "left" else "right")
    return np.asarray(sums[index])


def _readonly(array: Array) -> Array:
    array.flags.writeable = False
    return array
