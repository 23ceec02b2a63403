"""The first pass over the data: every batch and its loss are checked, and what later passes must find is noted."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hesd_fast.errors import OperatorError, ProblemError
from hesd_fast.problem import batches as _data
from hesd_fast.problem.differentiation import naming_refusals
from hesd_fast.problem.evaluation import ProblemEvaluation
from hesd_fast.problem.exact_operations import operations_in
from hesd_fast.problem.losses import is_ready_made
from hesd_fast.problem.parameters import check_hooks
from hesd_fast.problem.reading_check import ReadingCheck
from hesd_fast.problem.term_counts import TermCounter, warn_of_fraction


@dataclass(frozen=True)
class FirstPass:
    """What the first pass over the data found.

    Attributes
    ----------
    values, digests, sizes : list
        Loss, digest and bytes of each batch.
    weights : list of float
        Factor of each batch's loss in L.
    dtype : torch.dtype
        Of the losses.
    total_count : float
        Number of loss terms.
    description : str
        Which function of how many terms L is.
    """

    values: list[float]
    digests: list[int]
    sizes: list[int]
    weights: list[float]
    dtype: torch.dtype
    total_count: float
    description: str


def read_data(problem: ProblemEvaluation, before: Sequence[float] = ()) -> FirstPass:
    """Read the data, in a session; operations that have to be are replaced meanwhile.

    ``before`` has the first losses of a pass that ended where an operation was to be replaced.

    Raises
    ------
    ProblemError, OperatorError
        If data or loss cannot be used.
    """
    values: list[float] = []
    digests: list[int] = []
    sizes: list[int] = []
    dtype = problem.dtype
    counter = TermCounter(problem.loss, problem.count)
    reading = None
    if not is_ready_made(problem.loss):
        reading = ReadingCheck(problem.batch_loss, problem.count, problem.epsilon, problem.device)
    depends = warned = False
    for index, batch in problem.batches():
        _data.check_batch(batch, index)
        digests.append(problem.digest(batch))
        sizes.append(_data.size_in_bytes(batch))
        loss, count = problem.batch_loss(index, batch)
        problem.state.check_members()
        check_hooks(problem.model, problem.parameters)  # forward or loss may have registered some
        values.append(float(loss.detach()))
        dtype = loss.dtype
        if counter.add(index, batch, values[-1], count):
            _check_first_value(problem, loss, values[-1], index, first=not depends)
            found = operations_in(loss).keys() - problem.replaced_operations
            del loss  # its graph
            if found:
                problem.replace_operations(found)
                return read_data(problem, values)  # anew, so that all values are those of one function
            if not depends:
                _check_selection(problem, index, batch, values[-1], dtype)
            depends = True
        if index < len(before):
            _check_replaced_value(problem, before[index], values[-1], index, dtype)
        if reading is not None:
            warned = warned or warn_of_fraction(index, batch, count)
            if index not in problem.altered:
                reading.see(index, batch, values[-1], count)
    counter.shapes_suffice = reading is None or reading.counts_samples
    total, weights = _weights(counter, len(values))
    return FirstPass(values, digests, sizes, weights, dtype, total, counter.description)


def _weights(counter: TermCounter, batches: int) -> tuple[float, list[float]]:
    """Return the number of loss terms, and the factor of each batch's loss in L."""
    if not batches:
        raise ProblemError("the data yields no batch; give at least one (a used-up iterator yields none)")
    total = counter.total
    if total <= 0:
        raise ProblemError(f"the {batches} batches hold {total:g} loss terms; at least one is wanted")
    weights = counter.weights
    if not all(map(math.isfinite, weights)):
        raise ProblemError(
            f"the {batches} batches hold {total:g} loss terms, too few or too many to divide by; give the number of "
            "terms as count"
        )
    return total, weights


def _check_first_value(problem: ProblemEvaluation, loss: Tensor, value: float, index: int, first: bool) -> None:
    if not math.isfinite(value):
        raise ProblemError(f"the loss of batch {index} is {value}; a finite loss is wanted, check model and data")
    parameters = list(problem.parameters.values())
    frozen = next((name for name, parameter in problem.parameters.items() if not parameter.requires_grad), None)
    if frozen is not None:
        raise ProblemError(
            f"forward or loss turned requires_grad of {frozen!r} off, which is selected; let them leave it, or "
            "select other parameters"
        )
    # The data may require gradients too, so that only a backward pass shows what the loss depends on.
    if not loss.requires_grad or (first and not _depends_on(loss, parameters)):
        raise ProblemError(
            f"the loss of batch {index} does not depend on the selected parameters "
            f"({', '.join(list(problem.parameters)[:3])}{', ...' if len(parameters) > 3 else ''}); "
            "select others, and do not hide them behind torch.no_grad, .detach(), .item() or a reentrant checkpoint"
        )


def _depends_on(loss: Tensor, parameters: Sequence[Tensor]) -> bool:
    with naming_refusals(
        lambda said: (
            f"the gradient of the loss cannot be computed with torch.autograd.grad: {said}; return a loss with its "
            "whole graph: no .backward() in forward or loss (or one with retain_graph=True), and nothing changed in "
            "place that the graph needs"
        )
    ):
        return any(found is not None for found in torch.autograd.grad(loss, parameters, allow_unused=True))


def _check_selection(problem: ProblemEvaluation, index: int, batch: Any, value: float, dtype: torch.dtype) -> None:
    """Raise an OperatorError if the loss is another one with all parameters that the user differentiates by.

    Code that asks whether a parameter requires gradients is another function for every selection. Cost: one forward
    pass of one batch, where the selection leaves something out.
    """
    with problem.state.as_the_user_has_it() as differs:
        if not differs:
            return
        whole = float(problem.batch_loss(index, batch)[0].detach())
    if not problem.is_same_loss(whole, value, dtype):
        raise OperatorError(
            f"the loss depends on which parameters are selected: batch {index} gives {value!r} where only the "
            f"selected ones require gradients, and {whole!r} with all that did; model or loss take another path "
            "where a parameter does not require gradients. Take that out, or select all parameters and look at "
            "some of them by hesd_fast.analyze_groups"
        )


def _check_replaced_value(
    problem: ProblemEvaluation, before: float, value: float, index: int, dtype: torch.dtype
) -> None:
    """Raise an OperatorError unless a loss is the same to rounding as before operations were replaced."""
    if not abs(value - before) <= 16.0 * math.sqrt(torch.finfo(dtype).eps) * abs(before):
        raise OperatorError(
            f"the loss of batch {index} is {before!r}, and {value!r} with {', '.join(problem.replaced_operations)} in "
            "ordinary operations, as exact products need them; if forward or loss draw random numbers of their own "
            "or change the batch, mend that; else write these operations in ordinary ones yourself"
        )
