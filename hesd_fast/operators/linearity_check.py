"""Whether products are those of one fixed linear map, seen on the first panels of a run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from hesd_fast.problem.parameters import norm_of

CHECK_VECTORS = 3
"""Vectors of memory that a check takes, beside the first panel."""


class Deviations(NamedTuple):
    """How far two products of a panel's combination are from linear and from each other.

    Attributes
    ----------
    linearity, repetition : float or None
        Relative to the norm of the first; None where that is zero.
    gain : float
        That norm relative to the combination's.
    """

    linearity: float | None
    repetition: float | None
    gain: float


class LinearityCheck:
    """Multiplies a combination of the vectors of each first panel twice.

    A Hessian is linear, H (sum of c_j v_j) = sum of c_j H v_j, and the same each time. Both are measured at the cost of
    two products and three vectors of memory for each panel.

    Parameters
    ----------
    multiply : callable
        Takes panels and where their products belong, both by name.

    Attributes
    ----------
    found : dict of str to Deviations
        By the name of the panel.
    """

    def __init__(self, multiply: Callable[[Mapping[str, Tensor], Mapping[str, Tensor]], object]) -> None:
        self._multiply = multiply
        self.found: dict[str, Deviations] = {}

    def __call__(self, panels: Mapping[str, Tensor], products: Mapping[str, Tensor]) -> None:
        """Check panels with their products, the first time that this is called."""
        if self.found:
            return
        combinations = {name: _coefficients(panel) @ panel for name, panel in panels.items()}
        first, second = ({name: torch.empty_like(one) for name, one in combinations.items()} for _ in range(2))
        for outs in (first, second):
            self._multiply(combinations, outs)
        self.found = {
            name: deviations(products[name], first[name], second[name], combinations[name]) for name in panels
        }


def deviations(products: Tensor, first: Tensor, second: Tensor, combination: Tensor) -> Deviations:
    """Return the deviations of two products (1, n) of a panel's combination, which are overwritten."""
    norm = norm_of([first])
    if norm == 0.0:
        return Deviations(None, None, 0.0)
    gain = norm / norm_of([combination])
    repetition = norm_of([second.sub_(first)]) / norm
    residual = first.addmm_(_coefficients(products), products, alpha=-1.0)
    return Deviations(norm_of([residual]) / norm, repetition, gain)


def _coefficients(panel: Tensor) -> Tensor:
    """Return 3, 4, 5 and so on, one for each vector of a panel (1, b)."""
    return torch.arange(3, 3 + len(panel), dtype=panel.dtype, device=panel.device)[None]
