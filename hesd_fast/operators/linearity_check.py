"""An operator whose first panel is used to check that it is one fixed linear map."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hesd_fast.operators.base import CurvatureOperator
from hesd_fast.problem.parameters import norm_of

CHECK_VECTORS = 3
"""Vectors of memory that a check takes, beside the first panel."""


class CheckedOperator:
    """Passes products on; after the first panel, multiplies a combination of its vectors twice.

    A Hessian is linear, H (sum of c_j v_j) = sum of c_j H v_j, and the same each time. Both are measured relative to
    the norm of the product, at the cost of two products and three vectors of memory.

    Attributes
    ----------
    linearity, repetition : float or None
        The largest deviations seen; None before the first panel, or where the product of the combination is zero.
    gain : float
        Norm of that product relative to the combination's.
    """

    def __init__(self, operator: CurvatureOperator) -> None:
        self._operator = operator
        self.linearity: float | None = None
        self.repetition: float | None = None
        self.gain = 0.0
        self._checked = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._operator, name)

    @property
    def size(self) -> int:
        """Return n."""
        return self._operator.size

    @property
    def dtype(self) -> torch.dtype:
        """Return the precision of panels."""
        return self._operator.dtype

    @property
    def device(self) -> torch.device:
        """Return where panels are."""
        return self._operator.device

    @property
    def products(self) -> int:
        """Return how many vectors have been multiplied so far."""
        return self._operator.products

    def matmat(self, panel: Tensor, out: Tensor | None = None) -> Tensor:
        """Multiply a panel, see :meth:`OperatorBase.matmat`."""
        out = self._operator.matmat(panel, out=out)
        if not self._checked:
            self._checked = True
            self._check(panel, out)
        return out

    def _check(self, panel: Tensor, products: Tensor) -> None:
        combination = combination_of(panel)
        first, second = self._operator.matmat(combination), self._operator.matmat(combination)
        self.linearity, self.repetition, self.gain = deviations(products, first, second, combination)


Deviations = tuple[float | None, float | None, float]
"""From linearity and from repetition, and the gain; see :func:`deviations`."""


def combination_of(panel: Tensor) -> Tensor:
    """Return the sum (1, n) of the vectors of a panel, with coefficients 3, 4, 5 and so on."""
    return _coefficients(panel) @ panel


def deviations(products: Tensor, first: Tensor, second: Tensor, combination: Tensor) -> Deviations:
    """Return how far two products of a panel's combination, which are overwritten, are from linear and from each other.

    Both relative to the norm of the first, None where that is zero; and that norm relative to the combination's.
    """
    norm = norm_of([first])
    if norm == 0.0:
        return None, None, 0.0
    gain = norm / norm_of([combination])
    repetition = norm_of([second.sub_(first)]) / norm
    residual = first.addmm_(_coefficients(products), products, alpha=-1.0)
    return norm_of([residual]) / norm, repetition, gain


def _coefficients(panel: Tensor) -> Tensor:
    return torch.arange(3, 3 + len(panel), dtype=panel.dtype, device=panel.device)[None]
