"""How far beyond the extreme Ritz values an eigenvalue can hide from random probes."""

from __future__ import annotations

import numpy as np
import scipy

from hesd_fast.lanczos.block_tridiagonal import Array
from hesd_fast.spectrum.ritz_pairs import RitzPairs

HIDING_RISK = 0.025
"""Probability, at each end of the spectrum, that the probes are so unlucky that the bound does not hold."""

DISTANCES = np.geomspace(1e-14, 1e9, 139)
"""Distances tried, in units of the largest ``|Ritz value|``: six in each decade."""

LARGEST_SQUARE = 1e6
"""``||D B||_F^2`` up to which ``I + B^T D^2 B`` may be formed; it then loses that many roundoffs."""

BISECTIONS = 20
"""Halvings of the step between two distances tried."""


def missed_eigenvalue_distance(ritz: RitzPairs, side: float) -> float:
    """Return how far beyond the largest (side = 1) or smallest (side = -1) Ritz value the extreme eigenvalue can lie.

    Let ``u`` be its eigenvector and ``g = Z u`` what the probes see of it; the entries of ``g`` have mean square 1. The
    moments that block Lanczos knows leave room for a matrix mass of at most ``M(x)`` at a point ``x`` (the weight of
    the block Gauss-Radau rule with the node ``x``), so an eigenvalue at ``x`` needs ``g g^T <= M(x)``, hence ``||g||^2
    <= ||M(x)||``. Probes are unlikely to see so little: ``||g||^2`` of ``b`` Gaussian entries stays below its
    ``HIDING_RISK`` quantile with that probability only. Exact for Gaussian probes; for Rademacher ones as good as the
    central limit theorem, that is, for eigenvectors spread over many parameters.

    With ``T = S Theta S^T``, ``B = S^T E_m C_{m-1}``, ``D = (Theta - x I)^{-1}``, ``F = L_0 E_1^T S D B`` the mass is
    ``M(x) = F (I + B^T D^2 B)^{-1} F^T``. It falls off like the square of residual norm over distance, so the distance
    from a converged Ritz value is a few residual norms. Costs up to ``139 * 2 k b^2`` operations, and a bisection.

    References
    ----------
    The matrix mass at a point: Golub and Meurant, 2010, section 6.6; its use as a bound is ours.
    """
    values = ritz.values
    scale = ritz.tridiagonal.scale(values)
    if ritz.couplings.shape[1] == 0 or scale == 0.0:
        return 0.0
    offsets = (values - float(values[-1] if side > 0 else values[0])) / scale
    # the chi-squared quantile; scipy.stats has it by name, and takes long to import
    needed = 2.0 * float(scipy.special.gammaincinv(ritz.tridiagonal.probes / 2, HIDING_RISK))
    couplings = ritz.couplings / scale

    def has_room(distance: float) -> bool:
        inverse = 1.0 / (offsets - side * distance)
        seen = (ritz.seen * inverse) @ couplings
        # ||M|| <= ||F||^2
        return float((seen**2).sum()) >= needed and mass_norm(seen, couplings * inverse[:, None]) >= needed

    # ||F|| is at most the sum of the norms of what it sums
    parts = np.linalg.norm(ritz.seen, axis=0) * np.linalg.norm(couplings, axis=1)
    largest = (parts / np.abs(offsets - side * DISTANCES[:, None])).sum(axis=1)
    possible = np.flatnonzero(largest**2 >= needed)
    # from far away, where there is no room: nearer by, room may come and go
    last = next((int(at) for at in possible[::-1] if has_room(float(DISTANCES[at]))), -1)
    if last < 0:
        return 0.0
    if last + 1 == DISTANCES.size:
        return float("inf")
    low, high = float(DISTANCES[last]), float(DISTANCES[last + 1])
    for _ in range(BISECTIONS):
        middle = float(np.sqrt(low * high))
        low, high = (middle, high) if has_room(middle) else (low, middle)
    return high * scale


def mass_norm(seen: Array, couplings: Array) -> float:
    """Return ``||M||``, given ``F`` and ``D B``."""
    unit = np.eye(couplings.shape[1])
    square = couplings.T @ couplings
    if float(np.trace(square)) <= LARGEST_SQUARE:
        factor = np.linalg.cholesky(square + unit)
    else:  # I + B^T D^2 B = R^T R, without forming it: its condition is that of D B squared
        factor = np.asarray(np.linalg.qr(np.concatenate((unit, couplings)), mode="r")).T
    return float(np.linalg.norm(np.linalg.solve(factor, seen.T), 2) ** 2)
