"""How wide a Gaussian smooths each node of a quadrature, so that a density shows what the quadrature resolves."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from hesd_fast.lanczos.block_tridiagonal import ORTHOGONAL_MODES, Array
from hesd_fast.spectrum.ritz_pairs import RitzPairs

WIDTH = 0.5
"""Standard deviation of a node's Gaussian, in distances between the nodes of one probe's rule.

Equal Gaussians of half their distance add up to a constant within 1.4 %. Narrower ones show the nodes instead of the
density, wider ones blur it without need.
"""

BROADEST = 0.02
"""Width up to which a node is smoothed whose eigenvalue is known, relative to the distance of the extreme nodes."""

ENOUGH = 64.0
"""Squares of random numbers that a node shares its Gaussian with on either side, so that they average out.

A probe sees an eigenvalue by the square of one random number; the relative standard error of the density is about
``sqrt(1.1 / ENOUGH)``, an eighth. Nodes of an unresolved bulk stand for many eigenvalues each, and need no others.
"""

SMALLEST = 1e-12
"""Width below which nothing is drawn, relative to the largest magnitude."""

CHUNK_ENTRIES = 1 << 20


@dataclass(frozen=True, eq=False)
class Atoms:
    """Places that carry weight on an axis: that of the eigenvalues, or an increasing function of it.

    Attributes
    ----------
    places, weights : ndarray, shape (k,)
        Ascending places and their weights, averaged over the probes.
    errors : ndarray, shape (k,)
        How far off the next eigenvalue may be, from the residual norm; zero for a bare measure.
    noise : ndarray, shape (k,)
        How far rounding and noisy products may have moved the place.
    neighbours : int
        How many places further on the next node of a single probe's rule is: ``b`` for a block of ``b`` probes.
    enough : float
        Weight that `ENOUGH` random numbers see, ``ENOUGH / (n b)``; zero where the weights are not random.
    """

    places: Array
    weights: Array
    errors: Array
    noise: Array
    neighbours: int
    enough: float

    def on_axis(self, axis: Callable[[Array], Array]) -> Atoms:
        """Return the same on another axis, given the increasing function that maps eigenvalues to it."""
        errors, noise = (0.5 * (axis(self.places + x) - axis(self.places - x)) for x in (self.errors, self.noise))
        return Atoms(axis(self.places), self.weights, errors, noise, self.neighbours, self.enough)

    def where(self, kept: npt.NDArray[np.bool_]) -> Atoms:
        """Return those of a mask, shape (k,)."""
        return Atoms(
            self.places[kept], self.weights[kept], self.errors[kept], self.noise[kept], self.neighbours, self.enough
        )

    def reflected(self) -> Atoms:
        """Return the atoms of the measure of ``-H``."""
        places, weights, errors, noise = (x[::-1] for x in (-self.places, self.weights, self.errors, self.noise))
        return Atoms(places, weights, errors, noise, self.neighbours, self.enough)

    def widths(self) -> Array:
        """Return the standard deviation of the Gaussian that smooths each place, shape (k,); all are positive.

        It is half the distance to a neighbour, on the side where that is nearer. The neighbour is the next node of one
        probe's rule, because a rule of ``m`` nodes knows no detail between them, or farther off where so few random
        numbers lie between that their average is not the density, see `ENOUGH`. A place with no such neighbour near is
        smoothed by what its eigenvalue is uncertain by, or by `BROADEST` of the range of all places where that is more:
        an eigenvalue far from all others stays a peak. Nothing is smoothed by less than rounding and noise have moved
        it.

        References
        ----------
        One width for all nodes, from the number of steps: Lin, Saad, Yang, *Approximating spectral densities of large
        matrices*, SIAM Review 58(1), 2016. Widths that follow the nodes are ours.
        """
        nearer = np.minimum(self._ahead(), self.reflected()._ahead()[::-1])
        magnitude = float(np.abs(self.places).max())
        broadest = BROADEST * (float(self.places[-1] - self.places[0]) or magnitude or 1.0)
        known = np.minimum(WIDTH * nearer, np.maximum(self.errors, broadest))
        return np.asarray(np.maximum(known, np.maximum(self.noise, min(SMALLEST * magnitude or broadest, broadest))))

    def _ahead(self) -> Array:
        """Return the distance of each place to the neighbour above it that its width follows, or infinity."""
        count = self.places.size
        seen = np.cumsum(self.weights)
        neighbour = np.maximum(np.arange(count) + self.neighbours, np.searchsorted(seen, seen + self.enough))
        distances = np.append(self.places, np.inf)[np.minimum(neighbour, count)] - self.places
        return np.asarray(distances)


def atoms_of(nodes: Sequence[Array], weights: Sequence[Array], runs: Sequence[RitzPairs]) -> Atoms:
    """Return the atoms of a measure: the Ritz values of its runs, or the nodes of all probes of a bare measure."""
    probes = len(nodes)
    if not runs:
        places, index = np.unique(np.concatenate(nodes), return_inverse=True)
        mean = np.bincount(index.ravel(), weights=np.concatenate(weights) / probes).astype(np.float64)
        nothing = np.zeros(places.size)
        neighbours = max(1, round(places.size * probes / sum(map(len, nodes))))
        return Atoms(places, mean, nothing, nothing, neighbours, 0.0)
    columns = np.concatenate([_columns(run, probes) for run in runs], axis=1)
    enough = ENOUGH / (runs[0].tridiagonal.size * probes) if all(run.random for run in runs) else 0.0
    places, shares, errors, noise = columns[:, np.argsort(columns[0], kind="stable")]
    return Atoms(places, shares, errors, noise, probes, enough)


def _columns(run: RitzPairs, probes: int) -> Array:
    """Return places, their weights in the mean over so many probes, errors and noise of a run, shape (4, k)."""
    values, shares = run.values, run.weights.sum(axis=0) / probes
    noise = run.tridiagonal.noise(float(np.abs(values).max()))
    # copies of an eigenvalue share its weight, and would count as near neighbours of each other
    copies = run.tridiagonal.reorthogonalization not in ORTHOGONAL_MODES
    first = np.flatnonzero(np.diff(values, prepend=-np.inf) > (noise if copies else -1.0))
    errors = np.minimum.reduceat(run.residuals, first)
    return np.stack((values[first], np.add.reduceat(shares, first), errors, np.full(first.size, noise)))


def smoothed_density(points: Array, atoms: Atoms, widths: Array) -> Array:
    """Return the density at each point, shape (r,), with a Gaussian of its own width for each atom.

    Costs ``r * k`` exponentials.
    """
    heights = atoms.weights / (widths * math.sqrt(2.0 * math.pi))
    density = np.empty(points.size)
    chunk = max(1, CHUNK_ENTRIES // atoms.places.size)
    for begin in range(0, points.size, chunk):
        scaled = (points[begin : begin + chunk, None] - atoms.places) / widths
        density[begin : begin + chunk] = np.exp(-0.5 * scaled**2) @ heights
    return density
