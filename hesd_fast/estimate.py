"""A number together with the interval it is known to."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Estimate:
    """A value and the interval ``[low, high]`` that contains it.

    Attributes
    ----------
    value : float
        The point estimate.
    low, high : float
        The ends of the interval; either may be infinite.
    method : str
        One phrase saying what the interval accounts for.

    Examples
    --------
    >>> import hesd_fast as hesd
    >>> estimate = hesd.Estimate(3.0, 2.5, 3.25, "two standard errors")
    >>> print(estimate)
    3 [2.5, 3.25]
    >>> print(f"{-estimate:.2f}")
    -3.00 [-3.25, -2.50]
    """

    value: float
    low: float
    high: float
    method: str = ""

    def __post_init__(self) -> None:
        ordered = self.low <= self.value <= self.high
        if not ordered and not any(math.isnan(x) for x in (self.value, self.low, self.high)):
            raise ValueError(
                f"an Estimate needs low <= value <= high, got low={self.low!r}, "
                f"value={self.value!r}, high={self.high!r}"
            )

    def __neg__(self) -> Estimate:
        return Estimate(-self.value, -self.high, -self.low, self.method)

    def __format__(self, spec: str) -> str:
        spec = spec or ".4g"
        return f"{self.value:{spec}} [{self.low:{spec}}, {self.high:{spec}}]"

    def __str__(self) -> str:
        return format(self)


@dataclass(frozen=True)
class ProductError:
    """How far eigenvalues of two matrices are apart, the i-th of one from the i-th of the other, at most.

    Attributes
    ----------
    largest : float
        Of any eigenvalue; the spectral norm of the difference of the matrices (Weyl).
    average : float
        The mean over all eigenvalues of their distances; the Frobenius norm over the root of n (Hoffman and Wielandt).
    mean : float
        The distance of the mean eigenvalues.

    References
    ----------
    Horn and Johnson, *Matrix Analysis*, 2013, corollaries 4.3.15 and 6.3.8.
    """

    largest: float
    average: float
    mean: float

    def __str__(self) -> str:
        return f"ProductError({self.largest:.4g}, {self.average:.4g}, {self.mean:.4g})"

    def __post_init__(self) -> None:
        if not all(0.0 <= value < math.inf for value in (self.largest, self.average, self.mean)):
            raise ValueError(f"a ProductError needs numbers that are finite and not negative, got {self}")
