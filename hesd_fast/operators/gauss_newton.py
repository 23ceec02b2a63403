"""The generalized Gauss-Newton matrix of a problem."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hesd_fast.hvp.second_derivatives import differentiate
from hesd_fast.operators.jacobian import JacobianOperator, loss_of
from hesd_fast.problem.loss_term import LossTerm


class GaussNewtonOperator(JacobianOperator):
    """The generalized Gauss-Newton matrix, the sum over batches of J^T H J with H the Hessian by the model's outputs.

    It is the Hessian of the loss with the model replaced by its linearization at the weights; exact, and positive
    semi-definite where the loss is convex in the outputs, as cross-entropy and squared errors are. Batches are weighted
    as those of :class:`~hesd_fast.operators.HessianOperator`. For cross-entropy it is the Fisher matrix, with
    expectations over the model's own labels (Martens, JMLR 21(146), 2020, sections 8 and 9).

    Parameters
    ----------
    problem : Problem
        Its loss must be one of :mod:`hesd_fast.losses`, or have ``outputs(model, batch) -> tensor`` and
        ``of_outputs(outputs, batch) -> mean or (sum, count)`` such that ``loss(model, batch)`` is
        ``loss.of_outputs(loss.outputs(model, batch), batch)``.
    compensated : bool
        Carry the rounding errors of adding up the batches (two-sum); costs a panel of memory.
    jvp : {"auto", "forward", "reverse"}
        How J v is computed: in forward mode, all vectors at once; in reverse mode, twice, one vector after the other;
        or in forward mode where that works and agrees with reverse mode, which is tried once on every batch.

    Raises
    ------
    ProblemError
        If the loss has no such methods.
    OperatorError
        At a product, if an operation has no second derivative.

    Notes
    -----
    Cost of a panel of b vectors: 2 F + 4 F b and b products with H, where F is a forward pass, and F more in reverse
    mode. Memory: the graph of one batch's forward pass; in reverse mode that of its first backward pass, too.

    Examples
    --------
    >>> import torch
    >>> import hesd_fast as hesd
    >>> data = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.zeros(2, 1)
    >>> loss = hesd.losses.supervised(torch.nn.MSELoss())
    >>> problem = hesd.Problem(torch.nn.Linear(2, 1, bias=False), loss, data)
    >>> hesd.GaussNewtonOperator(problem, jvp="reverse").matvec(torch.ones(2))
    tensor([1., 4.])
    """

    needed = ("outputs", "of_outputs")

    def _values(self, outputs: Tensor, batch: Any) -> Tensor:  # noqa: ARG002
        return outputs

    def _middle(self, term: LossTerm, outputs: Tensor) -> tuple[Callable[[Tensor], Tensor], float]:
        leaf = outputs.detach().requires_grad_()
        loss = loss_of(self.problem.loss, leaf, term.batch)
        term.note(loss)
        (slope,) = differentiate(loss, leaf, create_graph=True)

        def curvature(tangent: Tensor) -> Tensor:
            product = None
            if slope is not None and slope.requires_grad:
                (product,) = differentiate(slope, leaf, tangent, retain_graph=True)
            return torch.zeros_like(leaf) if product is None else product

        return curvature, term.weight
