"""Products from differences of gradients: measured errors, refusals, models without a second derivative."""

from __future__ import annotations

import pytest
import torch
from models import mlp, vectors
from torch import nn
from torch.autograd.function import once_differentiable

import hesd_fast as hesd
from hesd_fast import losses
from hesd_fast.errors import OperatorError
from hesd_fast.hvp import finite_differences
from hesd_fast.operators import HessianOperator
from hesd_fast.problem import Problem

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


class Cube(torch.autograd.Function):
    """x**3, whose derivative refuses to be differentiated."""

    @staticmethod
    def forward(context, x):
        context.save_for_backward(x)
        return x**3

    @staticmethod
    @once_differentiable
    def backward(context, gradient):
        (x,) = context.saved_tensors
        return 3 * x**2 * gradient


class Cubic(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.first, self.last, self.function = nn.Linear(8, 10), nn.Linear(10, 3), function

    def forward(self, x):
        return self.last(self.function(self.first(x).tanh()))


@pytest.mark.parametrize("name", BOTH)
def test_a_model_without_a_second_derivative_has_a_spectrum(name):
    torch.manual_seed(0)
    model = Cubic(Cube.apply).double()
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


def test_parameters_reached_another_way_are_refused():
    class Listed(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(8, 3)
            self.weights = [self.linear.weight]

        def forward(self, x):
            return nn.functional.linear(x, self.weights[0], self.linear.bias)

    problem = Problem(Listed().double(), CROSS_ENTROPY, vectors(8))
    with pytest.raises(OperatorError, match="cannot move the weights of this model"):
        HessianOperator(problem, hvp="finite_differences").matvec(torch.ones(27, dtype=torch.float64))


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
