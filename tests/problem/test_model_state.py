"""The user's model comes back exactly as it was, after a run and after a failure."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
from models import vectors
from snapshots import assert_same, equal, snapshot
from torch import nn
from torch.nn import functional

import hesd_fast as hesd
from hesd_fast.errors import OperatorError, ProblemError
from hesd_fast.hvp import STRATEGIES
from hesd_fast.operators import HessianOperator
from hesd_fast.problem.model_state import ModelState
from hesd_fast.problem.problem import MODES, Problem
from hesd_fast.problem.tensor_digests import digests_of

NAMES = (r"first\..*", r"last\..*", ".*")


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


@pytest.mark.parametrize("failing_call", range(1, 9))  # in the first pass, the checks, and the product
@pytest.mark.parametrize("mode", MODES)
def test_model_is_unchanged_after_a_failure(mode: str, failing_call: int) -> None:
    model, data, calls, fails = stateful(), vectors(6, 4), [], [True]

    def failing_loss(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        loss = noisy_loss(model, batch)
        if len(batch[0]) < 4:  # half of the first batch, whose failures are let pass
            return loss
        calls.append(1)
        # Where the check of derivatives moves weights, an exception says nothing, and the next call raises it again.
        if fails[0] and len(calls) >= failing_call:
            raise ArithmeticError("no more")
        return loss

    problem = Problem(model, failing_loss, data, mode=mode)
    before = snapshot(model)
    with pytest.raises(ArithmeticError, match="no more"):
        HessianOperator(problem).matvec(torch.ones(problem.size, dtype=torch.float64))
    assert_same(before, snapshot(model))
    fails[0] = False
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

    problem = Problem(model, watching_loss, vectors(4), parameters=["first.weight"])
    problem.prepare()
    # The second evaluation sees whether the loss is another one with those that the user differentiates by.
    assert required == [["first.weight"], [name for name, _ in model.named_parameters()]]
    with problem.session():
        next(iter(problem.terms())).evaluate()
    assert required[2:] == [["first.weight"]]


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

    model = Decaying(8, 3)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    problem = Problem(model, squared, vectors(4))
    with pytest.raises(OperatorError, match=r"'weight' was written to in place .* leave the weights alone"):
        problem.prepare()
    assert equal(before, {name: p.detach() for name, p in model.named_parameters()})


def scale(model: nn.Module) -> None:
    model[0].weight.data.mul_(1.5)


def clamp(model: nn.Module) -> None:
    model[0].weight.data.clamp_(-0.05, 0.05)


def swap(model: nn.Module) -> None:
    rows = model[0].weight.data
    rows.copy_(rows.flip(0))  # the same numbers in other places


def average(model: nn.Module) -> None:
    model[1].weight.data.lerp_(torch.zeros_like(model[1].weight), 1e-3)


def buffer(model: nn.Module) -> None:
    model.original.data.add_(1)


def attribute(model: nn.Module) -> None:
    model.plain.data.add_(1)


def double(model: nn.Module) -> None:
    model[0].double()
    model[0].float()


def other_memory(model: nn.Module) -> None:
    model[1].bias.data = model[1].bias.data + 1


WRITES = [
    (scale, "0.weight"),
    (clamp, "0.weight"),
    (swap, "0.weight"),
    (average, "1.weight"),
    (buffer, "statistic"),
    (attribute, "plain"),
    (double, "0.weight"),
    (other_memory, "1.bias"),
]


@pytest.mark.parametrize("hvp", ["auto", "double_backward", "finite_differences"])
@pytest.mark.parametrize(("write", "name"), WRITES, ids=[write.__name__ for write, _ in WRITES])
def test_weights_written_past_autograd_are_an_error_and_come_back(write, name: str, hvp: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 5), nn.Linear(5, 3))
    model.register_buffer("statistic", torch.ones(2))
    model.original, model.plain = model.statistic, torch.ones(3)
    model[0].bias.grad, data = torch.ones(5), vectors(4, 6)
    before = snapshot(model)

    def loss(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        write(model)
        return squared(model, batch)

    operator = HessianOperator(Problem(model, loss, data), hvp=hvp)
    message = rf"{name}' was written to in place .*other memory.*values have been put back.* leave the weights alone"
    with pytest.raises(OperatorError, match=message):
        operator.matvec(torch.ones(operator.size))
    assert_same(before, snapshot(model))
    assert torch.equal(model.plain, torch.ones(3))


def add(model: nn.Module) -> None:
    model.add_module("more", nn.Identity())


def replace(model: nn.Module) -> None:
    model[1] = nn.Linear(5, 3)


def other_parameter(model: nn.Module) -> None:
    model[0].weight = nn.Parameter(model[0].weight.detach().clone())


def take_out(model: nn.Module) -> None:
    model[0].bias = None


@pytest.mark.parametrize("hvp", ["auto", "double_backward", "finite_differences"])
@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize(
    ("change", "name"),
    [(add, "more"), (replace, "1"), (other_parameter, "0.weight"), (take_out, "0.bias")],
)
def test_modules_and_parameters_that_the_loss_replaces_are_an_error_and_come_back(change, name, late, hvp) -> None:
    torch.manual_seed(0)
    model, calls = nn.Sequential(nn.Linear(8, 5), nn.Linear(5, 3)), []
    data = vectors(4, 6)
    before, modules = snapshot(model), dict(model.named_modules())

    def loss(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        value = squared(model, batch)
        calls.append(1)
        if len(calls) > 4 or not late:
            change(model)
        return value

    operator = HessianOperator(Problem(model, loss, data), hvp=hvp)
    with pytest.raises(OperatorError, match=rf"'{name}' of the model was added, replaced .*; .*let forward"):
        operator.matmat(torch.ones(4, operator.size))
    assert_same(before, snapshot(model))
    assert dict(model.named_modules()) == modules


def test_a_module_that_is_replaced_between_products_is_named() -> None:
    model = nn.Sequential(nn.Linear(8, 5), nn.Tanh(), nn.Linear(5, 3))
    operator = HessianOperator(Problem(model, squared, vectors(4)))
    operator.matvec(torch.ones(operator.size))
    model[1] = nn.ReLU()
    with pytest.raises(ProblemError, match=r"'1' of the model has changed .* make a new Problem"):
        operator.matvec(torch.ones(operator.size))


def test_hooks_and_settings_that_a_loss_leaves_behind_are_taken_back() -> None:
    model = nn.Linear(8, 3)
    kept = model.register_forward_hook(lambda module, inputs, output: None)
    model.weight.register_post_accumulate_grad_hook(lambda parameter: None)

    def loss(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        model.register_forward_hook(lambda module, inputs, output: None)
        model.register_forward_pre_hook(lambda module, inputs, options: None, with_kwargs=True)
        model.bias.register_post_accumulate_grad_hook(lambda parameter: None)
        torch.set_default_dtype(torch.float64)
        torch.use_deterministic_algorithms(True, warn_only=True)
        return squared(model, batch)

    HessianOperator(Problem(model, loss, vectors(4))).matvec(torch.ones(27))
    assert list(model._forward_hooks) == [kept.id]
    assert not model._forward_pre_hooks
    assert not model._forward_pre_hooks_with_kwargs
    assert len(model.weight._post_accumulate_grad_hooks) == 1
    assert not model.bias._post_accumulate_grad_hooks
    assert torch.get_default_dtype() == torch.float32
    assert not torch.are_deterministic_algorithms_enabled()


def test_gradient_hooks_that_a_loss_registers_on_parameters_are_refused_and_taken_off() -> None:
    model = nn.Linear(8, 3)

    def loss(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        if model.weight.requires_grad:
            model.weight.register_hook(lambda gradient: 2 * gradient)
        return squared(model, batch)

    with pytest.raises(ProblemError, match=r"'weight' has gradient hooks .*remove them"):
        Problem(model, loss, vectors(4)).prepare()
    assert not model.weight._backward_hooks
    (gradient,) = torch.autograd.grad(model.weight.sum(), model.weight)
    assert torch.equal(gradient, torch.ones(3, 8))


def test_a_selected_parameter_that_the_loss_freezes_is_named() -> None:
    def loss(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        model.bias.requires_grad_(False)
        return squared(model, batch)

    model = nn.Linear(8, 3)
    with pytest.raises(ProblemError, match=r"turned requires_grad of 'bias' off, .*; let them leave it"):
        Problem(model, loss, vectors(4)).prepare()
    assert model.bias.requires_grad


@pytest.mark.parametrize("at", [1, 3, 5, 8])
def test_an_iterator_that_is_used_up_in_a_loss_is_named(at: int) -> None:
    model, calls = nn.Linear(8, 3), iter(range(at - 1))

    def loss(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        if len(batch[0]) > 2:  # not a half
            next(calls)
        return squared(model, batch)

    with pytest.raises(ProblemError, match=r"raised StopIteration at batch 0, as next\(\) does .*; give"):
        hesd.analyze(model, loss, vectors(4), hvp="double_backward", max_steps=9, block_size=1, progress=False)


def test_an_autocast_around_an_analysis_changes_nothing_and_one_inside_counts() -> None:
    model, data = nn.Sequential(nn.Linear(8, 5), nn.Tanh(), nn.Linear(5, 3)), vectors(6)

    def lower(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return squared(model, batch)

    alone = hesd.analyze(model, squared, data, max_steps=3, progress=False)
    with torch.autocast("cpu", torch.bfloat16):
        around = hesd.analyze(model, squared, data, max_steps=3, progress=False)
        assert torch.is_autocast_enabled("cpu")
    assert around.problem.loss == alone.problem.loss
    assert around.lambda_max == alone.lambda_max
    assert Problem(model, lower, data).loss_value != alone.problem.loss


def test_a_write_long_after_the_first_pass_is_an_error_too() -> None:
    model, calls = nn.Linear(8, 3), []

    def loss(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 12:
            model.weight.data.mul_(1 + 1e-6)
        return squared(model, batch)

    problem = Problem(model, loss, vectors(4, 6))
    with pytest.raises(OperatorError, match=r"'weight' was written to in place .* reload it"):
        hesd.analyze(problem, hvp="double_backward", max_steps=20, progress=False)
    assert len(calls) in (12, 13)  # at the end of the pass


def test_weights_changed_past_autograd_between_products_are_an_error() -> None:
    model = stateful()
    operator = HessianOperator(Problem(model, noisy_loss, vectors(4)))
    operator.matvec(torch.ones(operator.size, dtype=torch.float64))
    model.last.weight.data[0, 0] += 1e-12
    with pytest.raises(ProblemError, match=r"'last\.weight' of the model has changed .* make a new Problem"):
        operator.matvec(torch.ones(operator.size, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.int8, torch.bool])
@pytest.mark.parametrize("size", [1, 7, 8, 9, 4 * 1024 + 3, 3 * 8 * 1024])
def test_a_digest_changes_with_every_value_and_place(dtype: torch.dtype, size: int) -> None:
    generator = torch.Generator().manual_seed(size)
    tensor = torch.randint(0, 2, (size,), generator=generator).to(dtype)
    (whole,) = digests_of([tensor])
    assert digests_of([tensor.clone()]) == [whole]
    for position in {0, size // 3, size // 2, size - 1}:
        other = tensor.clone()
        other[position] = ~other[position] if dtype is torch.bool else other[position] + 1
        assert digests_of([other]) != [whole]
    if size > 9:
        assert digests_of([tensor.roll(1)]) != [whole]
    (strided,) = digests_of([torch.stack([tensor, tensor], 1)[:, 0]])
    assert strided == whole


def test_digests_of_tensors_without_elements_or_memory_are_numbers() -> None:
    odd = [torch.empty(0), torch.ones(3).to_sparse(), torch.empty(2, device="meta"), torch.ones(5)[1:]]
    assert len(digests_of(odd)) == 4
    assert digests_of(odd)[:3] == [0, 0, 0]


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


def random_loss(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    # Nothing but a source that no seed reaches makes it another function at every call.
    scale = random.SystemRandom().random()
    return functional.cross_entropy(model(batch[0]), batch[1]) * (1 + scale)


@pytest.mark.parametrize("hvp", ["auto", *STRATEGIES])
@pytest.mark.parametrize("sizes", [(6,), (6, 4)])
def test_a_random_loss_is_refused_also_where_its_graph_is_kept(hvp: str, sizes: tuple[int, ...]) -> None:
    problem = Problem(stateful(), random_loss, vectors(*sizes))
    operator = HessianOperator(problem, hvp=hvp)
    with pytest.raises(OperatorError, match="the loss is not deterministic: batch 0 gave"):
        operator.matvec(torch.ones(problem.size, dtype=torch.float64))


class Padded(nn.Module):
    """A transformer encoder with masks of padding, which in PyTorch has a fast path without gradients."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 8, dropout=0.1, batch_first=True)
        self.encoder, self.head = nn.TransformerEncoder(layer, 2), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mask = torch.arange(5)[None] >= torch.tensor([5, 3, 2, 4])[:, None]
        return self.head(self.encoder(x, src_key_padding_mask=mask).mean(1))


def test_the_block_of_a_selection_is_that_of_the_whole_hessian() -> None:
    torch.manual_seed(0)
    model, batch = Padded().double(), (torch.randn(4, 5, 8).double(), torch.randint(3, (4,)))

    def loss(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        return functional.cross_entropy(model(batch[0]), batch[1])

    before = torch.backends.mha.get_fastpath_enabled()
    whole, head = Problem(model, loss, batch), Problem(model, loss, batch, parameters=r"head\..*")
    assert head.loss_value == pytest.approx(whole.loss_value, rel=64 * 2.0**-52)
    columns = slice(whole.size - head.size, None)
    panel = torch.zeros(head.size, whole.size, dtype=torch.float64)
    panel[:, columns] = torch.eye(head.size)
    wanted = HessianOperator(whole).matmat(panel)[:, columns]
    found = HessianOperator(head).matmat(torch.eye(head.size, dtype=torch.float64))
    assert torch.linalg.vector_norm(found - wanted) <= 64 * 2.0**-52 * torch.linalg.vector_norm(wanted)
    assert torch.backends.mha.get_fastpath_enabled() == before


def test_a_loss_that_depends_on_the_selection_is_refused() -> None:
    class Shortcut(nn.Sequential):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            hidden = self[0](x)
            return self[1](hidden.tanh() if self[0].weight.requires_grad else hidden)

    model, data = Shortcut(nn.Linear(8, 5), nn.Linear(5, 3)), vectors(4)
    before = snapshot(model)
    Problem(model, squared, data).prepare()
    with pytest.raises(
        OperatorError, match=r"depends on which parameters are selected: batch 0 gives .*analyze_groups"
    ):
        Problem(model, squared, data, parameters=r"1\..*").prepare()
    assert_same(before, snapshot(model))


def test_threads_that_analyse_one_model_get_its_numbers_each() -> None:
    model, data = stateful(), vectors(6, 4)

    def problem(names: str) -> Problem:
        return Problem(model, noisy_loss, data, parameters=names, mode="train")

    wanted = {names: HessianOperator(problem(names)).matmat(torch.eye(problem(names).size).double()) for names in NAMES}
    before, found = snapshot(model), []

    def run(names: str) -> None:
        for _ in range(5):
            operator = HessianOperator(problem(names))
            product = operator.matmat(torch.eye(operator.size).double())
            found.append(torch.equal(product, wanted[names]))

    threads = [threading.Thread(target=run, args=(names,)) for names in NAMES]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [True] * 5 * len(NAMES)
    assert_same(before, snapshot(model))


FORK = """
import os, threading, torch
from torch import nn
from hesd_fast import losses
from hesd_fast.problem.problem import Problem

torch.set_num_threads(1)
problem = Problem(nn.Linear(4, 3), losses.supervised(nn.CrossEntropyLoss()), (torch.randn(5, 4), torch.arange(5) % 3))
held, done = threading.Event(), threading.Event()


def hold():
    with problem.session():
        held.set()
        done.wait()


thread = threading.Thread(target=hold)
thread.start()
held.wait()
child = os.fork()
if child == 0:
    Problem(nn.Linear(4, 3), problem.loss, problem.data[0]).prepare()
    os._exit(7)
status = os.waitpid(child, 0)[1]
done.set()
thread.join()
print(os.waitstatus_to_exitcode(status))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_a_child_process_does_not_wait_for_a_thread_that_it_has_not() -> None:
    done = subprocess.run([sys.executable, "-c", FORK], capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout == "7\n", done.stderr


def test_moved_weights_come_back_after_an_interrupt_while_they_are_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    model, data = stateful(), vectors(6, 4)
    operator = HessianOperator(Problem(model, noisy_loss, data), hvp="finite_differences")
    vector = torch.ones(operator.size, dtype=torch.float64)
    operator.matvec(vector)
    before = snapshot(model)
    put_back, interrupts = ModelState._put_back_moved, [True]

    def interrupted(self: ModelState) -> None:
        if self._moved and interrupts:
            interrupts.clear()
            parameter, original = self._moved[0]
            parameter.data.copy_(original)
            raise KeyboardInterrupt
        put_back(self)

    monkeypatch.setattr(ModelState, "_put_back_moved", interrupted)
    with pytest.raises(KeyboardInterrupt):
        operator.matvec(vector)
    assert not interrupts
    assert_same(before, snapshot(model))


def column_negated(matrix: torch.Tensor) -> torch.Tensor:
    other = matrix.clone()
    other[:, 3] = -other[:, 3]
    return other


def corners_swapped(matrix: torch.Tensor) -> torch.Tensor:
    other = matrix.clone()
    other[0, 1], other[1, 0] = matrix[1, 0], matrix[0, 1]
    return other


CHANGES = [
    torch.neg,
    lambda matrix: matrix * 2,
    lambda matrix: matrix / 2,
    lambda matrix: matrix * 16,
    lambda matrix: matrix.T.contiguous(),
    lambda matrix: matrix.flip(0),
    lambda matrix: matrix.flip(1),
    lambda matrix: matrix.roll(8, 1),
    column_negated,
    corners_swapped,
]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [8, 64, 1024])
def test_a_digest_changes_with_changes_that_have_a_pattern(dtype: torch.dtype, size: int) -> None:
    matrix = torch.randn(size, size, generator=torch.Generator().manual_seed(0)).to(dtype)
    digests = digests_of([matrix, *(change(matrix) for change in CHANGES)])
    different = len(CHANGES) + 1 - (size == 8)  # of 8 columns, rolling by 8 is none
    assert len(set(digests)) == different
    assert digests[0] == digests_of([torch.ones(3), matrix.clone()])[1]  # whatever stands beside it
