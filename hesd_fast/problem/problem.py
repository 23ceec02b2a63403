"""A model, a loss and data as one fixed function of the selected parameters."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from typing import Any

from torch import nn
from torch.nn import functional
from torch.nn.modules.loss import _Loss as CriterionModule

from hesd_fast.choices import is_one_of
from hesd_fast.errors import ProblemError
from hesd_fast.problem.batches import as_batches
from hesd_fast.problem.description import Loss, ProblemDescription
from hesd_fast.problem.loss_term import LossTerm
from hesd_fast.problem.model_state import alone
from hesd_fast.problem.parameters import (
    ParameterLayout,
    Selection,
    check_hooks,
    check_model,
    restrict,
    select_parameters,
)
from hesd_fast.problem.prepared_problem import PreparedProblem
from hesd_fast.problem.signatures import refusal, signature_of
from hesd_fast.problem.term_counts import Count

MODES = ("eval", "train", "as_is")


class Problem(ProblemDescription):
    """The loss of a model over data, L(theta) = sum of all loss terms / their number.

    Parameters
    ----------
    model : torch.nn.Module
        Given back after every use exactly as it was: modes, ``.grad``, ``requires_grad``, buffers, weights,
        random state. What its forward pass puts into attributes that are not tensors (lists, dictionaries, numbers)
        stays.
    loss : callable
        ``loss(model, batch)`` returns the mean loss of a batch, or ``(sum, count)``. A mean loss of one batch, and of
        batches of the same shapes, needs no count. Batches of other shapes are weighted by their leading dimension
        where all of a batch's tensors agree on it and nothing else differs; elsewhere (lists of samples, padding,
        steps before samples, graphs, one sample a batch) return ``(sum, count)``, or give ``count``. So do where
        values decide what counts (masks, ignored labels), which shapes do not tell; and for lists of bare tensors if
        they are samples, as a DataLoader collates tuples into such lists. Only the selected parameters require
        gradients while it runs.
    data
        A re-iterable of batches, one batch, or a dataset of samples; see :func:`hesd_fast.problem.batches.as_batches`.
        Every pass starts from the same random state, so a shuffling DataLoader yields the same batches each time.
    parameters
        Which parameters the Hessian is of: None for all that require gradients, a regular expression that must match a
        whole name, exact names, or a predicate ``(name, parameter) -> bool``. A tied parameter counts once. A complex
        one is taken for the pairs of reals that ``torch.view_as_real`` shows.
    mode : {"eval", "train", "as_is"}
        The training flag of every module meanwhile (an overridden ``train`` method is not called). In train mode every
        batch has its own fixed random seed, so dropout draws the same mask at every pass.
    batch_size : int, optional
        Samples per batch, 256 by default; only for a dataset.
    count : callable, optional
        ``count(batch)`` is the number of terms that a mean loss is the mean of; only for a loss without a count.

    Raises
    ------
    ProblemError
        If the model, the loss, the data or an option cannot be used.

    Examples
    --------
    >>> import torch
    >>> import hesd_fast as hesd
    >>> batches = [(torch.ones(4, 3), torch.zeros(4, 1)), (torch.ones(2, 3), torch.zeros(2, 1))]
    >>> loss = hesd.losses.supervised(torch.nn.MSELoss())
    >>> problem = hesd.Problem(torch.nn.Linear(3, 1), loss, batches, parameters="weight")
    >>> problem.size, problem.batch_count, problem.total_count
    (3, 2, 6.0)
    """

    @alone
    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        data: Any,
        parameters: Selection = None,
        mode: str = "eval",
        batch_size: int | None = None,
        count: Count | None = None,
    ) -> None:
        if count is not None and not callable(count):
            raise ProblemError(
                f"count is of type {type(count).__name__}; give a function count(batch) that returns the number of "
                "terms of a batch's mean loss"
            )
        if count is not None:
            _check_arguments("count", count, "(batch)", 1)
        if not is_one_of(mode, MODES):
            raise ProblemError(f"mode is {mode!r}; give one of {', '.join(map(repr, MODES))}")
        check_model(model)
        _check_loss_function(loss)
        batches = as_batches(data, batch_size)
        selected = select_parameters(model, parameters)
        check_hooks(model, selected)
        super().__init__(model, loss, batches, selected, mode, count)
        self._prepared: PreparedProblem | None = None

    def prepare(self) -> PreparedProblem:
        """Read the data once, check every batch and its loss, and return the problem with what later passes need.

        Returns the same the second time. Cost: one forward pass per batch, a backward pass on the first, and for a loss
        of one's own one more forward pass of a batch, in halves, and up to three in thirds where halves say too little.

        Raises
        ------
        ProblemError, OperatorError
            If data or loss cannot be used.
        """
        return self._prepared or self._read_data()

    @alone
    def _read_data(self) -> PreparedProblem:
        if self._prepared is None:  # another thread may have been here while this one waited
            self._prepared = PreparedProblem(self)
        return self._prepared

    def restricted(self, names: Iterable[str]) -> Problem:
        """Return the same problem for some of its parameters; what reading the data has found holds for it too.

        Prepares the problem first, so that the data is read for all parts at once.

        Raises
        ------
        ProblemError
            If a name is not that of a selected parameter, or there is none.
        """
        parameters = restrict(self.parameters, names)
        part = copy.copy(self)
        part._prepared = self.prepare().restricted(parameters)
        ParameterLayout.__init__(part, parameters)
        return part

    # What the prepared problem knows and does, for those who have the problem alone; each prepares it.

    def session(self) -> AbstractContextManager[None]:
        """Return what borrows the model meanwhile; see :meth:`PreparedProblem.session`."""
        return self.prepare().session()

    def terms(self) -> Iterator[LossTerm]:
        """Yield the loss terms, in a session; see :meth:`PreparedProblem.terms`."""
        return self.prepare().terms()

    @property
    def replaced_operations(self) -> tuple[str, ...]:
        """Operations of PyTorch without a second derivative, or with a wrong one, that ordinary ones take the place of.

        They are those that the loss has, and are replaced in sessions.
        """
        return self.prepare().replaced_operations

    @property
    def loss_value(self) -> float:
        """L at the current parameters, summed in float64."""
        return self.prepare().loss_value

    @property
    def total_count(self) -> float:
        """Number of loss terms in the data."""
        return self.prepare().total_count

    @property
    def loss_description(self) -> str:
        """Which function of how many loss terms L is, in words."""
        return self.prepare().loss_description

    @property
    def batch_count(self) -> int:
        """Number of batches in the data."""
        return self.prepare().batch_count

    @property
    def weights(self) -> str:
        """Hexadecimal digest of all parameters and buffers, with their names; cost: one reading of the weights."""
        return self.prepare().weights

    @property
    def fingerprint(self) -> str:
        """Hexadecimal digest of the weights, the selection, the mode and the data; cost: that of `weights`."""
        return self.prepare().fingerprint


def _check_loss_function(loss: Any) -> None:
    if not callable(loss):
        raise ProblemError(
            f"loss of type {type(loss).__name__} is not callable; give a function loss(model, batch), "
            "or build one with hesd_fast.losses"
        )
    function = loss.func if isinstance(loss, functools.partial) else loss
    if isinstance(function, CriterionModule) or getattr(function, "__module__", None) == functional.__name__:
        name = getattr(function, "__name__", type(function).__name__)
        raise ProblemError(
            f"loss is the criterion {name}, a function of (output, targets), but a function of (model, batch) is "
            "wanted; give hesd_fast.losses.supervised(criterion), or write a loss that calls it"
        )
    _check_arguments("loss", loss, "(model, batch)", 2)


def _check_arguments(name: str, function: Any, arguments: str, number: int) -> None:
    signature = signature_of(function)
    if signature is not None and (reason := refusal(signature, *[None] * number)):
        raise ProblemError(
            f"{name} has the arguments {signature}, and cannot be called with {arguments}: {reason}; give a function "
            f"{name}{arguments}"
        )
