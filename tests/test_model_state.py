"""The user's model comes back exactly as it was, after a run and after a failure."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from models import vectors
from torch import nn
from torch.nn import functional

from hesd_fast.errors import OperatorError, ProblemError
from hesd_fast.operators import HessianOperator
from hesd_fast.problem import MODES, Problem


class Stateful(nn.Module):
    """A model with every kind of state, all of which its forward pass changes in train mode, and some always."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 12)
        self.norm = nn.BatchNorm1d(12)
        self.dropout = nn.Dropout(0.5)
        self.last = nn.Linear(12, 3)
        self.register_buffer("calls", torch.zeros(()), persistent=False)
        self.register_buffer("replaced", torch.ones(2))
        self.register_buffer("absent", None)
        self.cache = torch.zeros(3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        self.replaced = self.replaced * 2
        self.absent = torch.ones(1)
        self.cache = x.mean()
        self.new_attribute = x.sum()
        if not hasattr(self, "new_buffer"):
            self.register_buffer("new_buffer", torch.ones(1))
        return self.last(self.dropout(self.norm(self.first(x)).tanh()))


def stateful() -> Stateful:
    torch.manual_seed(3)
    model = Stateful().double().train()
    model.dropout.eval()
    model.norm.running_mean.uniform_(-1, 1)
    model.first.weight.requires_grad_(False)
    model.last.bias.grad = torch.randn(3, dtype=torch.float64)
    return model


def noisy_loss(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    noise = random.random() + np.random.rand() + torch.rand(())  # noqa: NPY002
    return functional.cross_entropy(model(batch[0]), batch[1]) * (1 + noise)


def snapshot(model: nn.Module) -> dict[str, object]:
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return {
        "values": {name: tensor.detach().clone() for name, tensor in tensors},
        "identities": {name: id(tensor) for name, tensor in tensors},
        "versions": {name: tensor._version for name, tensor in tensors},
        "buffers": {name: sorted(module._buffers) for name, module in model.named_modules()},
        "state_dict": list(model.state_dict()),
        "training": {name: module.training for name, module in model.named_modules()},
        "requires_grad": {name: parameter.requires_grad for name, parameter in model.named_parameters()},
        "grad": {
            name: (id(p.grad), None if p.grad is None else p.grad.clone()) for name, p in model.named_parameters()
        },
        "hooks": {name: len(module._forward_hooks) for name, module in model.named_modules()},
        "cache": id(getattr(model, "cache", None)),
        "has_new_attribute": hasattr(model, "new_attribute"),
        "torch": torch.get_rng_state(),
        "numpy": np.random.get_state()[1:],  # noqa: NPY002
        "python": random.getstate(),
        "grad_mode": torch.is_grad_enabled(),
        "flash": torch.backends.cuda.flash_sdp_enabled(),
    }


def equal(a: object, b: object) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, np.ndarray):
        return np.array_equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, tuple):
        return len(a) == len(b) and all(equal(x, y) for x, y in zip(a, b, strict=True))
    return a == b


def assert_same(before: dict[str, object], after: dict[str, object]) -> None:
    assert [key for key in before if not equal(before[key], after[key])] == []


def test_snapshot_sees_a_forward_pass() -> None:
    model = stateful()
    before = snapshot(model)
    noisy_loss(model, vectors(4)[0])
    after = snapshot(model)
    changed = {key for key in before if not equal(before[key], after[key])}
    assert changed >= {"values", "identities", "buffers", "cache", "has_new_attribute", "torch", "numpy", "python"}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("parameters", [None, ".*"])
def test_model_is_unchanged_after_a_run(mode: str, parameters: str | None) -> None:
    model, data = stateful(), vectors(6, 4)
    random.seed(1)
    before = snapshot(model)
    operator = HessianOperator(Problem(model, noisy_loss, data, parameters=parameters, mode=mode))
    operator.matmat(torch.ones(2, operator.size, dtype=torch.float64))
    operator.matvec(torch.ones(operator.size, dtype=torch.float64))
    assert_same(before, snapshot(model))


@pytest.mark.parametrize("failing_call", range(1, 6))  # both calls of the first pass, the check, both of the product
@pytest.mark.parametrize("mode", MODES)
def test_model_is_unchanged_after_a_failure(mode: str, failing_call: int) -> None:
    model, data, calls = stateful(), vectors(6, 4), []

    def failing_loss(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        loss = noisy_loss(model, batch)
        if len(batch[0]) < 4:  # half of the first batch, whose failures are let pass
            return loss
        calls.append(1)
        if len(calls) == failing_call:
            raise ArithmeticError("no more")
        return loss

    problem = Problem(model, failing_loss, data, mode=mode)
    before = snapshot(model)
    with pytest.raises(ArithmeticError, match="no more"):
        HessianOperator(problem).matvec(torch.ones(problem.size, dtype=torch.float64))
    assert_same(before, snapshot(model))
    assert len(calls) == failing_call
    assert torch.isfinite(HessianOperator(problem).matvec(torch.ones(problem.size, dtype=torch.float64))).all()


def test_nested_sessions_restore_once() -> None:
    model = stateful()
    problem = Problem(model, noisy_loss, vectors(6, 4), mode="eval")
    before = snapshot(model)
    with problem.session():
        with problem.session():
            problem.prepare()
        assert not model.training
        with torch.no_grad(), problem.session():
            assert torch.is_grad_enabled()
            assert all(term.evaluate().requires_grad for term in problem.terms())
    assert_same(before, snapshot(model))


def test_held_session_gives_the_same_product() -> None:
    problem = Problem(stateful(), noisy_loss, vectors(6, 4), mode="train")
    operator, vector = HessianOperator(problem), torch.ones(problem.size, dtype=torch.float64)
    alone = operator.matvec(vector)
    with problem.session():
        assert torch.equal(operator.matvec(vector), alone)
        assert torch.equal(operator.matvec(vector), alone)


def test_unselected_parameters_build_no_graph() -> None:
    model = stateful()
    required = []

    def watching_loss(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        required.append([name for name, parameter in model.named_parameters() if parameter.requires_grad])
        return noisy_loss(model, batch)

    Problem(model, watching_loss, vectors(4), parameters=["first.weight"]).prepare()
    assert required == [["first.weight"]]


def test_loss_that_calls_backward_leaves_gradients_alone() -> None:
    def backward_loss(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        noisy_loss(model, batch).backward()
        return noisy_loss(model, batch)

    model = stateful()
    problem = Problem(model, backward_loss, vectors(6, 4))
    before = snapshot(model)
    HessianOperator(problem).matvec(torch.ones(problem.size, dtype=torch.float64))
    assert_same(before, snapshot(model))


def test_written_weights_are_an_error() -> None:
    class Decaying(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with torch.no_grad():
                self.weight.mul_(0.99)
            return super().forward(x)

    problem = Problem(Decaying(8, 3), lambda m, b: m(b[0].float()).square().mean(), vectors(4))
    with pytest.raises(OperatorError, match=r"'weight' was written to in place .* leave the weights alone"):
        problem.prepare()


class Counting(nn.Module):
    """A layer with a tensor that is neither parameter nor buffer, written to in place if ``writes``."""

    def __init__(self, writes: bool) -> None:
        super().__init__()
        self.layer, self.calls, self.writes = nn.Linear(8, 3), torch.zeros(1), writes

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.writes:
            self.calls += 1
        return self.layer(x)


def squared(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    return model(batch[0].float()).square().mean()


def test_written_tensor_attributes_are_an_error_before_any_long_work() -> None:
    Problem(nn.Sequential(Counting(writes=False)), squared, vectors(4)).prepare()
    problem = Problem(nn.Sequential(Counting(writes=True)), squared, vectors(4))
    message = r"'0\.calls' was written to in place .*register_buffer"
    # The inner error comes from the preparation, the outer one from the session that ends with the model changed.
    with pytest.raises(OperatorError, match=message), problem.session(), pytest.raises(OperatorError, match=message):
        problem.prepare()


def test_lists_and_numbers_that_forward_writes_stay() -> None:
    class Keeping(nn.Linear):
        seen: list[int]

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.seen.append(len(x))
            return super().forward(x)

    model = Keeping(8, 3)
    model.seen = []
    Problem(model, squared, vectors(4)).prepare()
    assert model.seen == [4]


def test_buffers_changed_after_a_held_session_are_an_error() -> None:
    model = stateful()
    problem = Problem(model, noisy_loss, vectors(4))
    with problem.session():
        problem.prepare()
    with problem.session():
        list(problem.terms())
    model.norm.running_mean.add_(1)
    with pytest.raises(ProblemError, match=r"'norm\.running_mean' of the model has changed"), problem.session():
        pass


@pytest.mark.parametrize("change", ["value", "object"])
def test_weights_changed_between_products_are_an_error(change: str) -> None:
    model = stateful()
    operator = HessianOperator(Problem(model, noisy_loss, vectors(4)))
    vector = torch.ones(operator.size, dtype=torch.float64)
    operator.matvec(vector)
    if change == "value":
        with torch.no_grad():
            model.last.weight.add_(1)
    else:
        model.last.weight = nn.Parameter(model.last.weight.detach().clone())
    with pytest.raises(ProblemError, match=r"'last\.weight' of the model has changed .* make a new Problem"):
        operator.matvec(vector)


def test_shared_buffers_stay_shared() -> None:
    model = nn.ModuleList([nn.BatchNorm1d(8), nn.BatchNorm1d(8)]).double()
    model[1]._buffers["running_mean"] = model[0].running_mean
    seen = []

    def loss(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        seen.append(model[0].running_mean is model[1].running_mean)
        return (model[0](batch[0]) * model[1](batch[0])).mean()

    Problem(model, loss, vectors(4)).prepare()
    assert seen == [True]
    assert model[0].running_mean is model[1].running_mean
