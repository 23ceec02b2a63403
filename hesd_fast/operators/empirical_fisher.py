"""The empirical Fisher matrix of a problem."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from hesd_fast.errors import OperatorError, ProblemError
from hesd_fast.operators.jacobian import JacobianOperator, loss_of
from hesd_fast.problem.loss_term import LossTerm
from hesd_fast.problem.problem import Problem


class EmpiricalFisherOperator(JacobianOperator):
    """The empirical Fisher matrix F = (1/W) sum_i w_i g_i g_i^T, with g_i the gradient of loss term i.

    The loss is L = (1/W) sum_i w_i l_i, so F has the second moments of the gradients of which L's own is the mean. It
    is positive semi-definite, of rank at most the number of terms, and no approximation of the Hessian in general
    (Kunstner, Balles, Hennig, NeurIPS 2019).

    What one term is, the loss decides. For :func:`hesd_fast.losses.supervised` it is one sample of the leading
    dimension: l_i is the mean over its targets, and w_i is what these count (1, the class weight, 0 if ignored). For
    :func:`hesd_fast.losses.causal_lm` it is one token that counts, not one sequence.

    Parameters
    ----------
    problem : Problem
        Its loss must be one of :mod:`hesd_fast.losses`, or have ``outputs`` and ``of_outputs`` as for
        :class:`~hesd_fast.operators.GaussNewtonOperator`, which returns (sum, count), and
        ``terms_of_outputs(outputs, batch) -> (sums, counts)``: w_i l_i and w_i term by term.
    compensated : bool
        Carry the rounding errors of adding up the batches (two-sum); costs a panel of memory.
    jvp : {"auto", "forward", "reverse"}
        How J v is computed, as for :class:`~hesd_fast.operators.GaussNewtonOperator`.

    Raises
    ------
    ProblemError
        If the loss has no such methods.
    OperatorError
        At a product, if batch norm makes samples depend on each other, as in train mode, or an operation has no second
        derivative.

    Notes
    -----
    F v = (1/W) J^T D^-1 (J v), with J the Jacobian of the sums w_i l_i and D = diag(w): no gradient of a single term is
    ever stored. Cost of a panel of b vectors: 2 F + 4 F b, with F a forward pass, and F more in reverse mode.

    Examples
    --------
    >>> import torch
    >>> import hesd_fast as hesd
    >>> data = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.zeros(2, 1)
    >>> model = torch.nn.Linear(2, 1, bias=False)
    >>> _ = torch.nn.init.ones_(model.weight)  # so that the gradients of the terms are (2, 0) and (0, 8)
    >>> problem = hesd.Problem(model, hesd.losses.supervised(torch.nn.MSELoss()), data)
    >>> hesd.EmpiricalFisherOperator(problem, jvp="reverse").matvec(torch.ones(2))
    tensor([ 2., 32.])
    """

    needed = ("outputs", "of_outputs", "terms_of_outputs")

    def __init__(self, problem: Problem, compensated: bool = False, jvp: str = "auto") -> None:
        super().__init__(problem, compensated, jvp)
        self._added_up: set[int] = set()

    def _values(self, outputs: Tensor, batch: Any) -> Tensor:
        return self._terms(outputs, batch)[0]

    def _middle(self, term: LossTerm, outputs: Tensor) -> tuple[Callable[[Tensor], Tensor], float]:
        _check_independent(self.problem.model)
        with torch.no_grad():
            term.note(loss_of(self.problem.loss, outputs.detach(), term.batch))
            sums, counts = self._terms(outputs.detach(), term.batch)
        if term.index not in self._added_up:  # once: data and losses are the same at every pass
            _check_terms(sums, counts, term)
            self._added_up.add(term.index)

        def divided(tangent: Tensor) -> Tensor:
            return torch.where(counts > 0, tangent / counts, 0)

        return divided, 1.0 / self.prepared.total_count

    def _terms(self, outputs: Tensor, batch: Any) -> tuple[Tensor, Tensor]:
        sums, counts = self.problem.loss.terms_of_outputs(outputs, batch)  # type: ignore[attr-defined]
        return sums, counts


def _check_independent(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm) and (module.training or module.running_mean is None):
            raise OperatorError(
                f"module {name!r} ({type(module).__name__}) normalizes by the batch, so a sample has no gradient of "
                "its own; use mode='eval', and batch norm that tracks running statistics"
            )


def _check_terms(sums: Tensor, counts: Tensor, term: LossTerm) -> None:
    """Raise a ProblemError unless there is one count a term and the terms add up to the loss."""
    if sums.ndim != 1 or counts.shape != sums.shape:
        raise ProblemError(
            f"terms_of_outputs of batch {term.index} gave sums of shape {tuple(sums.shape)} and counts of shape "
            f"{tuple(counts.shape)}; two vectors of one length are wanted"
        )
    total = sums.detach().sum(dtype=torch.float64)
    scale = sums.detach().abs().sum(dtype=torch.float64)
    rounding = 64 * torch.finfo(sums.dtype).eps * scale
    if term.value is None or not bool((total - term.value.double()).abs() <= rounding):
        raise ProblemError(
            f"the sums of terms_of_outputs of batch {term.index} add up to {float(total)!r}, and of_outputs gives "
            f"{term.value!r}; it has to return the pair (sum, count) whose parts they are"
        )
