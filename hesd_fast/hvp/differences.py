"""Differences of gradients at moved weights."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hesd_fast.errors import OperatorError, first_line, raised_outside_of_libraries
from hesd_fast.hvp.second_derivatives import Gradient
from hesd_fast.problem.parameters import norm_of
from hesd_fast.problem.problem import LossTerm, Problem


@dataclass(frozen=True)
class Moved:
    """A gradient at moved weights.

    Attributes
    ----------
    gradient : tensor (n,)
        There.
    distance : float
        How far the weights went along the direction, in units of its length, after rounding to their precision.
    """

    gradient: Tensor
    distance: float


def gradient_at(problem: Problem, term: LossTerm, direction: Tensor, step: float) -> Moved:
    """Return one batch's gradient at the weights w + step v; ``direction`` is v, (n,).

    Raises
    ------
    OperatorError
        If PyTorch cannot compute the loss or differentiate it there.
    """
    with problem.moved(problem.unflatten(direction), step) as distance:
        try:
            gradient = Gradient.first_order(problem, term.evaluate_moved())
        except torch.cuda.OutOfMemoryError:
            raise
        except RuntimeError as error:
            if raised_outside_of_libraries(error):
                raise
            raise OperatorError(
                f"the gradient of batch {term.index} cannot be computed where the weights are moved a little, for a "
                f"difference of gradients: {first_line(error)}"
            ) from error
    return Moved(gradient, distance)


def central_difference(problem: Problem, term: LossTerm, direction: Tensor, step: float) -> Tensor:
    """Return (g(w + h v) - g(w - h v)) / 2 h, divided by the step that rounding has left; NaN where none is left."""
    behind, ahead = (gradient_at(problem, term, direction, sign * step) for sign in (-1.0, 1.0))
    return quotient(behind, ahead)


def quotient(behind: Moved, ahead: Moved) -> Tensor:
    """Return the difference of two gradients over the distance between them."""
    distance = ahead.distance - behind.distance
    if distance == 0.0:
        return torch.full_like(ahead.gradient, torch.nan)
    return (ahead.gradient - behind.gradient) / distance


def unit_step(problem: Problem, direction: Tensor) -> float:
    """Return the multiple of a vector (n,) that is as long as the weights, or 1, in the parameter that it moves most.

    What steps are relative to; each parameter may have a scale of its own.
    """
    pairs = zip(problem.parameters.values(), problem.unflatten(direction), strict=True)
    lengths = [(max(norm_of([weight.detach()]), 1.0), norm_of([part])) for weight, part in pairs]
    return min((own / length for own, length in lengths if length), default=0.0)
