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

CHUNK = 32
"""Distances tried at once."""

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
    from a converged Ritz value is a few residual norms. Costs up to ``139 k b^2`` operations, and a bisection.

    References
    ----------
    The matrix mass at a point: Golub and Meurant, 2010, section 6.6; its use as a bound is ours.
    """
    coupling, values = ritz.tridiagonal.offdiagonal[-1], ritz.values
    if coupling.shape[1] == 0:
        return 0.0
    # the Ritz values may cancel where the products do not: one step from a probe with z^T H z = 0
    scale = max(float(np.abs(values).max()), float(np.linalg.norm(coupling, 2)))
    if scale == 0.0:
        return 0.0
    offsets = (values - float(values[-1] if side > 0 else values[0])) / scale
    # the chi-squared quantile; scipy.stats has it by name, and takes long to import
    needed = 2.0 * float(scipy.special.gammaincinv(ritz.tridiagonal.probes / 2, HIDING_RISK))
    couplings = ritz.couplings / scale

    def has_room(distances: Array) -> Array:
        return np.asarray(matrix_masses(ritz.seen, couplings, 1.0 / (offsets - side * distances[:, None])) >= needed)

    last = -1
    for end in range(DISTANCES.size, 0, -CHUNK):  # from far away, where there is no room
        begin = max(end - CHUNK, 0)
        possible = np.flatnonzero(has_room(DISTANCES[begin:end]))
        if possible.size:
            last = begin + int(possible[-1])
            break
    if last < 0:
        return 0.0
    if last + 1 == DISTANCES.size:
        return float("inf")
    low, high = float(DISTANCES[last]), float(DISTANCES[last + 1])
    for _ in range(BISECTIONS):
        middle = float(np.sqrt(low * high))
        low, high = (middle, high) if has_room(np.array([middle]))[0] else (low, middle)
    return high * scale


def matrix_masses(seen: Array, couplings: Array, inverse: Array) -> Array:
    """Return ``||M(x)||`` at each point, from the diagonals of ``D`` there: shape (points, k)."""
    columns = couplings.shape[1]
    # I + B^T D^2 B = R^T R, without forming it: its condition would be that of D B squared.
    unit = np.broadcast_to(np.eye(columns), (len(inverse), columns, columns))
    stacked = np.concatenate((unit, couplings * inverse[:, :, None]), axis=1)
    factors: Array = np.asarray(np.linalg.qr(stacked, mode="r"))
    images = (seen * inverse[:, None, :]) @ couplings
    visible = np.linalg.solve(factors.swapaxes(1, 2), images.swapaxes(1, 2))
    return np.asarray(np.linalg.norm(visible, 2, axis=(1, 2)) ** 2)
