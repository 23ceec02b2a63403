"""Converged eigenpairs count exactly: their share of the spectrum is 1/n, whatever the probes saw of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from hesd_fast.lanczos.block_tridiagonal import ORTHOGONAL_MODES, Array
from hesd_fast.spectrum.ritz_pairs import RitzPairs

LARGEST_ANGLE = 1e-3
"""Residual norm over gap, a bound of the sine of a Ritz vector's angle, up to which an eigenpair has converged."""

FEWEST_PROBES = 2
"""With a single probe an eigenvalue of any multiplicity looks like a simple one."""


@dataclass(frozen=True, eq=False)
class ConvergedEigenvalues:
    """The eigenvalues whose eigenvectors are known.

    Probes estimate ``trace f(H) / n`` with a variance of ``2 ||f(H)||_F^2 / (n^2 b)``, most of which comes from a few
    large eigenvalues of which they see too much or too little. Where the eigenvector is known, its part of the estimate
    is replaced by ``f(lambda) / n``; the rest of the variance is that of the other eigenvalues. This is the deflation
    of Gambhir, Stathopoulos, Orginos, SISC 39(2), 2017, and of Hutch++ (Meyer, Musco, Musco, Woodruff, SOSA 2021), at
    no further product.

    Attributes
    ----------
    mask : ndarray of bool, shape (k,)
        Which Ritz values have converged; of several runs, those of one after those of the other.
    eigenvalues : ndarray, shape (q,)
        Those Ritz values.
    seen : ndarray, shape (q,)
        Share of the spectrum that the probes gave to each, averaged over the probes.
    angle : ndarray, shape (q,)
        Bound of the sine of the angle between Ritz vector and eigenvector.
    share : ndarray, shape (q,)
        What each should have: ``1 / n``, in all runs that know the eigenvalue together.
    """

    mask: npt.NDArray[np.bool_]
    eigenvalues: Array
    seen: Array
    angle: Array
    share: Array

    def correction(self, function: Callable[[Array], Array]) -> float:
        """Return what has to be added to the probes' mean of ``trace f(H) / n``."""
        return float(function(self.eigenvalues) @ (self.share - self.seen))

    def uncertainty(self, function: Callable[[Array], Array]) -> float:
        """Return a bound of the correction's error: a vector off by an angle ``a`` changes a share by about ``2 a``."""
        return float(np.abs(function(self.eigenvalues)) @ (2.0 * self.angle * (self.seen + self.share)))


def none_converged(count: int) -> ConvergedEigenvalues:
    """Return what is known of that many nodes of which no eigenvector is."""
    nothing = np.empty(0)
    return ConvergedEigenvalues(np.zeros(count, dtype=np.bool_), nothing, nothing, nothing, nothing)


def pooled(runs: Sequence[tuple[ConvergedEigenvalues, float]]) -> ConvergedEigenvalues:
    """Return what several runs know, each with the part that it has in the mean over all."""
    return ConvergedEigenvalues(
        np.concatenate([one.mask for one, _ in runs]),
        np.concatenate([one.eigenvalues for one, _ in runs]),
        np.concatenate([one.seen * part for one, part in runs]),
        np.concatenate([one.angle for one, _ in runs]),
        np.concatenate([one.share * part for one, part in runs]),
    )


def find_converged(ritz: RitzPairs) -> ConvergedEigenvalues:
    """Return the Ritz values that are simple eigenvalues with known eigenvectors.

    A Ritz value has converged when its residual norm is at most ``LARGEST_ANGLE`` of the distance to its neighbours
    (Parlett, *The Symmetric Eigenvalue Problem*, 1998, theorem 11.7.1). A multiple eigenvalue shows up as several Ritz
    values without a gap, as long as there are two probes whose projections onto its eigenspace differ. None counts
    where copies of converged Ritz values share their weight, without full or partial reorthogonalization, or for probes
    that are not random. Where the basis is the whole space, all have, whatever their multiplicity.
    """
    values, tridiagonal = ritz.values, ritz.tridiagonal
    orthogonal = tridiagonal.reorthogonalization in ORTHOGONAL_MODES
    if ritz.random and tridiagonal.knows_all:
        share = np.full(values.size, 1.0 / values.size)
        seen = ritz.weights.mean(axis=0)
        return ConvergedEigenvalues(np.ones(values.size, dtype=np.bool_), values, seen, np.zeros(values.size), share)
    padded = np.concatenate(([-np.inf], values, [np.inf]))
    gap = np.minimum(values - padded[:-2], padded[2:] - values)
    mask = (gap > 0.0) & (ritz.residuals <= LARGEST_ANGLE * gap)
    if not (orthogonal and ritz.random and tridiagonal.probes >= FEWEST_PROBES) or values.size == 1:
        mask = np.zeros(values.size, dtype=np.bool_)
    seen, angle = ritz.weights.mean(axis=0)[mask], ritz.residuals[mask] / gap[mask]
    return ConvergedEigenvalues(mask, values[mask], seen, angle, np.full(seen.size, 1.0 / tridiagonal.size))
