"""Products by a compiled program; the catalogue checks the traces of all models, here some are compiled."""

from __future__ import annotations

import warnings

import pytest
import torch
from models import Cube, mlp, vectors
from torch import Tensor, nn

from hesd_fast import losses
from hesd_fast.errors import HESDWarning, OperatorError
from hesd_fast.hvp import compiled, planner
from hesd_fast.operators import HessianOperator
from hesd_fast.problem.problem import Problem

CROSS_ENTROPY = losses.supervised(nn.CrossEntropyLoss())


def small_problem(*sizes: int, model: nn.Module | None = None) -> Problem:
    torch.manual_seed(0)
    return Problem((model or mlp(nn.Tanh)).double(), CROSS_ENTROPY, vectors(*sizes))


def assert_right(problem: Problem, operator: HessianOperator) -> None:
    panel = torch.randn(3, problem.size, dtype=problem.dtype, generator=torch.Generator().manual_seed(1))
    wanted = HessianOperator(problem).matmat(panel)
    found = operator.matmat(panel)
    assert torch.linalg.vector_norm(found - wanted) <= 1024 * problem.epsilon * torch.linalg.vector_norm(wanted)
    assert torch.equal(operator.matmat(panel), found)


def test_a_program_is_compiled_and_right():
    model = nn.Sequential(nn.Linear(8, 6), nn.LayerNorm(6), nn.GELU(), nn.Linear(6, 3), nn.Softplus())
    problem = small_problem(5, 5, model=model)
    operator = HessianOperator(problem, hvp="compiled")
    with warnings.catch_warnings():
        warnings.simplefilter("error", HESDWarning)  # of a compiler that failed
        assert_right(problem, operator)
    assert len(operator.strategy._programs) == 1
    assert operator.strategy.once_seconds > 0


def test_batches_of_one_shape_share_a_program(monkeypatch):
    compiled_programs = []
    monkeypatch.setattr(torch, "compile", lambda program, **_: compiled_programs.append(1) or program)
    problem = small_problem(8, 8, 5, 8)
    operator = HessianOperator(problem, hvp="compiled")
    assert_right(problem, operator)
    assert len(compiled_programs) == 2
    assert set(operator.strategy._kept) == {0, 1, 2, 3}


def test_without_a_compiler_the_trace_runs_as_it_is(monkeypatch):
    def failing(program, **options):
        def fail(*tensors):
            raise RuntimeError("no C++ compiler found\nmore")

        return fail

    monkeypatch.setattr(torch, "compile", failing)
    problem = small_problem(8, 8)
    operator = HessianOperator(problem, hvp="compiled")
    with pytest.warns(
        HESDWarning, match="runs uncompiled, as torch.compile failed: no C\\+\\+ compiler found$"
    ) as found:
        operator.matvec(torch.ones(problem.size, dtype=torch.float64))
    assert len(found) == 1
    assert_right(problem, operator)


def test_what_cannot_be_compiled_is_no_candidate(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda program, **options: lambda *tensors: 1 / 0)
    monkeypatch.setattr(planner, "SHORT_RUN", 0.0)
    monkeypatch.setattr(planner, "ORDER", ("compiled",))
    strategy, plan = planner.choose(small_problem(8).prepare(), 2, 100, share=1e6)
    assert strategy.name == "double_backward"
    assert "division by zero" in plan.trials[1].note


class ThroughNumPy(Cube):
    """x^3, whose second derivative is computed outside of PyTorch."""

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        return Slope.apply(x, gradient)


class Slope(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, gradient):
        ctx.save_for_backward(x, gradient)
        return 3 * x**2 * gradient

    @staticmethod
    def backward(ctx, change):
        x, gradient = ctx.saved_tensors
        by_x = torch.from_numpy((6 * x * gradient * change).detach().numpy().copy())
        return by_x, 3 * x**2 * change


class Cubed(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 3)

    def forward(self, x):
        return ThroughNumPy.apply(self.linear(x))


def test_a_trace_that_holds_its_vector_is_refused():
    problem = small_problem(8, model=Cubed())
    with pytest.raises(OperatorError, match="hvp='compiled'"):
        HessianOperator(problem, hvp="compiled").matvec(torch.ones(problem.size, dtype=torch.float64))


def test_a_product_that_is_not_finite_is_named_by_parameter():
    class Root(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(8, 3)

        def forward(self, x):
            return self.linear(x) + self.linear.weight.abs().pow(1.5).sum()

    model = Root()
    with torch.no_grad():
        model.linear.weight[0, 1] = 0.0  # the second derivative of |w|^1.5 is infinite there
    problem = small_problem(8, model=model)
    with pytest.raises(OperatorError, match=r"linear\.weight"):
        HessianOperator(problem, hvp="compiled").matvec(torch.ones(problem.size, dtype=torch.float64))


def traced(function, *inputs: Tensor):
    graph = compiled.make_fx(function)(*inputs)
    return compiled._split(graph)


def test_memory_that_is_written_to_is_computed_anew():
    x, y = torch.randn(2, 4, dtype=torch.float64)
    weights = torch.randn(4, dtype=torch.float64)

    def function(v: Tensor) -> list[Tensor]:
        buffer = weights * 2  # does not depend on v, but is written to by what does
        before = buffer * v
        buffer.add_(v)
        return [buffer * v + before]

    constants, linear = traced(function, x)
    for v in (x, y, x):
        assert torch.equal(linear(*constants, v)[0], function(v)[0])


def test_memory_that_is_written_to_after_a_read_is_computed_anew():
    x, y = torch.randn(2, 4, dtype=torch.float64)
    weights = torch.randn(4, dtype=torch.float64)

    def function(v: Tensor) -> list[Tensor]:
        buffer = weights * 2
        before = buffer[:2] * v[:2]
        buffer.mul_(3)
        return [torch.cat((before, buffer[2:] * v[2:]))]

    constants, linear = traced(function, x)
    for v in (x, y, x):
        assert torch.equal(linear(*constants, v)[0], function(v)[0])


@pytest.mark.parametrize("which", ["constant", "input"])
def test_writes_to_what_outlives_the_product_are_refused(which):
    x, saved = torch.randn(2, 4, dtype=torch.float64)
    with pytest.raises(OperatorError, match="writes to a tensor in place"):
        traced(lambda v: [(saved if which == "constant" else v).view(2, 2).mul_(2).sum() * v], x)
