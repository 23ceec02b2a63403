"""Products are compared with differences of gradients: wrong second derivatives of PyTorch are named, and no others."""

from __future__ import annotations

import copy
import threading
import warnings

import pytest
import torch
from catalogue import CATALOGUE, WITHOUT_SECOND_DERIVATIVE
from dense import dense_hessian
from models import GraphlessCube, OnContext, mlp, vectors
from torch import Tensor, nn
from torch.nn import functional

import hesd_fast as hesd
from hesd_fast import losses
from hesd_fast.errors import HESDWarning, OperatorError
from hesd_fast.hvp import wide_loss
from hesd_fast.hvp.derivative_check import check_derivatives
from hesd_fast.operators import HessianOperator
from hesd_fast.problem.problem import Problem

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


@torch.no_grad()
def without_gradient(x):
    return x.sigmoid()


def with_layer(layer) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 6), layer, nn.Linear(6, 3)).double()


WRONG = [
    (Layer(Silu.apply), functional.silu, "autograd Function Silu .in module '1'.*keep no intermediate"),
    (Layer(OnContext.apply), torch.square, "autograd Function OnContext .in module '1'"),
    (Layer(GraphlessCube.apply), lambda x: x**3, "autograd Function GraphlessCube .in module '1'"),
]


def agrees(problem: Problem):
    prepared = problem.prepare()
    with prepared.session():
        return check_derivatives(prepared)


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
            r"\.detach\(\), \.data or torch\.no_grad\(\) in module '1'.*straight-through",
        ),
        (Layer(lambda x: x * x.detach().sigmoid()), r"\.detach\(\), \.data or torch\.no_grad\(\) in module '1'"),
        (Layer(lambda x: x * without_gradient(x)), r"torch\.no_grad\(\) in module '1'"),
    ],
    ids=["hook", "straight-through", "stopped", "no_grad"],
)
def test_hooks_and_stopped_gradients_are_named(layer, cause):
    operator = HessianOperator(Problem(with_layer(layer), CROSS_ENTROPY, vectors(7)))
    with pytest.warns(HESDWarning, match=f"is not the derivative of its first.*{cause}"):
        operator.matvec(torch.ones(operator.size, dtype=torch.float64))


def test_the_power_iteration_of_spectral_norm_is_named_in_train_mode_and_right_in_eval_mode():
    torch.manual_seed(0)
    model = nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(8, 6)), nn.Tanh(), nn.Linear(6, 3)).double()
    vector = torch.ones(Problem(model, CROSS_ENTROPY, vectors(7)).size, dtype=torch.float64)
    with pytest.warns(
        HESDWarning, match=r"torch\.no_grad\(\) in module '0\.parametrizations\.weight\.0'.*power iteration"
    ):
        HessianOperator(Problem(model, CROSS_ENTROPY, vectors(7), mode="train")).matvec(vector)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        HessianOperator(Problem(model, CROSS_ENTROPY, vectors(7))).matvec(vector)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_hessian_that_is_nothing_but_rounding_raises_no_alarm(dtype):
    class Shifted(nn.Module):
        """A number that is added to all classes changes no probability."""

        def __init__(self):
            super().__init__()
            self.shift = nn.Parameter(torch.tensor(0.3))

        def forward(self, x):
            return x[:, :3].sin() + self.shift

    for seed in range(20):
        torch.manual_seed(seed)
        problem = Problem(Shifted().to(dtype), CROSS_ENTROPY, [(x.to(dtype), y) for x, y in vectors(9)])
        assert agrees(problem).agrees is not False


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
    monkeypatch.setattr(wide_loss, "COPIES", 1e18)

    model = nn.Sequential(nn.Linear(8, 64), activation(), nn.Linear(64, 3))
    assert agrees(Problem(model, CROSS_ENTROPY, [(x.float(), y) for x, y in vectors(64)])).agrees is agreement


@pytest.mark.parametrize(("function", "agreement"), [(GraphlessCube.apply, False), (OnContext.apply, None)])
def test_without_float64_a_derivative_that_is_lost_is_still_seen(monkeypatch, function, agreement):
    # A Function may have kinks, which average out to another curvature where there are many; not so a lost product.
    monkeypatch.setattr(wide_loss, "COPIES", 1e18)
    model = with_layer(Layer(function)).float()
    problem = Problem(model, CROSS_ENTROPY, [(x.float(), y) for x, y in vectors(12)], parameters="0.*")
    assert agrees(problem).agrees is agreement


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


def trained(model: nn.Module, loss, batch, steps: int) -> nn.Module:
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    for _ in range(steps):
        optimizer.zero_grad()
        loss(model, batch).backward()
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_wrong_derivative_of_a_trained_network_is_seen_where_it_moves_a_product_little(dtype):
    torch.manual_seed(0)
    batch = torch.randn(64, 4, dtype=dtype), torch.randn(64, 1, dtype=dtype)

    def loss(model, batch):
        return (model(batch[0]) - batch[1]).square().mean()

    model = nn.Sequential(nn.Linear(4, 16), Layer(Silu.apply), nn.Linear(16, 1)).to(dtype)
    problem = Problem(trained(model, loss, batch, 300), loss, batch)
    assert agrees(problem).agrees is False
    model[1] = nn.SiLU()
    assert agrees(Problem(model, loss, batch)).agrees is True


class Scaled(nn.Module):
    """A network with one parameter of another scale, by which it is divided again."""

    def __init__(self, scale):
        super().__init__()
        self.first, self.last, self.own = nn.Linear(8, 16), nn.Linear(16, 3), nn.Parameter(torch.tensor(scale))
        self.scale = scale

    def forward(self, x):
        return self.last(self.first(x).tanh()) * (self.own / self.scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [1e-6, 1e3, 1e7, 1e9, 1e12])
def test_parameters_of_other_scales_raise_no_alarm(scale, dtype):
    torch.manual_seed(0)
    problem = Problem(Scaled(scale).to(dtype), CROSS_ENTROPY, [(x.to(dtype), y) for x, y in vectors(16)])
    assert agrees(problem).agrees is True


def test_a_loss_that_is_not_defined_where_weights_are_moved_is_unclear_and_no_error():
    model = nn.Linear(8, 3).double()
    before = model.weight.detach().clone()

    def loss(model, batch):
        if not torch.equal(model.weight, before):
            raise ValueError("outside of where it is defined")
        return functional.cross_entropy(model(batch[0]), batch[1])

    problem = Problem(model, loss, vectors(8))
    found = agrees(problem)
    assert found.agrees is None
    assert "outside of where it is defined" in found.detail
    HessianOperator(problem).matvec(torch.ones(problem.size, dtype=torch.float64))


def test_a_part_of_a_problem_is_looked_at_by_itself():
    problem = Problem(with_layer(Layer(Silu.apply)), CROSS_ENTROPY, vectors(8))
    assert agrees(problem).agrees is False
    assert agrees(problem.restricted(["2.weight", "2.bias"])).agrees is True
    assert agrees(problem.restricted(["0.weight"])).agrees is False


def test_other_threads_keep_their_default_dtype():
    seen = []

    def loss(model, batch):
        thread = threading.Thread(target=lambda: seen.append(torch.ones(2).dtype))
        thread.start()
        thread.join()
        return functional.cross_entropy(model(batch[0]).relu() + torch.zeros(3), batch[1])

    model = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 3))
    assert agrees(Problem(model, loss, [(x.float(), y) for x, y in vectors(16)])).agrees is True
    assert set(seen) == {torch.float32}
