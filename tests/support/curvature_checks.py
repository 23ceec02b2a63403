"""What products with a matrix made of Jacobians of outputs must pass, whichever matrix it is."""

from __future__ import annotations

import copy
from typing import Any

import torch
from catalogue import CASES, LABELLED, ROUNDING, Case
from models import mlp, vectors
from torch import Tensor, nn

from hesd_fast import losses
from hesd_fast.problem.problem import Problem

READY_MADE = [case for case in [*CASES, *LABELLED] if losses.is_ready_made(case.build()[1])]
"""Cases with a loss of the library's own, which says how it depends on the outputs."""


def relative(result: Tensor, wanted: Tensor) -> float:
    return float(torch.linalg.vector_norm(result.double() - wanted) / torch.linalg.vector_norm(wanted))


def tensor_of(output: Any) -> Tensor:
    if isinstance(output, Tensor):
        return output
    if isinstance(output, tuple):
        return output[0]
    return output["logits"] if isinstance(output, dict) else output.logits


def outputs_and_targets(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
    """Return one row of logits and one target per loss term; a target of -100 does not count."""
    inputs = batch["input_ids"] if isinstance(batch, dict) else batch[0]
    logits = tensor_of(model(inputs))
    if isinstance(batch, dict) or len(batch) == 1:
        labels = batch["labels"] if isinstance(batch, dict) else batch[0]
        return logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    return logits, batch[1]


def jacobian(values: Tensor, parameters: list[nn.Parameter]) -> Tensor:
    """Return the dense Jacobian (values, n), one backward pass a row."""
    rows = []
    for value in values.flatten():
        found = torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True)
        dense = [torch.zeros_like(p) if g is None else g.to_dense() for g, p in zip(found, parameters, strict=True)]
        rows.append(torch.cat([part.reshape(-1) for part in dense]).double())
    return torch.stack(rows)


def restored(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_products_are_those_of_the_dense_matrix(operator_of: Any, dense: Any, case: Case, jvp: str) -> None:
    """Compare three products of a case, and the model's state before and after."""
    model, loss, data = case.build()
    problem = Problem(model, loss, data, mode=case.mode)
    state, training = restored(model), [module.training for module in model.modules()]
    operator = operator_of(problem, jvp=jvp)
    panel = torch.randn(3, operator.size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    product = operator.matmat(panel)
    assert [module.training for module in model.modules()] == training
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    model = copy.deepcopy(model).train(case.mode == "train") if case.name != "kept-reference" else model.eval()
    selected = dict(model.named_parameters())
    wanted = dense(model, data, [selected[name] for name in problem.parameters])
    assert relative(product, panel @ wanted) <= case.tolerance


def assert_uneven_batches_are_one(operator_of: Any, dense: Any, options: dict[str, Any], compensated: bool) -> None:
    """Compare products over batches of 8 and 2, and over one of 10, with the dense matrix."""
    torch.manual_seed(0)
    model, uneven = mlp(nn.Tanh).double(), vectors(8, 2)
    whole = [tuple(torch.cat(parts) for parts in zip(*uneven, strict=True))]
    loss = losses.supervised(nn.CrossEntropyLoss(**options))
    wanted = dense(model, whole, list(model.parameters()), **options)
    panel = torch.randn(2, len(wanted), dtype=torch.float64)
    for data in (uneven, whole):
        product = operator_of(Problem(model, loss, data), compensated).matmat(panel)
        assert relative(product, panel @ wanted) <= ROUNDING
