"""Products with the Gauss-Newton matrix against J^T H J from dense Jacobians."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import numpy as np
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
from models import (
    Applied,
    GraphlessCube,
    OnceCube,
    OnceSplitCube,
    Padded,
    SmallTransformer,
    dropout_mlp,
    labelled_tokens,
    mlp,
    vectors,
)
from torch import Tensor, nn
from torch.nn import functional

from hesd_fast import losses
from hesd_fast.errors import OperatorError, ProblemError
from hesd_fast.operators import EmpiricalFisherOperator, GaussNewtonOperator, HessianOperator
from hesd_fast.problem import criterion_sums
from hesd_fast.problem.problem import Problem


def dense_gauss_newton(model: nn.Module, data: list[Any], parameters: list[nn.Parameter], **options: Any) -> Tensor:
    matrix, count = 0.0, 0.0
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH), torch.random.fork_rng(devices=[]):
        for index, batch in enumerate(data):
            torch.manual_seed(index + 1)
            outputs, targets = outputs_and_targets(model, batch)
            counted = targets != options.get("ignore_index", -100)
            weight = options.get("weight")
            count += float(counted.sum() if weight is None else weight[targets[counted]].sum())
            if not counted.any():
                continue
            rows = jacobian(outputs, parameters)
            curvature = torch.autograd.functional.hessian(
                lambda logits, targets=targets: functional.cross_entropy(logits, targets, reduction="sum", **options),
                outputs.detach().double(),
            ).reshape(len(rows), len(rows))
            matrix = matrix + rows.T @ curvature @ rows
    return matrix / count


def test_jacobian_helper_is_that_of_pytorch() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double(), torch.randn(2, 4).double()
    names = list(dict(model.named_parameters()))
    wanted = torch.autograd.functional.jacobian(
        lambda *weights: torch.func.functional_call(model, dict(zip(names, weights, strict=True)), (x,)).flatten(),
        tuple(p.detach() for p in model.parameters()),
    )
    wanted = torch.cat([part.reshape(6, -1) for part in wanted], 1)
    torch.testing.assert_close(jacobian(model(x), list(model.parameters())), wanted, rtol=1e-14, atol=1e-15)


@pytest.mark.parametrize("jvp", ["auto", "reverse"])
@pytest.mark.parametrize("case", READY_MADE, ids=str)
def test_product_is_that_of_the_dense_matrix(case: Case, jvp: str) -> None:
    assert_products_are_those_of_the_dense_matrix(GaussNewtonOperator, dense_gauss_newton, case, jvp)


@pytest.mark.parametrize("compensated", [False, True])
@pytest.mark.parametrize(
    "options",
    [{}, {"ignore_index": 1}, {"weight": torch.tensor([0.2, 1.5, 3.0], dtype=torch.float64)}],
    ids=["plain", "ignore", "weight"],
)
def test_batches_of_8_and_2_are_one_batch_of_10(options: dict[str, Any], compensated: bool) -> None:
    assert_uneven_batches_are_one(GaussNewtonOperator, dense_gauss_newton, options, compensated)


def test_selected_parameters_only() -> None:
    torch.manual_seed(0)
    model, data = mlp(nn.Tanh).double(), vectors(8, 2)
    problem = Problem(model, CROSS_ENTROPY, data, parameters=r"2\..*")
    wanted = dense_gauss_newton(model, data, list(model[2].parameters()))
    product = GaussNewtonOperator(problem).matmat(torch.eye(problem.size, dtype=torch.float64))
    assert relative(product, wanted) <= ROUNDING


@pytest.mark.parametrize("criterion", [nn.CrossEntropyLoss(label_smoothing=0.1), nn.MSELoss(), nn.BCEWithLogitsLoss()])
def test_it_is_the_hessian_of_a_model_linear_in_its_weights(criterion: nn.Module) -> None:
    torch.manual_seed(0)
    model, data = nn.Linear(8, 3).double(), vectors(8, 2)
    if not isinstance(criterion, nn.CrossEntropyLoss):
        data = [(x, torch.rand(len(x), 3, dtype=torch.float64)) for x, _ in data]
    problem = Problem(model, losses.supervised(criterion), data)
    panel = torch.randn(3, problem.size, dtype=torch.float64)
    hessian = HessianOperator(problem).matmat(panel)
    assert relative(GaussNewtonOperator(problem).matmat(panel), hessian) <= ROUNDING


def test_it_is_positive_semi_definite_where_the_hessian_is_not() -> None:
    torch.manual_seed(0)
    problem = Problem(mlp(nn.Tanh).double(), CROSS_ENTROPY, vectors(8, 2))
    eye = torch.eye(problem.size, dtype=torch.float64)
    values, of_hessian = (
        torch.linalg.eigvalsh(kind(problem).matmat(eye)) for kind in (GaussNewtonOperator, HessianOperator)
    )
    assert values[0] >= -problem.size * torch.finfo(torch.float64).eps * values[-1]
    assert of_hessian[0] < -1e-3 * of_hessian[-1]
    assert int((values > 1e-12 * values[-1]).sum()) == 10 * 2  # a softmax over 3 classes has 2 degrees of freedom


def test_loss_linear_in_the_outputs_gives_zeros() -> None:
    problem = Problem(mlp(nn.Tanh).double(), Linear(), vectors(4))
    out = torch.full((2, problem.size), torch.nan, dtype=torch.float64)
    assert not GaussNewtonOperator(problem).matmat(torch.ones_like(out), out=out).any()


class Linear:
    """A mean loss, linear in the outputs, in the two methods that are needed."""

    def outputs(self, model: nn.Module, batch: Any) -> Any:
        return model(batch[0])

    def of_outputs(self, outputs: Tensor, batch: Any) -> Any:
        return outputs.mean()

    def __call__(self, model: nn.Module, batch: Any) -> Any:
        return self.of_outputs(self.outputs(model, batch), batch)


class Mean(Linear):
    """The mean cross-entropy."""

    def of_outputs(self, outputs: Tensor, batch: Any) -> Any:
        return functional.cross_entropy(outputs, batch[1])


def test_loss_of_ones_own() -> None:
    torch.manual_seed(0)
    model, data = mlp(nn.Tanh).double(), vectors(8, 2)
    vector = torch.randn(sum(p.numel() for p in model.parameters()), dtype=torch.float64)
    own, ready = (GaussNewtonOperator(Problem(model, loss, data)).matvec(vector) for loss in (Mean(), CROSS_ENTROPY))
    assert relative(own, ready) <= ROUNDING


def test_closed_forms_of_cross_entropy_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    problem = Problem(SmallTransformer().double(), losses.causal_lm(), labelled_tokens(13, 3, 2))
    panel = torch.randn(2, problem.size, dtype=torch.float64)
    operators = [kind(problem) for kind in (HessianOperator, GaussNewtonOperator, EmpiricalFisherOperator)]
    wanted = [operator.matmat(panel) for operator in operators]
    monkeypatch.setattr(criterion_sums, "softmax_cross_entropy", partial(functional.cross_entropy, reduction="none"))
    for operator, product in zip(operators, wanted, strict=True):
        assert relative(operator.matmat(panel), product) <= ROUNDING
        assert not torch.equal(operator.matmat(panel), product)


def test_dropout_in_train_mode_is_one_fixed_matrix() -> None:
    torch.manual_seed(0)
    problem = Problem(dropout_mlp(), CROSS_ENTROPY, vectors(8, 2), mode="train")
    operator, vector = GaussNewtonOperator(problem), torch.randn(problem.size, dtype=torch.float64)
    before = torch.get_rng_state()
    first = operator.matvec(vector)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(operator.matvec(vector), first)
    assert (
        relative(GaussNewtonOperator(Problem(problem.model, CROSS_ENTROPY, problem.data)).matvec(vector), first) > 0.01
    )


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_weight_norm_is_right_although_its_second_derivative_is_not() -> None:
    torch.manual_seed(0)
    layer = nn.utils.parametrizations.weight_norm(nn.Linear(8, 6))
    model, data = nn.Sequential(layer, nn.Tanh(), nn.Linear(6, 3)).double(), vectors(8, 2)
    problem = Problem(model, CROSS_ENTROPY, data)
    wanted = dense_gauss_newton(model, data, list(problem.parameters.values()))
    product = GaussNewtonOperator(problem).matmat(torch.eye(problem.size, dtype=torch.float64))
    assert relative(product, wanted) <= ROUNDING


def test_low_precision() -> None:
    torch.manual_seed(0)
    model = mlp(nn.Tanh).bfloat16()
    data = [(x.bfloat16(), y) for x, y in vectors(8, 2)]
    problem = Problem(model, CROSS_ENTROPY, data)
    product = GaussNewtonOperator(problem).matvec(torch.ones(problem.size))
    exact = Problem(copy.deepcopy(model).double(), CROSS_ENTROPY, [(x.double(), y) for x, y in data])
    wanted = GaussNewtonOperator(exact).matvec(torch.ones(problem.size, dtype=torch.float64))
    assert product.dtype == torch.float32
    assert relative(product, wanted) <= 16 * torch.finfo(torch.bfloat16).eps


@pytest.mark.parametrize("kind", [GaussNewtonOperator, EmpiricalFisherOperator])
@pytest.mark.parametrize("function", [OnceCube, OnceSplitCube])
def test_missing_second_derivative_is_named(kind: type, function: type) -> None:
    problem = Problem(Applied(function).double(), CROSS_ENTROPY, vectors(5, 3))
    with pytest.raises(OperatorError, match=r"cannot multiply on batch 0: .* PyTorch says: .*differentiated twice"):
        kind(problem).matvec(torch.ones(problem.size, dtype=torch.float64))


def test_padding_in_a_later_batch_only() -> None:
    # In forward mode the embedding at padding_idx has a derivative, in reverse mode it has none.
    torch.manual_seed(0)
    model, data = Padded().double(), [(torch.randint(1, 40, (4, 6)), torch.arange(4) % 3) for _ in range(2)]
    data[1][0][:, 2] = 0
    problem = Problem(model, CROSS_ENTROPY, data)
    panel = torch.randn(2, problem.size, dtype=torch.float64)
    wanted = dense_gauss_newton(model, data, list(model.parameters()))
    operator = GaussNewtonOperator(problem)
    for _ in range(2):
        assert relative(operator.matmat(panel), panel @ wanted) <= ROUNDING
    assert "away from reverse mode" in operator.reason
    with pytest.raises(OperatorError, match=r"jvp=.forward. cannot differentiate this model; .* on batch 1"):
        GaussNewtonOperator(problem, jvp="forward").matmat(panel)


@pytest.mark.parametrize("kind", [GaussNewtonOperator, EmpiricalFisherOperator])
def test_every_mode_is_used_and_gives_the_same(kind: type, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    problem = Problem(mlp(nn.Tanh).double(), CROSS_ENTROPY, vectors(8, 2))
    panel = torch.randn(3, problem.size, dtype=torch.float64)
    auto, forward, reverse = (kind(problem, jvp=jvp).matmat(panel) for jvp in ("auto", "forward", "reverse"))
    assert torch.equal(auto, forward)
    assert not torch.equal(forward, reverse)
    assert relative(forward, reverse) <= ROUNDING
    monkeypatch.setattr("hesd_fast.operators.jacobian.TANGENT_BYTES", 1)  # one vector at a time
    assert relative(kind(problem).matmat(panel), reverse) <= ROUNDING


class Halved(Linear):
    def outputs(self, model: nn.Module, batch: Any) -> Any:
        return (model(batch[0]), None)

    def __call__(self, model: nn.Module, batch: Any) -> Any:
        return model(batch[0]).mean()


def test_errors_by_name() -> None:
    model, data = nn.Linear(8, 3).double(), vectors(4)
    with pytest.raises(OperatorError, match="GaussNewtonOperator got Linear; give a Problem"):
        GaussNewtonOperator(model)

    def plain(model: nn.Module, batch: Any) -> Tensor:
        return model(batch[0]).square().mean()

    with pytest.raises(
        ProblemError, match=r"plain has no outputs and no of_outputs; use hesd_fast\.losses\.supervised"
    ):
        GaussNewtonOperator(Problem(model, plain, data))
    with pytest.raises(ProblemError, match=r"outputs of batch 0 are of type tuple; loss\.outputs has to return"):
        GaussNewtonOperator(Problem(model, Halved(), data)).matvec(torch.ones(27, dtype=torch.float64))
    with pytest.raises(OperatorError, match="jvp is 'fast'; give 'auto', 'forward' or 'reverse'"):
        GaussNewtonOperator(Problem(model, CROSS_ENTROPY, data), jvp="fast")
    operator = GaussNewtonOperator(Problem(model, CROSS_ENTROPY, data))
    with pytest.raises(OperatorError, match=r"shape \(2, 26\); give \(b, 27\)"):
        operator.matmat(torch.ones(2, 26, dtype=torch.float64))
    assert operator.describe(24) == "column 24 (parameter 'bias')"
    columns = np.eye(27)
    np.testing.assert_array_equal(operator.to_scipy() @ columns, operator.matmat(torch.eye(27).double()).T.numpy())


class Cubed(nn.Module):
    def forward(self, x):
        return GraphlessCube.apply(x)


@pytest.mark.parametrize("kind", [GaussNewtonOperator, EmpiricalFisherOperator])
@pytest.mark.parametrize("parameters", [None, "0.*", "2.*"])
def test_a_backward_pass_that_leaves_no_graph_is_refused_where_it_is_passed(kind, parameters):
    torch.manual_seed(0)
    model, data = nn.Sequential(nn.Linear(8, 6), Cubed(), nn.Linear(6, 3)).double(), vectors(7, 4)
    operator = kind(Problem(model, losses.supervised(nn.CrossEntropyLoss()), data, parameters=parameters))
    panel = torch.randn(2, operator.size, dtype=torch.float64)
    if parameters == "2.*":
        found = operator.matmat(panel)
        model[1].forward = lambda x: x**3
        plain = kind(Problem(model, losses.supervised(nn.CrossEntropyLoss()), data, parameters=parameters))
        assert torch.linalg.vector_norm(found - plain.matmat(panel)) <= 64 * 2.0**-52 * torch.linalg.vector_norm(found)
        return
    message = r"on batch 0: products with the Jacobian and .*backward pass .*jvp='forward'"
    with pytest.raises(OperatorError, match=message):
        operator.matmat(panel)
