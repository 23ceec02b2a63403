"""Differences of gradients: the weights are moved where they lie, so that all code that uses them sees it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hesd_fast.errors import OperatorError, first_line, raised_outside_of_libraries
from hesd_fast.hvp.second_derivatives import Gradient
from hesd_fast.parameters import as_real
from hesd_fast.problem import LossTerm, Problem


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


@contextmanager
def moved(parameters: Sequence[nn.Parameter], directions: Sequence[Tensor], step: float) -> Iterator[float]:
    """Let parameters be at w + step v meanwhile, in place and past autograd; gives the step that rounding has left.

    In place, since a backward pass may run the model again (activation checkpoints, adjoint methods), and layers may
    hold their weights in lists. Cost: a copy of the parameters.
    """
    originals = [parameter.detach().clone() for parameter in parameters]
    squares, along = 0.0, 0.0
    try:
        for parameter, original, direction in zip(parameters, originals, directions, strict=True):
            target = (original.to(direction.dtype) + step * direction).to(original.dtype)
            parameter.data.copy_(target)
            gone = target.to(direction.dtype) - original.to(direction.dtype)
            squares += _inner_product(direction, direction)
            along += _inner_product(gone, direction)
        yield along / squares if squares else 0.0
    finally:
        for parameter, original in zip(parameters, originals, strict=True):
            parameter.data.copy_(original)


def _inner_product(one: Tensor, other: Tensor) -> float:
    return float((as_real(one).double() * as_real(other).double()).sum())


def gradient_at(problem: Problem, term: LossTerm, direction: Tensor, step: float) -> Moved:
    """Return one batch's gradient at the weights w + step v; ``direction`` is v, (n,).

    Raises
    ------
    OperatorError
        If PyTorch cannot differentiate the loss there.
    """
    parameters = list(problem.parameters.values())
    with moved(parameters, problem.unflatten(direction), step) as distance:
        loss = term.evaluate_moved()
        try:
            gradient = Gradient.first_order(problem, loss)
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


def length_of_weights(problem: Problem) -> float:
    """Return the norm of the selected parameters, or 1 if that is more: what steps are relative to."""
    return max(math.sqrt(problem.parameter_norm_squared), 1.0)
