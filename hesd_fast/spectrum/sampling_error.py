"""How far estimates from random probes are from the matrix that the probes are of."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from hesd_fast.spectrum.converged_eigenvalues import ConvergedEigenvalues
from hesd_fast.spectrum.ritz_pairs import RitzPairs

FEWEST_STEPS = 3
"""Steps from which the quadrature of a fourth power is near enough."""


def standard_error_of_mean(values: Sequence[float]) -> float:
    """Return the standard error of the mean of independent values; zero for a single one."""
    if len(values) < 2:
        return 0.0
    return float(np.std(values, ddof=1) / math.sqrt(len(values)))


@dataclass(frozen=True)
class SamplingError:
    """Bounds of the standard error of ``trace f(H) / n`` as the mean over random probes estimates it.

    Attributes
    ----------
    entries : int
        Random numbers in all probes, ``n b``; 0 for probes that are taken as they are, which have no such error.
    """

    entries: int

    def bound(self, square: float) -> float:
        """Return the standard error's bound, given the integral of ``f^2``.

        It is ``sqrt(2 * square / (n b))``: for Rademacher probes the variance of ``z^T f(H) z / n`` is at most ``2
        ||f(H)||_F^2 / n^2``, and the probes are independent.
        """
        return math.sqrt(2.0 * square / self.entries) if self.entries else 0.0

    def two_standard_errors(self, square: float, largest: float) -> float:
        """Return two standard errors, given the probes' own integral of ``f^2`` and ``max |f|``.

        Probes that miss an outlier also miss its share of the variance. Two standard errors of the integral of ``f^2``,
        which follow from ``f^4 <= max|f|^2 f^2``, are therefore added to it.
        """
        return 2.0 * self.bound(square + 2.0 * largest * self.bound(square))

    def unconverged_square(
        self, ritz: RitzPairs, converged: ConvergedEigenvalues, square: float, largest: float
    ) -> float:
        """Return an upper estimate of the sum of squares, over n, of the eigenvalues that have not converged.

        It is the probes' second moment ``square`` without the converged eigenvalues, and two of its own standard
        errors, for eigenvalues of magnitude ``largest`` at most.
        """
        rest = ~converged.mask
        left = max(square - float(converged.eigenvalues**2 @ converged.seen), 0.0)
        fourth = float(ritz.weights.mean(axis=0)[rest] @ ritz.values[rest] ** 4)
        if ritz.tridiagonal.steps < FEWEST_STEPS and not ritz.tridiagonal.breakdown:
            fourth = max(fourth, largest**2 * left)
        return left + 2.0 * self.bound(fourth)
