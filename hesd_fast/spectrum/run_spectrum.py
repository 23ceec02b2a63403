"""What one run of block Lanczos says of the spectrum."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from hesd_fast.lanczos.block_tridiagonal import BlockTridiagonal
from hesd_fast.spectrum.converged_eigenvalues import ConvergedEigenvalues, find_converged
from hesd_fast.spectrum.extreme_eigenvalues import missed_eigenvalue_distance
from hesd_fast.spectrum.jacobi_matrix import Jacobi, jacobi_matrices
from hesd_fast.spectrum.ritz_pairs import RitzPairs
from hesd_fast.spectrum.sampling_error import FEWEST_STEPS, SamplingError


@dataclass(frozen=True, eq=False)
class RunSpectrum:
    """The Ritz pairs of a run and what follows from them, each computed when it is first asked for."""

    ritz: RitzPairs

    @classmethod
    def of(cls, tridiagonal: BlockTridiagonal) -> RunSpectrum:
        """Return the spectrum of a run; a ProblemError for a probe that is zero."""
        return cls(RitzPairs.of(tridiagonal))

    @property
    def tridiagonal(self) -> BlockTridiagonal:
        """The matrix that the run has left."""
        return self.ritz.tridiagonal

    @property
    def probes(self) -> int:
        """Number of probes ``b``."""
        return self.tridiagonal.probes

    @property
    def largest_magnitude(self) -> float:
        """The largest ``|Ritz value|``."""
        return float(np.abs(self.ritz.values).max())

    @property
    def noise(self) -> float:
        """How far rounding and noisy products may have moved a Ritz value."""
        return self.tridiagonal.noise(self.largest_magnitude)

    @cached_property
    def converged(self) -> ConvergedEigenvalues:
        """Which Ritz values are eigenvalues with known eigenvectors, whose share is 1/n exactly."""
        return find_converged(self.ritz)

    @cached_property
    def jacobi(self) -> tuple[Jacobi, ...]:
        """The Jacobi matrix of each probe's measure."""
        return jacobi_matrices(self.ritz)

    @cached_property
    def missed(self) -> tuple[float, float]:
        """How far below the smallest and above the largest Ritz value an eigenvalue may lie.

        For probes that are not random, the residual norms: some eigenvalue lies within them, not certainly the extreme.
        """
        if not self.ritz.random:
            return float(self.ritz.residuals[0]), float(self.ritz.residuals[-1])
        return missed_eigenvalue_distance(self.ritz, -1.0), missed_eigenvalue_distance(self.ritz, 1.0)

    @cached_property
    def second_moment(self) -> float:
        """``||H z||^2 / ||z||^2`` averaged over the probes, exact also after one step."""
        # alpha_1^2 + beta_1^2 is the second moment of a Jacobi matrix, beta_1 known even if no second step was taken.
        return float(np.mean([j.diagonal[0] ** 2 + j.offdiagonal[0] ** 2 for j in self.jacobi]))

    @property
    def sampling(self) -> SamplingError:
        """How far the probes' means are from those of the matrix; nothing for those that are not random."""
        return SamplingError(self.tridiagonal.size * self.probes if self.ritz.random else 0)

    @property
    def unconverged_square(self) -> float:
        """An upper estimate of the sum of squares, over n, of the eigenvalues that have not converged."""
        largest = self.largest_magnitude + max(self.missed)
        return self.sampling.unconverged_square(self.ritz, self.converged, self.second_moment, largest)

    @property
    def unconverged_fourth(self) -> float:
        """The mean fourth power, over n, of the eigenvalues that have not converged, as the probes see it."""
        rest = ~self.converged.mask
        fourth = float(self.ritz.weights.mean(axis=0)[rest] @ self.ritz.values[rest] ** 4)
        if self.tridiagonal.steps >= FEWEST_STEPS or self.tridiagonal.breakdown:
            return fourth
        left = max(self.second_moment - float(self.converged.eigenvalues**2 @ self.converged.seen), 0.0)
        return max(fourth, (self.largest_magnitude + max(self.missed)) ** 2 * left)
