"""The spectral measure that the quadrature gives, and the bounds it comes with."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from hesd_fast.errors import ProblemError
from hesd_fast.estimate import Estimate, ProductError
from hesd_fast.lanczos.block_tridiagonal import ORTHOGONAL_MODES, RITZ_ROUNDING, Array, BlockTridiagonal
from hesd_fast.lanczos.options import RANDOM_PROBES
from hesd_fast.spectrum.converged_eigenvalues import ConvergedEigenvalues, none_converged, pooled
from hesd_fast.spectrum.jacobi_matrix import Jacobi
from hesd_fast.spectrum.moment_bounds import cdf_bounds
from hesd_fast.spectrum.outliers import Outliers, find_outliers, unknown_outliers
from hesd_fast.spectrum.run_spectrum import RunSpectrum
from hesd_fast.spectrum.sampling_error import SamplingError, standard_error_of_mean
from hesd_fast.spectrum.smoothing import atoms_of, smoothed_density

ArrayFunction: TypeAlias = Callable[[Array], npt.ArrayLike]

WEIGHT_SUM_TOLERANCE = 1e-6

SHARE_ROUNDING = 8.0 * 2.0**-52
"""Rounding of a share of the spectrum, for each node whose weight is summed."""


@dataclass(frozen=True, eq=False, init=False, repr=False)
class SpectralMeasure:
    """A discrete measure on the eigenvalue axis: the mean of one discrete measure per probe.

    Made from a `BlockTridiagonal`, or from those of several runs with probes of their own, it estimates the eigenvalue
    density of ``H`` and knows how well. Made from bare nodes and weights it is taken as the measure itself: bounds are
    then points, or the spread over its probes.

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
        What the weights of each probe summed to before they were normalized; 1 for probes of length ``sqrt(n)``.
    size : int or None
        Order of the matrix.
    runs : tuple of RunSpectrum
        What each run knows of the spectrum, its probes following those of the run before; empty for a bare measure.

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
    runs: tuple[RunSpectrum, ...]

    def __init__(
        self,
        nodes: Sequence[npt.ArrayLike] | npt.ArrayLike,
        weights: Sequence[npt.ArrayLike] | npt.ArrayLike,
        *,
        size: int | None = None,
        _runs: tuple[RunSpectrum, ...] = (),
    ) -> None:
        given, masses = _per_probe(nodes, "nodes"), _per_probe(weights, "weights")
        _check_measure(given, masses, size)
        orders = [np.argsort(x, kind="stable") for x in given]
        for name, value in {
            "nodes": tuple(_readonly(x[order]) for x, order in zip(given, orders, strict=True)),
            "weights": tuple(_readonly(w.clip(0.0)[order]) for w, order in zip(masses, orders, strict=True)),
            "weight_sums": _readonly(
                np.array([x for run in _runs for x in run.ritz.weight_sums] or [*map(sum, masses)])
            ),
            "size": size,
            "runs": _runs,
        }.items():
            object.__setattr__(self, name, value)

    @classmethod
    def from_tridiagonal(cls, *tridiagonals: BlockTridiagonal) -> SpectralMeasure:
        """Return the Gauss quadrature of block Lanczos: nodes are Ritz values, ``w_ij = (e_j^T L_0 E_1^T s_i)^2 / n``.

        The weights of probe ``j`` sum to ``||z_j||^2 / n``. That sum is kept in ``weight_sums`` and divided out. All
        moments ``0 ... 2m - 1`` of every probe are exact. Costs some ``20 k^2 b`` operations a matrix of order ``k``.

        Several matrices are those of independent runs on the same operator. Each of their probes counts the same, so
        the sampling error is that of all probes together, whatever the number of steps that a run has taken.

        Raises
        ------
        ProblemError
            If no matrix is given, a probe is zero, or several are not of one order or not all from random probes.

        References
        ----------
        Ubaru, Chen, Saad, SIMAX 38(4), 2017; Golub and Meurant, 2010, section 6.6.
        """
        _check_runs(tridiagonals)
        runs = tuple(RunSpectrum.of(tridiagonal) for tridiagonal in tridiagonals)
        nodes = [run.ritz.values for run in runs for _ in range(run.probes)]
        weights = [row for run in runs for row in run.ritz.weights]
        return cls(nodes, weights, size=tridiagonals[0].size, _runs=runs)

    @property
    def tridiagonals(self) -> tuple[BlockTridiagonal, ...]:
        """Where the measure comes from; empty for a bare one."""
        return tuple(run.tridiagonal for run in self.runs)

    @cached_property
    def converged(self) -> ConvergedEigenvalues:
        """Which nodes are eigenvalues with known eigenvectors, whose share is 1/n exactly; none of a bare measure.

        Of several runs: the eigenvalues that each run knows, in the part that its probes have in the mean.
        """
        if not self.runs:
            return none_converged(self.nodes[0].size)
        return pooled([(run.converged, run.probes / self.probes) for run in self.runs])

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
        return max([matrix.rounding for matrix in self.tridiagonals], default=RITZ_ROUNDING * 2.0**-52)

    @property
    def noise(self) -> float:
        """How far rounding and noisy products may have moved a node."""
        return max([run.noise for run in self.runs], default=self.rounding * self.largest_magnitude)

    @property
    def largest_magnitude(self) -> float:
        """The largest ``|node|``."""
        return float(max(np.abs(x).max() for x in self.nodes))

    @cached_property
    def jacobi(self) -> tuple[Jacobi, ...]:
        """The Jacobi matrix of each probe's measure; empty for a bare measure."""
        return tuple(jacobi for run in self.runs for jacobi in run.jacobi)

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

        Shapes are that of ``x``. Costs one tridiagonal eigenproblem of order ``m + 1`` per point and probe.

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

        By default each node has a width of its own, tied to the distance of its neighbours: half that to the next node
        of one probe's rule, see `smoothing.Atoms.widths`. A number is the width of all nodes. Units are those of the
        eigenvalues, and of their inverse for the density. Costs ``grid * nodes`` exponentials.

        Raises
        ------
        ProblemError
            If ``sigma`` is not positive and finite.
        """
        points = _points(grid)
        if sigma is not None and not (sigma > 0.0 and math.isfinite(sigma)):
            raise ProblemError(f"sigma must be positive and finite, got {sigma!r}; pass a width in eigenvalue units")
        atoms = atoms_of(self.nodes, self.weights, [run.ritz for run in self.runs])
        widths = atoms.widths() if sigma is None else np.full(atoms.places.size, sigma)
        return smoothed_density(points.ravel(), atoms, widths).reshape(points.shape)

    @cached_property
    def outliers(self) -> Outliers:
        """The eigenvalues that stand apart from the bulk, and their number; see `outliers.find_outliers` for the rule.

        Of several runs: what the first says alone, as of the extreme eigenvalues. Costs 26 points of the matrix mass,
        ``2 k b^2`` operations each, for each outlier.
        """
        if not self.runs:
            return unknown_outliers(self.nodes[0], "a bare measure says nothing of single eigenvalues")
        return find_outliers(self.runs[0].ritz, self.runs[0].missed)

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
        """Return the estimate of the largest eigenvalue of ``sign * H``.

        How far beyond it an eigenvalue can hide is what the first run says, alone: the least of what several say would
        be wrong more often than any of them.
        """
        extremes = [float((sign * x).max()) for x in self.nodes]
        value = max(extremes)
        if not self.runs:
            return Estimate(value, min(extremes), value, "the nodes of the measure, range over its probes")
        method = (
            "room that the moments leave for an eigenvalue the probes have missed" if self.random else "residual norm"
        )
        beyond = extremes[0] + self.runs[0].missed[0 if sign < 0.0 else 1]
        noise = self.noise + self.shift.largest
        return Estimate(value, value - noise, max(value, beyond) + noise, f"{method}, and noise")

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
        if not self.runs:
            means = [float(w @ x) for x, w in self.pairs]
            margin = 2.0 * standard_error_of_mean(means)
        else:
            mean, margin = mean + self.converged.correction(np.positive), self.mean_error
        return Estimate(self.size * mean, self.size * (mean - margin), self.size * (mean + margin), self._sampled)

    @property
    def frobenius_norm(self) -> Estimate:
        """``||H||_F``, the root of the sum of squares: as the trace is estimated, that of ``H^2``.

        Raises
        ------
        ProblemError
            If the measure does not know the size of the matrix.
        """
        if self.size is None:
            raise ProblemError("the norm needs the order of the matrix, got size=None; pass size=n to SpectralMeasure")
        square = self._second_moment
        if not self.runs:
            squares = [float(w @ x**2) for x, w in self.pairs]
            margin = 2.0 * standard_error_of_mean(squares)
        else:
            square += self.converged.correction(np.square)
            fourth = sum(run.unconverged_fourth * run.probes for run in self.runs) / self.probes
            sampled = self.sampling.two_standard_errors(fourth, self.largest_unconverged**2)
            rounding = 2.0 * self.mean_rounding * math.sqrt(self._second_moment)
            margin = sampled + self.converged.uncertainty(np.square) + rounding
        ends = (square, square - margin, square + margin)
        value, low, high = (math.sqrt(self.size * max(end, 0.0)) for end in ends)
        shift = math.sqrt(self.size) * self.shift.average
        return Estimate(value, max(low - shift, 0.0), high + shift, self._sampled)

    def share_between(self, low: float, high: float) -> Estimate:
        """Return the share of the eigenvalues in ``[low, high]``; either end may be infinite.

        Follows from `cdf_bounds` at the ends, with converged eigenvalues counted exactly and two standard errors of the
        others. Costs what `cdf_bounds` does.

        Raises
        ------
        ProblemError
            If ``low`` is not below or at ``high``.
        """
        low, high = _number("low", low), _number("high", high)
        if not low <= high:
            raise ProblemError(f"low is {low!r} and high is {high!r}; wanted low <= high")
        below, up_to = self._band(np.array([low, high]))
        inside = max(0.0, below[1] - up_to[0]), max(0.0, min(1.0, up_to[1] - below[0]))
        if not self.runs:
            shares = [float(w @ ((low <= x) & (x <= high))) for x, w in self.pairs]
            error, moved, rest = 2.0 * standard_error_of_mean(shares), 0.0, 0.0
        else:
            moved, rest, uncertain = self._converged_between(low, high, inside)
            error = self.sampling.two_standard_errors(rest, 1.0) + uncertain
        ends = (0.5 * (inside[0] + inside[1]), inside[0] - error, inside[1] + error)
        value, least, most = (min(max(end + moved, 0.0), 1.0) for end in ends)
        return Estimate(value, least, most, self._sampled)

    def _band(self, points: Array) -> tuple[Array, Array]:
        """Return `cdf_bounds` at points that may be infinite."""
        finite = np.isfinite(points)
        below, up_to = (np.where(points > 0.0, 1.0, 0.0) for _ in range(2))
        if finite.any():
            below[finite], up_to[finite] = self.cdf_bounds(points[finite])
        return below, up_to

    def _converged_between(self, low: float, high: float, inside: tuple[float, float]) -> tuple[float, float, float]:
        """Return what converged eigenvalues add to the probes' share, what the variance is of, and the uncertainty."""
        known = self.converged
        clear = (
            np.minimum(np.abs(known.eigenvalues - low), np.abs(known.eigenvalues - high))
            > self.noise + self.shift.largest
        )
        within = (low < known.eigenvalues) & (known.eigenvalues < high)
        # The share and its complement are estimated alike; better is the one of which less is left to the probes.
        choices = []
        for sign, part, most in ((1.0, clear & within, inside[1]), (-1.0, clear & ~within, 1.0 - inside[0])):
            moved = sign * float((known.share - known.seen)[part].sum())
            uncertain = float((2.0 * known.angle * (known.seen + known.share))[part].sum())
            choices.append((max(most - float(known.seen[part].sum()), 0.0), moved, uncertain))
        rest, moved, uncertain = min(choices)
        return moved, rest, uncertain

    def count_above(self, x: float) -> Estimate:
        """Return the number of eigenvalues above ``x``, in whole numbers.

        From `share_between`, and not less than the Ritz values of a run above ``x``, by more than the noise: in a basis
        kept orthogonal, there are at least as many eigenvalues (Cauchy's interlacing theorem).

        Raises
        ------
        ProblemError
            If the measure does not know the size of the matrix, or ``x`` is not finite.
        """
        if self.size is None:
            raise ProblemError("a number needs the order of the matrix, got size=None; pass size=n to SpectralMeasure")
        point = float(_points(_number("x", x)))
        share = self.share_between(math.nextafter(point, math.inf), math.inf)
        rounding = self.size * SHARE_ROUNDING * max(nodes.size for nodes in self.nodes)
        certain = [
            int(np.count_nonzero(run.ritz.values > point + self.noise + self.shift.largest))
            for run in self.runs
            if run.tridiagonal.reorthogonalization in ORTHOGONAL_MODES
        ]
        least = max([0, *certain, math.ceil(self.size * share.low - rounding)])
        most = max(least, math.floor(self.size * share.high + rounding))
        return Estimate(float(min(max(round(self.size * share.value), least), most)), least, most, share.method)

    @property
    def _sampled(self) -> str:
        """What an interval with a sampling error accounts for."""
        if not self.runs:
            return "two standard errors over the measure's probes"
        return "two standard errors of the random probes" if self.random else "rounding; the probes were given"

    @property
    def mean_rounding(self) -> float:
        """Allowance of the mean for rounding and noise.

        An error ``r`` of a unit probe ``z`` moves ``z^T H z`` by ``2 r ||H z||``; the recurrence error is the noise of
        such a product.
        """
        noise = max([matrix.recurrence_error or 0.0 for matrix in self.tridiagonals], default=0.0)
        return 2.0 * self.rounding * math.sqrt(self._second_moment) + noise + self.shift.mean

    @property
    def shift(self) -> ProductError:
        """How far eigenvalues may be from those that exact products would show, as far as this was measured."""
        shifts = [(one.largest, one.average, one.mean) for one in (matrix.shift for matrix in self.tridiagonals)]
        return ProductError(*(max(values) for values in zip(*shifts, (0.0, 0.0, 0.0), strict=True)))

    @property
    def mean_error(self) -> float:
        """Two standard errors of the mean eigenvalue, with converged eigenvalues exact, and the allowances."""
        sampled = 2.0 * self.sampling.bound(self.unconverged_square_bound)
        return sampled + self.mean_rounding + self.converged.uncertainty(np.positive)

    @property
    def random(self) -> bool:
        """Whether the probes are random, so that a sampling error is known."""
        return bool(self.runs) and all(run.ritz.random for run in self.runs)

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
        if not self.runs:
            return square
        return sum(run.unconverged_square * run.probes for run in self.runs) / self.probes + self.rounding * square

    @property
    def largest_unconverged(self) -> float:
        """The largest magnitude of an eigenvalue that has not converged, hidden ones included."""
        candidates = [0.0]
        for values, mask in [(run.ritz.values, run.converged.mask) for run in self.runs]:
            candidates += np.abs(values[~mask]).tolist()
            candidates += [] if mask[0] else [-self.lambda_min.low]
            candidates += [] if mask[-1] else [self.lambda_max.high]
        return max(candidates) if self.runs else self.largest_magnitude

    @cached_property
    def _second_moment(self) -> float:
        """``||H z||^2 / ||z||^2`` averaged over the probes, exact also after one step."""
        if not self.runs:
            return self.moment(2)
        return sum(run.second_moment * run.probes for run in self.runs) / self.probes

    def _merged(self) -> tuple[Array, Array]:
        """Return the nodes of all probes in ascending order and their weights in the mean measure."""
        nodes = np.concatenate(self.nodes)
        weights = np.concatenate(self.weights) / self.probes
        order = np.argsort(nodes, kind="stable")
        return nodes[order], weights[order]


def _check_runs(tridiagonals: Sequence[BlockTridiagonal]) -> None:
    """Raise a ProblemError unless the matrices are those of runs that can be averaged."""
    for matrix in tridiagonals:
        if not isinstance(matrix, BlockTridiagonal):
            raise ProblemError(f"from_tridiagonal got {type(matrix).__name__}; give what block_lanczos returns")
    if not tridiagonals:
        raise ProblemError("from_tridiagonal got no matrix; give what block_lanczos returns")
    if len(tridiagonals) == 1:
        return
    sizes = sorted({matrix.size for matrix in tridiagonals})
    if len(sizes) > 1:
        raise ProblemError(f"the runs are on matrices of orders {sizes}; wanted runs on one operator")
    for matrix in tridiagonals:
        if matrix.probe_kind not in RANDOM_PROBES:
            raise ProblemError(
                f"a run has probe_kind={matrix.probe_kind!r}; several runs are averaged only if all probes are random"
            )


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


def _number(name: str, value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError) as error:
        raise ProblemError(f"{name} is {value!r}; wanted a number") from error


def _points(x: npt.ArrayLike) -> Array:
    points = np.asarray(x, dtype=np.float64)
    if not np.isfinite(points).all():
        raise ProblemError("a point of evaluation is not finite; pass finite eigenvalue positions")
    return points


def _readonly(array: Array) -> Array:
    array.flags.writeable = False
    return array
