"""Products with the empirical Fisher matrix against sums of outer products of per-term gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from catalogue import CROSS_ENTROPY, ROUNDING, Case
from curvature_checks import (
    READY_MADE,
    assert_products_are_those_of_the_dense_matrix,
    assert_uneven_batches_are_one,
    jacobian,
    outputs_and_targets,
    relative,
)
from models import Convolutional, SmallTransformer, dropout_mlp, images, labelled_tokens, mlp, vectors
from torch import Tensor, nn
from torch.nn import functional

from hesd_fast import losses
from hesd_fast.errors import OperatorError, ProblemError
from hesd_fast.operators import EmpiricalFisherOperator, GaussNewtonOperator
from hesd_fast.problem.problem import Problem

COUPLED = ("cnn-train", "frozen-cnn-train", "checkpoint-norm-train")
"""Cases with batch norm in train mode."""


def dense_fisher(model: nn.Module, data: list[Any], parameters: list[nn.Parameter], **options: Any) -> Tensor:
    """Return (1/W) sum w_i g_i g_i^T with one backward pass a term."""
    matrix, count, weight = 0.0, 0.0, options.pop("weight", None)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH), torch.random.fork_rng(devices=[]):
        for index, batch in enumerate(data):
            torch.manual_seed(index + 1)
            outputs, targets = outputs_and_targets(model, batch)
            counted = targets != options.get("ignore_index", -100)
            if not counted.any():
                continue
            rows = jacobian(functional.cross_entropy(outputs, targets, reduction="none", **options), parameters)
            weights = counted.double() if weight is None else torch.where(counted, weight[targets], 0)
            count += float(weights.sum())
            matrix = matrix + rows.T @ (weights[:, None] * rows)
    return matrix / count


@pytest.mark.parametrize("jvp", ["auto", "reverse"])
@pytest.mark.parametrize("case", [case for case in READY_MADE if case.name not in COUPLED], ids=str)
def test_product_is_that_of_the_dense_matrix(case: Case, jvp: str) -> None:
    assert_products_are_those_of_the_dense_matrix(EmpiricalFisherOperator, dense_fisher, case, jvp)


@pytest.mark.parametrize("compensated", [False, True])
@pytest.mark.parametrize(
    "options",
    [{}, {"ignore_index": 1}, {"weight": torch.tensor([0.2, 0.0, 3.0], dtype=torch.float64)}],
    ids=["plain", "ignore", "weight"],
)
def test_batches_of_8_and_2_are_one_batch_of_10(options: dict[str, Any], compensated: bool) -> None:
    assert_uneven_batches_are_one(EmpiricalFisherOperator, dense_fisher, options, compensated)


def test_a_sample_of_weight_2_counts_as_two() -> None:
    torch.manual_seed(0)
    model, (batch,) = mlp(nn.Tanh).double(), vectors(6)
    weight = torch.tensor([1.0, 2.0, 1.0], dtype=torch.float64)
    index = torch.arange(6).repeat_interleave(weight[batch[1]].long())
    repeated = Problem(model, CROSS_ENTROPY, [(batch[0][index], batch[1][index])])
    weighted = Problem(model, losses.supervised(nn.CrossEntropyLoss(weight)), [batch])
    vector = torch.randn(weighted.size, dtype=torch.float64)
    one, two = (EmpiricalFisherOperator(problem).matvec(vector) for problem in (weighted, repeated))
    assert relative(one, two) <= ROUNDING


@pytest.mark.parametrize(
    ("criterion", "shape"),
    [
        (nn.MSELoss(), None),
        (nn.BCEWithLogitsLoss(), None),
        (nn.HuberLoss(), None),
        (nn.MSELoss(reduction="sum"), None),
        (nn.MultiLabelSoftMarginLoss(), None),
        (nn.SoftMarginLoss(), None),
        (nn.KLDivLoss(), None),
        (nn.KLDivLoss(reduction="batchmean"), None),
        (nn.CrossEntropyLoss(), None),
        (nn.CrossEntropyLoss(reduction="sum"), (10,)),
        (nn.CrossEntropyLoss(label_smoothing=0.1), (10,)),
    ],
    ids=repr,
)
def test_one_sample_is_one_term(criterion: nn.Module, shape: tuple[int, ...] | None) -> None:
    torch.manual_seed(0)
    model, x = mlp(nn.Tanh).double(), torch.randn(10, 8, dtype=torch.float64)
    y = torch.rand(10, 3, dtype=torch.float64) if shape is None else torch.randint(3, shape)
    problem = Problem(model, losses.supervised(criterion), [(x[:7], y[:7]), (x[7:], y[7:])])
    rows = torch.stack(
        [jacobian(criterion(model(x[i : i + 1]), y[i : i + 1]), list(model.parameters()))[0] for i in range(10)]
    )
    panel = torch.randn(2, problem.size, dtype=torch.float64)
    assert relative(EmpiricalFisherOperator(problem).matmat(panel), panel @ rows.T @ rows / 10) <= ROUNDING


class Pixels(nn.Module):
    """A model of (N, 3, 2, 2) outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 12)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x).view(-1, 3, 2, 2)


def test_targets_of_one_sample_are_one_term() -> None:
    torch.manual_seed(0)
    model, x, y = Pixels().double(), torch.randn(5, 8, dtype=torch.float64), torch.randint(3, (5, 2, 2))
    y[0, 0], y[3] = -100, -100
    problem = Problem(model, CROSS_ENTROPY, [(x[:3], y[:3]), (x[3:], y[3:])])
    counts = (y != -100).sum((1, 2)).double()
    wanted = 0.0
    for i in (0, 1, 2, 4):
        (row,) = jacobian(functional.cross_entropy(model(x[i : i + 1]), y[i : i + 1]), list(model.parameters()))
        wanted = wanted + counts[i] * torch.outer(row, row) / counts.sum()
    assert relative(EmpiricalFisherOperator(problem).matmat(torch.eye(108, dtype=torch.float64)), wanted) <= ROUNDING


def test_one_token_is_one_term_and_rank_tells() -> None:
    torch.manual_seed(0)
    problem = Problem(SmallTransformer().double(), losses.causal_lm(), labelled_tokens(13, 2, 1))
    eye = torch.eye(problem.size, dtype=torch.float64)
    values = torch.linalg.eigvalsh(EmpiricalFisherOperator(problem).matmat(eye))
    assert problem.total_count == 7
    assert int((values > 1e-12 * values[-1]).sum()) == 7
    assert values[0] >= -problem.size * torch.finfo(torch.float64).eps * values[-1]


def test_it_is_not_gauss_newton() -> None:
    torch.manual_seed(0)
    problem = Problem(mlp(nn.Tanh).double(), CROSS_ENTROPY, vectors(8, 2))
    vector = torch.randn(problem.size, dtype=torch.float64)
    fisher, gauss_newton = (kind(problem).matvec(vector) for kind in (EmpiricalFisherOperator, GaussNewtonOperator))
    assert relative(fisher, gauss_newton) > 0.01


def test_dropout_in_train_mode_is_one_fixed_matrix() -> None:
    torch.manual_seed(0)
    problem = Problem(dropout_mlp(), CROSS_ENTROPY, vectors(8, 2), mode="train")
    operator, vector = EmpiricalFisherOperator(problem), torch.randn(problem.size, dtype=torch.float64)
    before = torch.get_rng_state()
    first = operator.matvec(vector)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(operator.matvec(vector), first)


def test_batch_norm_by_the_batch_is_refused() -> None:
    torch.manual_seed(0)
    model, data = Convolutional().double(), images(5, 3)
    vector = torch.ones(Problem(model, CROSS_ENTROPY, data).size, dtype=torch.float64)
    message = r"'features\.1' \(BatchNorm2d\) normalizes by the batch, .* use mode='eval'"
    with pytest.raises(OperatorError, match=message):
        EmpiricalFisherOperator(Problem(model, CROSS_ENTROPY, data, mode="train")).matvec(vector)
    EmpiricalFisherOperator(Problem(model, CROSS_ENTROPY, data)).matvec(vector)
    model.features[1] = nn.BatchNorm2d(6, track_running_stats=False).double()
    with pytest.raises(OperatorError, match=message):
        EmpiricalFisherOperator(Problem(model, CROSS_ENTROPY, data)).matvec(vector)


class Terms:
    """A loss whose terms are whatever they are made of."""

    def __init__(self, terms: Any) -> None:
        self.terms = terms

    def outputs(self, model: nn.Module, batch: Any) -> Tensor:
        return model(batch[0])

    def of_outputs(self, outputs: Tensor, batch: Any) -> Any:
        return functional.cross_entropy(outputs, batch[1], reduction="sum"), len(outputs)

    def terms_of_outputs(self, outputs: Tensor, batch: Any) -> Any:
        return self.terms(functional.cross_entropy(outputs, batch[1], reduction="none"))

    def __call__(self, model: nn.Module, batch: Any) -> Any:
        return self.of_outputs(self.outputs(model, batch), batch)


def test_loss_of_ones_own() -> None:
    torch.manual_seed(0)
    model, data = mlp(nn.Tanh).double(), vectors(8, 2)
    vector = torch.randn(sum(p.numel() for p in model.parameters()), dtype=torch.float64)
    own = EmpiricalFisherOperator(Problem(model, Terms(lambda sums: (sums, torch.ones_like(sums))), data))
    ready = EmpiricalFisherOperator(Problem(model, CROSS_ENTROPY, data))
    assert relative(own.matvec(vector), ready.matvec(vector)) <= ROUNDING


@pytest.mark.parametrize(
    ("terms", "message"),
    [
        (lambda sums: (sums, torch.ones(1)), r"sums of shape \(4,\) and counts of shape \(1,\)"),
        (lambda sums: (2 * sums, torch.ones_like(sums)), "add up to .* and of_outputs gives"),
        (lambda sums: (sums.sum(), torch.ones(())), r"two vectors of one length"),
    ],
)
def test_terms_that_do_not_fit(terms: Any, message: str) -> None:
    operator = EmpiricalFisherOperator(Problem(nn.Linear(8, 3).double(), Terms(terms), vectors(4)))
    with pytest.raises(ProblemError, match=message):
        operator.matvec(torch.ones(27, dtype=torch.float64))


def test_errors_by_name() -> None:
    model, data = nn.Linear(8, 3).double(), vectors(4)

    def plain(model: nn.Module, batch: Any) -> Tensor:
        return functional.cross_entropy(model(batch[0]), batch[1])

    with pytest.raises(ProblemError, match="plain has no outputs and no of_outputs and no terms_of_outputs"):
        EmpiricalFisherOperator(Problem(model, plain, data))
    own = losses.supervised(lambda output, targets: functional.soft_margin_loss(output, targets))
    problem = Problem(model, own, [(data[0][0], torch.ones(4, 3).double())])
    with pytest.raises(ProblemError, match=r"<lambda> gives one loss for a batch, .* torch loss module"):
        EmpiricalFisherOperator(problem).matvec(torch.ones(27, dtype=torch.float64))
