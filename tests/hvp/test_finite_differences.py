"""Products from differences of gradients: measured errors, refusals, models without a second derivative."""

from __future__ import annotations

import pytest
import torch
from models import OnceCube, mlp, vectors
from torch import nn

import hesd_fast as hesd
from hesd_fast import losses
from hesd_fast.errors import OperatorError
from hesd_fast.hvp import finite_differences
from hesd_fast.operators import HessianOperator
from hesd_fast.problem.problem import Problem

CROSS_ENTROPY = losses.supervised(nn.CrossEntropyLoss())
BOTH = ["finite_differences", "forward_differences"]


def relative(found, wanted):
    return float(torch.linalg.vector_norm(found.double() - wanted.double()) / torch.linalg.vector_norm(wanted.double()))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", BOTH)
def test_products_of_a_smooth_network_are_as_good_as_measured(name, dtype):
    torch.manual_seed(0)
    model = mlp(nn.Tanh).to(dtype)
    problem = Problem(model, CROSS_ENTROPY, [(x.to(dtype), y) for x, y in vectors(8, 2)])
    operator = HessianOperator(problem, hvp=name)
    exact = HessianOperator(problem)
    top = torch.randn(1, problem.size, dtype=dtype)
    for _ in range(20):  # towards the largest eigenvalue, as Lanczos vectors go
        top = exact.matmat(top / top.norm())
    found = operator.matmat(top)
    # the error in another direction than the measured one may be a few times as large
    assert relative(found, exact.matmat(top)) <= 16 * operator.strategy.error
    assert operator.strategy.error <= {torch.float64: 1e-5, torch.float32: 1e-2}[dtype]
    if dtype == torch.float64 and name == "finite_differences":
        assert operator.strategy.error <= 1e-8


def test_central_differences_are_better_than_one_sided_ones():
    torch.manual_seed(0)
    problem = Problem(mlp(nn.Tanh).double(), CROSS_ENTROPY, vectors(8))
    errors = []
    for name in BOTH:
        operator = HessianOperator(problem, hvp=name)
        operator.matvec(torch.ones(problem.size, dtype=torch.float64))
        errors.append(operator.strategy.error)
    assert errors[0] < errors[1] / 10


@pytest.mark.parametrize("name", BOTH)
def test_scale_of_the_vector_does_not_matter(name):
    torch.manual_seed(0)
    problem = Problem(mlp(nn.Tanh).double(), CROSS_ENTROPY, vectors(8, 2))
    operator = HessianOperator(problem, hvp=name)
    vector = torch.randn(problem.size, dtype=torch.float64)
    plain = operator.matvec(vector)
    for scale in (1e-20, 1e20):
        assert relative(operator.matvec(scale * vector) / scale, plain) <= 1e-6
    assert not operator.matvec(0 * vector).any()


def test_kinks_are_refused(monkeypatch):
    torch.manual_seed(0)
    sharp = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 3))
    problem = Problem(sharp, CROSS_ENTROPY, [(x.float(), y) for x, y in vectors(64)])
    monkeypatch.setattr(finite_differences, "STEPS", (0.1, 0.03))  # steps over many kinks
    with pytest.raises(OperatorError, match=r"finite differences are off by .* against an exact product; at most 0.01"):
        HessianOperator(problem, hvp="finite_differences").matvec(torch.ones(problem.size))


class Cubic(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.first, self.last, self.function = nn.Linear(8, 10), nn.Linear(10, 3), function

    def forward(self, x):
        return self.last(self.function(self.first(x).tanh()))


@pytest.mark.parametrize("name", BOTH)
def test_a_model_without_a_second_derivative_has_a_spectrum(name):
    torch.manual_seed(0)
    model = Cubic(OnceCube.apply).double()
    data = vectors(8, 3)
    problem = Problem(model, CROSS_ENTROPY, data)
    with pytest.raises(OperatorError, match="no second derivative"):
        HessianOperator(problem).matvec(torch.ones(problem.size, dtype=torch.float64))
    operator = HessianOperator(problem, hvp=name)
    vector = torch.randn(problem.size, dtype=torch.float64)
    found = operator.matvec(vector)
    model.function = lambda x: x**3
    assert relative(found, HessianOperator(Problem(model, CROSS_ENTROPY, data)).matvec(vector)) <= 1e-5


def test_the_report_says_what_the_differences_are_worth():
    torch.manual_seed(0)
    problem = Problem(mlp(nn.Tanh).double(), CROSS_ENTROPY, vectors(8, 2))
    report = hesd.analyze(problem, max_steps=6, block_size=2, hvp="finite_differences", progress=False)
    exact = hesd.analyze(problem, max_steps=6, block_size=2, hvp="double_backward", progress=False)
    check = next(check for check in report.checks if check.name == "finite differences")
    assert "were off by" in check.detail
    assert report.lambda_max.value == pytest.approx(exact.lambda_max.value, rel=1e-6)


class Listed(nn.Module):
    """Reaches its weights through a list, as recurrent layers of PyTorch do."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 3)
        self.weights = [self.linear.weight]

    def forward(self, x):
        return nn.functional.linear(x, self.weights[0], self.linear.bias).tanh()


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.head = nn.LSTM(4, 5, batch_first=True), nn.Linear(5, 3)

    def forward(self, x):
        return self.head(self.layer(x.view(len(x), 2, 4))[0][:, -1])


class Checkpointed(nn.Module):
    """Runs its first layers again in the backward pass."""

    def __init__(self, everything=False):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 6), nn.Softplus(), nn.Linear(6, 3))
        self.depth = 5 if everything else 3

    def forward(self, x):
        first, rest = self.layers[: self.depth], self.layers[self.depth :]
        return rest(torch.utils.checkpoint.checkpoint(first, x, use_reentrant=False))


@pytest.mark.parametrize("name", BOTH)
@pytest.mark.parametrize("build", [Listed, Recurrent, Checkpointed, lambda: Checkpointed(True)])
def test_moved_weights_are_seen_by_all_code_that_uses_them(build, name):
    torch.manual_seed(0)
    model, data = build().double(), vectors(8, 3)
    problem = Problem(model, CROSS_ENTROPY, data)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    panel = torch.randn(2, problem.size, dtype=torch.float64)
    found = HessianOperator(problem, hvp=name).matmat(panel)
    assert relative(found, HessianOperator(problem).matmat(panel)) <= {BOTH[0]: 1e-7, BOTH[1]: 1e-5}[name]
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())


class Sinc(nn.Module):
    """A filter bank whose second derivative is not a number in PyTorch where the sinc is at its top."""

    def __init__(self, by_hand):
        super().__init__()
        self.cut, self.head, self.by_hand = nn.Parameter(torch.tensor([0.3, 0.7])), nn.Linear(2, 3), by_hand

    def forward(self, x):
        angle = self.cut[:, None] * torch.arange(-3.0, 5.0)
        if self.by_hand:
            shifted = torch.where(angle == 0, 1.0, torch.pi * angle)
            taps = torch.where(angle == 0, 1 - (torch.pi * angle) ** 2 / 6, shifted.sin() / shifted)
        else:
            taps = torch.sinc(angle)
        return self.head((x @ taps.T).tanh())


def test_an_exact_product_that_is_not_finite_is_no_measure_of_differences():
    torch.manual_seed(0)
    model, data = Sinc(by_hand=False).double(), vectors(8)
    operator = HessianOperator(Problem(model, CROSS_ENTROPY, data), hvp="finite_differences")
    panel = torch.randn(3, operator.size, dtype=torch.float64)
    found = operator.matmat(panel)
    assert operator.strategy.error > 0
    model.by_hand = True
    wanted = HessianOperator(Problem(model, CROSS_ENTROPY, data)).matmat(panel)
    assert relative(found, wanted) <= 1e-7


def test_a_loss_that_is_linear_in_its_parameters_has_zero_differences():
    problem = Problem(nn.Linear(8, 3).double(), lambda m, b: m(b[0]).sum(), vectors(8))
    operator = HessianOperator(problem, hvp="finite_differences")
    assert float(operator.matvec(torch.ones(problem.size, dtype=torch.float64)).abs().max()) <= 1e-7


def test_gradients_that_pytorch_cannot_compute_elsewhere_are_an_error_of_ours():
    class Fragile(torch.autograd.Function):
        @staticmethod
        def forward(context, x):
            context.save_for_backward(x)
            return x**2

        @staticmethod
        def backward(context, gradient):
            (x,) = context.saved_tensors
            if not torch.equal(x, wanted[0]):
                return gradient.view(-1, 7)  # of another size than x
            return 2 * x * gradient

    model, data, wanted = nn.Linear(8, 3).double(), vectors(8), []
    wanted.append(model(data[0][0]).detach())
    problem = Problem(model, lambda m, b: Fragile.apply(m(b[0])).mean(), data)
    with pytest.raises(OperatorError, match=r"gradient of batch 0 cannot be computed where the weights are moved"):
        HessianOperator(problem, hvp="finite_differences").matvec(torch.ones(problem.size, dtype=torch.float64))


@pytest.mark.parametrize("name", BOTH)
@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_a_vector_that_is_not_finite_leaves_nothing_behind(name, bad):
    torch.manual_seed(0)
    problem = Problem(mlp(nn.Tanh).double(), CROSS_ENTROPY, [(x.double(), y) for x, y in vectors(8, 2)])
    panel = torch.randn(1, problem.size, dtype=torch.float64)
    wanted = HessianOperator(problem, hvp=name).matmat(panel)
    operator = HessianOperator(problem, hvp=name)
    with pytest.raises(OperatorError):
        operator.matmat(torch.where(torch.arange(problem.size) == 3, bad, panel))
    assert torch.equal(operator.matmat(panel), wanted)


class Tokens(nn.Module):
    """Words with a row of padding; ``tied`` to the head, whose row of it is a weight like others."""

    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(5, 4, padding_idx=0), nn.Linear(4, 5, bias=False)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, tokens):
        return self.head(self.embedding(tokens).tanh().mean(1))


def padded(tied: bool) -> Problem:
    torch.manual_seed(0)
    model = Tokens(tied).double()
    with torch.no_grad():
        model.embedding.weight[0] = torch.randn(4)
    return Problem(model, CROSS_ENTROPY, [(torch.tensor([[1, 2, 0], [3, 0, 0], [4, 1, 2]]), torch.tensor([1, 0, 3]))])


@pytest.mark.parametrize("name", BOTH)
def test_a_row_of_padding_is_not_moved(name):
    problem = padded(tied=False)
    panel = torch.eye(problem.size, dtype=torch.float64)
    found, exact = HessianOperator(problem, hvp=name).matmat(panel), HessianOperator(problem).matmat(panel)
    assert (found[:4] == 0).all()
    assert relative(found, exact) <= 1e-6


@pytest.mark.parametrize("name", BOTH)
def test_a_row_of_padding_that_is_also_another_weight_is_refused(name):
    operator = HessianOperator(padded(tied=True), hvp=name)
    with pytest.raises(OperatorError, match=r"row of padding of 'embedding\.weight' .*; use hvp='double_backward'"):
        operator.matvec(torch.ones(20, dtype=torch.float64))
