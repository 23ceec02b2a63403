"""What a measure keeps of a block tridiagonal matrix's eigenpairs: Ritz values, and the ends of their vectors."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hesd_fast.errors import ProblemError
from hesd_fast.lanczos.block_tridiagonal import Array, BlockTridiagonal
from hesd_fast.lanczos.options import RANDOM_PROBES


@dataclass(frozen=True, eq=False)
class RitzPairs:
    """The eigenpairs ``T = S Theta S^T``, without the vectors ``S``, which may be large.

    Attributes
    ----------
    tridiagonal : BlockTridiagonal
        The matrix ``T``.
    values, residuals : ndarray, shape (k,)
        Ritz values in ascending order and their residual norms.
    seen : ndarray, shape (b, k)
        ``L_0 E_1^T S``: what each probe sees of each Ritz vector.
    couplings : ndarray, shape (k, p_m)
        ``S^T E_m C_{m-1}``: how each Ritz vector couples to the step that was not taken.
    weight_sums : ndarray, shape (b,)
        ``||z_j||^2 / n``, the sum of ``seen^2 / n`` over the Ritz values; 1 for Rademacher probes.
    """

    tridiagonal: BlockTridiagonal
    values: Array
    residuals: Array
    seen: Array
    couplings: Array
    weight_sums: Array

    @classmethod
    def of(cls, tridiagonal: BlockTridiagonal) -> RitzPairs:
        """Return the pairs of a matrix at the cost of its `ritz_ends`; a ProblemError for a probe 0."""
        sums = (tridiagonal.start**2).sum(axis=1) / tridiagonal.size
        if not (sums > 0.0).all():
            raise ProblemError(f"probe {int(np.argmin(sums))} is the zero vector; every probe must have a direction")
        values, seen, couplings = tridiagonal.ritz_ends()
        return cls(tridiagonal, values, tridiagonal.residual_norms(values, couplings), seen, couplings, sums)

    @property
    def weights(self) -> Array:
        """The weights of the quadrature, shape (b, k), those of each probe divided by their sum."""
        return np.asarray(self.seen**2 / self.tridiagonal.size / self.weight_sums[:, None])

    @property
    def random(self) -> bool:
        """Whether the probes are random, so that a sampling error is known."""
        return self.tridiagonal.probe_kind in RANDOM_PROBES
