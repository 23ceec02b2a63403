"""The spectral measure that the quadrature gives, and the bounds it comes with."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from hesd_fast.errors import ProblemError
from hesd_fast.estimate import Estimate, ProductError
from hesd_fast.lanczos.block_tridiagonal import RITZ_ROUNDING, Array, BlockTridiagonal
from hesd_fast.spectrum.converged_eigenvalues import ConvergedEigenvalues, find_converged, none_converged
from hesd_fast.spectrum.extreme_eigenvalues import missed_eigenvalue_distance
from hesd_fast.spectrum.jacobi_matrix import Jacobi, jacobi_of_probe
from hesd_fast.spectrum.moment_bounds import cdf_bounds
from hesd_fast.spectrum.ritz_pairs import RitzPairs
from hesd_fast.spectrum.sampling_error import SamplingError, standard_error_of_mean

ArrayFunction: TypeAlias = Callable[[Array], npt.ArrayLike]

WEIGHT_SUM_TOLERANCE = 1e-6
CHUNK_ENTRIES = 1 << 22


@dataclass(frozen=True, eq=False, init=False, repr=False)
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
    ritz : RitzPairs or None
        What the measure of a run knows of its Ritz pairs; None for a bare measure.

    Raises
    ------
    ProblemError
        If there are no nodes, lengths differ, a number is not finite, a weight is below ``-1e-6``, or the weights of a
        probe miss a sum of 1 by more than ``1e-6``.

    Examples
    --------
    >>> import hesd_fast as hesd
    >>> measure = hesd.SpectralMeasure([-1.0, 0.0, 3.0], [0.25, 0.5, 0.25], size=4)
    >>> measure.mean(), measure.moment(2)
    (0.5, 2.5)
    >>> print(measure.trace, measure.lambda_max)
    2 [2, 2] 3 [3, 3]
    >>> measure.cdf([-2.0, 0.0, 1.0]).tolist()
    [0.0, 0.75, 0.75]
    """

    nodes: tuple[Array, ...]
    weights: tuple[Array, ...]
    weight_sums: Array
    size: int | None
    ritz: RitzPairs | None

    def __init__(
        self,
        nodes: Sequence[npt.ArrayLike] | npt.ArrayLike,
        weights: Sequence[npt.ArrayLike] | npt.ArrayLike,
        *,
        size: int | None = None,
        _ritz: RitzPairs | None = None,
    ) -> None:
        given, masses = _per_probe(nodes, "nodes"), _per_probe(weights, "weights")
        _check_measure(given, masses, size)
        orders = [np.argsort(x, kind="stable") for x in given]
        for name, value in {
            "nodes": tuple(_readonly(x[order]) for x, order in zip(given, orders, strict=True)),
            "weights": tuple(_readonly(w.clip(0.0)[order]) for w, order in zip(masses, orders, strict=True)),
            "weight_sums": _readonly(np.array([w.sum() for w in masses]) if _ritz is None else _ritz.weight_sums),
            "size": size,
            "ritz": _ritz,
        }.items():
            object.__setattr__(self, name, value)

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
        ritz = RitzPairs.of(tridiagonal)
        return cls([ritz.values] * tridiagonal.probes, list(ritz.weights), size=tridiagonal.size, _ritz=ritz)

    @property
    def tridiagonal(self) -> BlockTridiagonal | None:
        """Where the measure comes from; None for a bare one."""
        return None if self.ritz is None else self.ritz.tridiagonal

    @cached_property
    def converged(self) -> ConvergedEigenvalues:
        """Which nodes are eigenvalues with known eigenvectors, whose share is 1/n exactly; none of a bare measure."""
        return none_converged(self.nodes[0].size) if self.ritz is None else find_converged(self.ritz)

    @property
    def probes(self) -> int:
        """Number of probes ``b``."""
        return len(self.nodes)

    @property
    def pairs(self) -> list[tuple[Array, Array]]:
        """Nodes and weights of each probe."""
        return list(zip(self.nodes, self.weights, strict=True))

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
        return float(np.mean([w @ np.asarray(function(x), dtype=np.float64) for x, w in self.pairs]))

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
        return self._steps(_points(x), "right")

    def _steps(self, points: Array, side: Literal["left", "right"]) -> Array:
        """Return the weight of the nodes below each point or, of the side "right", also of those at it."""
        sums = [np.concatenate(([0.0], np.cumsum(w)))[np.searchsorted(x, points, side)] for x, w in self.pairs]
        return np.asarray(np.mean(sums, axis=0))

    def cdf_bounds(self, x: npt.ArrayLike) -> tuple[Array, Array]:
        """Return ``(low, high)`` with ``low <= mu((-inf, x)) <= mu((-inf, x]) <= high`` for the probes' measure ``mu``.

        ``mu`` is the exact measure ``(1/b) sum_j sum_i (z_j^T u_i)^2 / ||z_j||^2`` of this run's probes; how far it is
        from the density of ``H`` is the sampling error, see `standard_error_bound`. The bounds are the tightest that
        the moments of each probe allow, widened by a rounding allowance. They are rigorous with full or partial
        reorthogonalization, and approximate with a window or with none. Of a bare measure both are its step function.
        Where products have been compared with exact ones, each bound is that of the point moved outwards by `shift`, as
        far as an eigenvalue may have moved.

        Shapes are that of ``x``. Costs one symmetric eigenproblem of order ``m + 1`` per point and probe.

        References
        ----------
        Golub and Meurant, 2010, section 6.2; Akhiezer, *The Classical Moment Problem*, 1965, section 2.5.
        """
        points = _points(x)
        if not self.jacobi:
            return self._steps(points, "left"), self._steps(points, "right")
        low, high = self._bounds_of_products(points.ravel() - self.shift.largest)
        if self.shift.largest > 0.0:
            high = self._bounds_of_products(points.ravel() + self.shift.largest)[1]
        return low.reshape(points.shape), high.reshape(points.shape)

    def _bounds_of_products(self, points: Array) -> tuple[Array, Array]:
        """Return the bounds for the matrix that was multiplied."""
        low, high = np.mean([cdf_bounds(jacobi, points) for jacobi in self.jacobi], axis=0)
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
        of its eigenvector as happens with probability 0.025; see `extreme_eigenvalues.missed_eigenvalue_distance`. Both
        ends include an allowance for rounding and for the measured noise of the products. For probes that are not
        random the upper end is the residual norm: some eigenvalue lies within it, not certainly the largest. For a bare
        measure: the range of the largest nodes of its probes.
        """
        return self._extreme(1.0)

    @property
    def lambda_min(self) -> Estimate:
        """The smallest eigenvalue: the smallest Ritz value, and how far beyond it an eigenvalue can hide.

        The mirror image of `lambda_max`.
        """
        return -self._extreme(-1.0)

    def _extreme(self, sign: float) -> Estimate:
        """Return the estimate of the largest eigenvalue of ``sign * H``."""
        extremes = [float((sign * x).max()) for x in self.nodes]
        value = max(extremes)
        if self.ritz is None:
            return Estimate(value, min(extremes), value, "the nodes of the measure, range over its probes")
        method = (
            "room that the moments leave for an eigenvalue the probes have missed" if self.random else "residual norm"
        )
        beyond = self._beyond[0 if sign < 0.0 else 1]
        noise = self.noise + self.shift.largest
        return Estimate(value, value - noise, value + beyond + noise, f"{method}, and noise")

    @cached_property
    def _beyond(self) -> tuple[float, float]:
        """How far below the smallest and above the largest Ritz value an eigenvalue may lie."""
        if self.ritz is None:
            return 0.0, 0.0
        if not self.random:
            return float(self.ritz.residuals[0]), float(self.ritz.residuals[-1])
        return missed_eigenvalue_distance(self.ritz, -1.0), missed_eigenvalue_distance(self.ritz, 1.0)

    @property
    def trace(self) -> Estimate:
        """The trace of ``H``: converged eigenvalues, and ``n`` times the mean of the others with two standard errors.

        Of a bare measure: two standard errors of the mean over its probes.

        Raises
        ------
        ProblemError
            If the measure does not know the size of the matrix.
        """
        if self.size is None:
            raise ProblemError("the trace needs the order of the matrix, got size=None; pass size=n to SpectralMeasure")
        mean = self.mean()
        if self.ritz is None:
            means = [float(w @ x) for x, w in self.pairs]
            margin, method = 2.0 * standard_error_of_mean(means), "two standard errors over the measure's probes"
        else:
            mean, margin = mean + self.converged.correction(np.positive), self.mean_error
            method = "two standard errors of the random probes" if self.random else "rounding; the probes were given"
        return Estimate(self.size * mean, self.size * (mean - margin), self.size * (mean + margin), method)

    @property
    def mean_rounding(self) -> float:
        """Allowance of the mean for rounding and noise.

        An error ``r`` of a unit probe ``z`` moves ``z^T H z`` by ``2 r ||H z||``; the recurrence error is the noise of
        such a product.
        """
        noise = 0.0 if self.tridiagonal is None else self.tridiagonal.recurrence_error or 0.0
        return 2.0 * self.rounding * math.sqrt(self._second_moment) + noise + self.shift.mean

    @property
    def shift(self) -> ProductError:
        """How far eigenvalues may be from those that exact products would show, as far as this was measured."""
        return ProductError(0.0, 0.0, 0.0) if self.tridiagonal is None else self.tridiagonal.shift

    @property
    def mean_error(self) -> float:
        """Two standard errors of the mean eigenvalue, with converged eigenvalues exact, and the allowances."""
        sampled = 2.0 * self.sampling.bound(self.unconverged_square_bound)
        return sampled + self.mean_rounding + self.converged.uncertainty(np.positive)

    @property
    def random(self) -> bool:
        """Whether the probes are random, so that a sampling error is known."""
        return self.ritz is not None and self.ritz.random

    @property
    def sampling(self) -> SamplingError:
        """How far the probes' means are from those of the matrix; nothing for those that are not random."""
        return SamplingError((self.size or 0) * self.probes if self.random else 0)

    def standard_error_bound(self, function: ArrayFunction) -> float:
        """Return a bound of the standard error that random probes give the integral of ``function``.

        It is ``sqrt(2 * integral of f^2 / (n b))``, see `SamplingError.bound`; the integral of ``f^2`` is itself taken
        by quadrature. Zero for a bare measure and for probes that are not random: those are taken as they are.
        """
        return self.sampling.bound(self.integrate(lambda x: np.asarray(function(x), dtype=np.float64) ** 2))

    @property
    def unconverged_square_bound(self) -> float:
        """An upper estimate of the sum of squares, over n, of the eigenvalues that have not converged."""
        square = self._second_moment
        if self.ritz is None:
            return square
        largest = self.largest_magnitude + max(self._beyond)
        rest = self.sampling.unconverged_square(self.ritz, self.converged, square, largest)
        return rest + self.rounding * square

    @property
    def largest_unconverged(self) -> float:
        """The largest magnitude of an eigenvalue that has not converged, hidden ones included."""
        mask = self.converged.mask
        candidates = [0.0, *np.abs(self.nodes[0][~mask])]
        for end, extreme in ((0, -self.lambda_min.low), (-1, self.lambda_max.high)):
            if not mask[end]:
                candidates.append(extreme)
        return float(max(candidates))

    @cached_property
    def _second_moment(self) -> float:
        """``||H z||^2 / ||z||^2`` averaged over the probes, exact also after one step."""
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


def _check_measure(nodes: list[Array], weights: list[Array], size: int | None) -> None:
    """Raise a ProblemError unless nodes and weights are those of a measure."""
    if len(nodes) != len(weights) or any(x.shape != w.shape for x, w in zip(nodes, weights, strict=False)):
        raise ProblemError(
            f"nodes of lengths {[x.size for x in nodes]} do not match weights of lengths "
            f"{[w.size for w in weights]}; pass one weight per node for each probe"
        )
    if size is not None and size < 1:
        raise ProblemError(f"size must be the order of a matrix, at least 1, got {size}")
    for probe, w in enumerate(weights):
        if w.min() < -WEIGHT_SUM_TOLERANCE or abs(w.sum() - 1.0) > WEIGHT_SUM_TOLERANCE:
            raise ProblemError(
                f"the weights of probe {probe} have the least value {w.min():.3g} and the sum {w.sum():.9g}, "
                f"wanted no negative weight and a sum of 1 within {WEIGHT_SUM_TOLERANCE:g}; normalize them"
            )


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


def _readonly(array: Array) -> Array:
    array.flags.writeable = False
    return array
