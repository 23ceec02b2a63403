"""Products are compared with differences of gradients: wrong second derivatives of PyTorch are named, and no others."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from dense import dense_hessian
from models import CATALOGUE, WITHOUT_SECOND_DERIVATIVE, GraphlessCube, OnContext, mlp, vectors
from torch import Tensor, nn
from torch.nn import functional

import hesd_fast as hesd
from hesd_fast import losses
from hesd_fast.errors import HESDWarning, OperatorError
from hesd_fast.hvp import derivative_check
from hesd_fast.hvp.derivative_check import check_derivatives
from hesd_fast.operators import HessianOperator
from hesd_fast.problem import Problem

CROSS_ENTROPY = losses.supervised(nn.CrossEntropyLoss())


class Silu(torch.autograd.Function):
    """Keeps sigmoid(x), a constant to the second derivative."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x, torch.sigmoid(x))
        return x * torch.sigmoid(x)

    @staticmethod
    def backward(ctx, gradient):
        x, s = ctx.saved_tensors
        return gradient * s * (1 + x * (1 - s))


class Layer(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


class Doubled(nn.Module):
    """Registers a hook in its forward pass that replaces the gradient by one of a kept value."""

    def forward(self, x):
        h = x.tanh()
        y, kept = h.square(), h.detach().clone()
        if y.requires_grad:
            y.register_hook(lambda gradient: gradient * (1 + kept.square()))
        return y


def with_layer(layer) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 6), layer, nn.Linear(6, 3)).double()


WRONG = [
    (Layer(Silu.apply), functional.silu, "autograd Function Silu .in module '1'.*keep no intermediate"),
    (Layer(OnContext.apply), torch.square, "autograd Function OnContext .in module '1'"),
    (Layer(GraphlessCube.apply), lambda x: x**3, "autograd Function GraphlessCube .in module '1'"),
]


def agrees(problem: Problem):
    problem.prepare()
    with problem.session():
        return check_derivatives(problem)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("layer", "plain", "cause"), WRONG, ids=["saved", "attribute", "no-graph"])
def test_a_function_with_another_second_derivative_is_named_and_differences_serve(layer, plain, cause, dtype):
    model, data = with_layer(layer).to(dtype), [(x.to(dtype), y) for x, y in vectors(12)]
    operator = HessianOperator(Problem(model, CROSS_ENTROPY, data))
    panel = torch.randn(2, operator.size, dtype=dtype)
    with pytest.warns(
        HESDWarning, match=rf"is not the derivative of its first: on batch 0 .*'0\.weight'.*{cause}.*hvp="
    ):
        operator.matmat(panel)
    assert operator.derivatives.agrees is False
    by_hand = copy.deepcopy(model).double()
    by_hand[1] = Layer(plain)
    x, y = data[0]
    wanted = dense_hessian(
        by_hand, lambda m: functional.cross_entropy(m(x.double()), y), dict(by_hand.named_parameters())
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = HessianOperator(Problem(model, CROSS_ENTROPY, data), hvp="finite_differences").matmat(panel)
    difference = torch.linalg.vector_norm(found.double() - panel.double() @ wanted)
    assert difference <= {torch.float64: 1e-6, torch.float32: 2e-2}[dtype] * torch.linalg.vector_norm(
        panel @ wanted.to(dtype)
    )


@pytest.mark.parametrize(
    ("layer", "cause"),
    [
        (Doubled(), "gradient hook that is registered .register_hook. in module '1'"),
        (
            Layer(lambda x: x.tanh() + (x.tanh().round() - x.tanh()).detach()),
            r"\.detach\(\) or \.data in module '1'.*straight-through",
        ),
        (Layer(lambda x: x * x.detach().sigmoid()), r"\.detach\(\) or \.data in module '1'"),
    ],
    ids=["hook", "straight-through", "stopped"],
)
def test_hooks_and_stopped_gradients_are_named(layer, cause):
    operator = HessianOperator(Problem(with_layer(layer), CROSS_ENTROPY, vectors(7)))
    with pytest.warns(HESDWarning, match=f"is not the derivative of its first.*{cause}"):
        operator.matvec(torch.ones(operator.size, dtype=torch.float64))


def test_a_report_says_it_and_the_warning_comes_once():
    problem = Problem(with_layer(Layer(Silu.apply)), CROSS_ENTROPY, vectors(8))
    with pytest.warns(HESDWarning, match="is not the derivative of its first") as caught:
        report = hesd.analyze(problem, max_steps=3, block_size=2, progress=False)
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        hesd.analyze(problem, max_steps=3, block_size=2, progress=False)
    check = next(check for check in report.checks if check.name == "derivatives")
    assert not check.passed
    assert "autograd Function Silu" in check.detail


@pytest.mark.parametrize("groups", ["modules", "parameters"])
def test_reports_of_groups_say_it_too(groups):
    problem = Problem(with_layer(Layer(Silu.apply)), CROSS_ENTROPY, vectors(8))
    with pytest.warns(HESDWarning, match="autograd Function Silu"):
        reports = hesd.analyze_groups(problem, groups=groups, max_steps=3, progress=False)
    assert all("autograd Function Silu" in str(report) for report in reports.values())


SOUND = [case for case in CATALOGUE if case not in WITHOUT_SECOND_DERIVATIVE]


def in_float32(value):
    if isinstance(value, Tensor):
        return value.float() if value.is_floating_point() else value
    if isinstance(value, dict):
        return {key: in_float32(item) for key, item in value.items()}
    return type(value)(map(in_float32, value)) if type(value) in (tuple, list) else value


@pytest.mark.parametrize("precision", ["own", "float32"])
@pytest.mark.parametrize("case", SOUND, ids=str)
def test_no_sound_model_raises_an_alarm(case, precision):
    model, loss, data = case.build()
    if precision == "float32":
        model, data = model.float(), in_float32(data)
    assert agrees(Problem(model, loss, data, mode=case.mode)).agrees is True


@pytest.mark.parametrize("activation", [nn.ReLU, nn.LeakyReLU, nn.Hardtanh, nn.ELU, nn.Hardswish, nn.Softshrink])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_kinks_raise_no_alarm(activation, dtype):
    torch.manual_seed(0)
    layers = [nn.Linear(8, 64), activation(), nn.Linear(64, 64), activation(), nn.Linear(64, 3)]
    model = nn.Sequential(*layers).to(dtype)
    found = agrees(Problem(model, CROSS_ENTROPY, [(x.to(dtype), y) for x, y in vectors(256)]))
    assert found.agrees is True, found.detail


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_batch_that_sits_on_kinks_is_unclear_and_no_alarm(dtype):
    torch.manual_seed(0)
    model = mlp(nn.ReLU).to(dtype)
    nn.init.zeros_(model[0].bias)
    x = torch.zeros(6, 8, dtype=dtype)  # every unit of the first layer is at its kink
    found = agrees(Problem(model, CROSS_ENTROPY, [(x, torch.arange(6) % 3)]))
    assert found.agrees is None
    assert "kinks" in found.detail
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        HessianOperator(Problem(model, CROSS_ENTROPY, [(x, torch.arange(6) % 3)])).matvec(
            torch.ones(sum(p.numel() for p in model.parameters()), dtype=dtype)
        )


@pytest.mark.parametrize(("activation", "agreement"), [(nn.Tanh, True), (nn.ReLU, None)], ids=["smooth", "kinks"])
def test_without_float64_only_smooth_losses_can_be_told(monkeypatch, activation, agreement):
    torch.manual_seed(0)
    monkeypatch.setattr(derivative_check, "COPIES", 1e18)
    monkeypatch.setattr(derivative_check, "STEP", 0.3)  # too long a step to agree at once
    model = nn.Sequential(nn.Linear(8, 64), activation(), nn.Linear(64, 3))
    assert agrees(Problem(model, CROSS_ENTROPY, [(x.float(), y) for x, y in vectors(64)])).agrees is agreement


def test_without_float64_a_wrong_derivative_of_a_smooth_loss_is_still_seen(monkeypatch):
    monkeypatch.setattr(derivative_check, "COPIES", 1e18)
    model = with_layer(Layer(OnContext.apply)).float()
    found = agrees(Problem(model, CROSS_ENTROPY, [(x.float(), y) for x, y in vectors(12)]))
    assert found.agrees is False
    assert "OnContext" in found.detail


def test_code_that_takes_float32_only_is_no_error():
    class Narrow(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            if x.dtype != torch.float32:
                raise TypeError("float32 alone")
            ctx.save_for_backward(x)
            return x.relu()

        @staticmethod
        def backward(ctx, gradient):
            return gradient * (ctx.saved_tensors[0] > 0)

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 64), Layer(Narrow.apply), nn.Linear(64, 3))
    assert agrees(Problem(model, CROSS_ENTROPY, [(x.float(), y) for x, y in vectors(64)])).agrees in (True, None)


def test_where_a_second_derivative_is_missing_that_is_said_first():
    case = next(case for case in CATALOGUE if case.name == "once-differentiable")
    with pytest.raises(OperatorError, match="has no second derivative"):
        agrees(Problem(*case.build()))


def test_the_default_dtype_and_modes_come_back():
    before = torch.get_default_dtype()
    model = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 3))
    agrees(Problem(model, CROSS_ENTROPY, [(x.float(), y) for x, y in vectors(64)]))
    assert torch.get_default_dtype() == before
    assert (torch.ones(2) * 1.0).dtype == torch.float32
    assert all(p.dtype == torch.float32 for p in model.parameters())
