"""Differences of gradients at moved weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hesd_fast.hvp.second_derivatives import Gradient
from hesd_fast.problem.differentiation import naming_refusals
from hesd_fast.problem.loss_term import LossTerm
from hesd_fast.problem.parameters import norm_of
from hesd_fast.problem.prepared_problem import PreparedProblem


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


def gradient_at(problem: PreparedProblem, term: LossTerm, direction: Tensor, step: float) -> Moved:
    """Return one batch's gradient at the weights w + step v; ``direction`` is v, (n,).

    Raises
    ------
    OperatorError
        If PyTorch cannot compute the loss or differentiate it there.
    """
    with (
        problem.moved(problem.unflatten(direction), step) as distance,
        naming_refusals(
            lambda said: (
                f"the gradient of batch {term.index} cannot be computed where the weights are moved a little, for a "
                f"difference of gradients: {said}"
            )
        ),
    ):
        gradient = Gradient.first_order(problem, term.evaluate_moved())
    return Moved(gradient, distance)


def central_difference(problem: PreparedProblem, term: LossTerm, direction: Tensor, step: float) -> Tensor:
    """Return (g(w + h v) - g(w - h v)) / 2 h, divided by the step that rounding has left; NaN where none is left."""
    behind, ahead = (gradient_at(problem, term, direction, sign * step) for sign in (-1.0, 1.0))
    return quotient(behind, ahead)


def quotient(behind: Moved, ahead: Moved) -> Tensor:
    """Return the difference of two gradients over the distance between them."""
    distance = ahead.distance - behind.distance
    if distance == 0.0:
        return torch.full_like(ahead.gradient, torch.nan)
    return (ahead.gradient - behind.gradient) / distance


def lengths_of_weights(problem: PreparedProblem) -> list[float]:
    """Return the norm of each parameter, or 1 if that is more."""
    return [max(norm_of([weight.detach()]), 1.0) for weight in problem.parameters.values()]


def unit_step(lengths: Sequence[float], direction: Sequence[Tensor]) -> float:
    """Return the multiple of a vector that is as long as the weights in the parameter that it moves most.

    What steps are relative to; each parameter may have a scale of its own.

    Parameters
    ----------
    lengths : list of float
        Those of the weights, see :func:`lengths_of_weights`.
    direction : list of tensor
        The vector's part for each parameter.
    """
    pairs = [(own, norm_of([part])) for own, part in zip(lengths, direction, strict=True)]
    return min((own / length for own, length in pairs if length), default=0.0)
