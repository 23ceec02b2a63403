"""Mistakes, each made in a problem that is otherwise right, with what the error has to say about it."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from odd_problems import OddProblem, squared_norm
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

Change = Callable[[OddProblem], dict[str, Any]]


def weighted(model: nn.Module, batch: Any) -> Tensor:
    """A loss of any model and any batch of numbers."""
    first = next(leaf for leaf in tree_leaves(batch) if isinstance(leaf, Tensor))
    return squared_norm(model) * (1.0 + first.double().mean())


def _of_value(change: Callable[[Tensor], Any]) -> Change:
    """Let the loss return another value, beside its count if it has one."""

    def changed(problem: OddProblem) -> dict[str, Any]:
        def loss(model: nn.Module, batch: Any) -> Any:
            found = problem.loss(model, batch)
            return (change(found[0]), found[1]) if isinstance(found, tuple) else change(found)

        return {"loss": loss}

    return changed


def _of_result(change: Callable[[Tensor], Any]) -> Change:
    """Let the loss return something else, without a count of ``count=``."""

    def changed(problem: OddProblem) -> dict[str, Any]:
        def loss(model: nn.Module, batch: Any) -> Any:
            found = problem.loss(model, batch)
            return change(found[0] if isinstance(found, tuple) else found)

        return {"loss": loss, "count": None}

    return changed


def _doing(action: Callable[[nn.Module], None]) -> Change:
    """Let the loss do something to the model beside."""

    def changed(problem: OddProblem) -> dict[str, Any]:
        def loss(model: nn.Module, batch: Any) -> Any:
            found = problem.loss(model, batch)
            action(model)
            return found

        return {"loss": loss}

    return changed


def _with_model(action: Callable[[nn.Module], None]) -> Change:
    """Give a model that something was done to before."""

    def changed(problem: OddProblem) -> dict[str, Any]:
        action(problem.model)
        return {}

    return changed


def _given(**arguments: Any) -> Change:
    return lambda problem: dict(arguments)


def _data(make: Callable[[], Any]) -> Change:
    return lambda problem: {"data": make(), "loss": weighted, "count": None}


def _first(model: nn.Module) -> nn.Parameter:
    return next(p for p in model.parameters() if p.numel())


def _scale(model: nn.Module) -> None:
    _first(model).data.mul_(1.5)


def _step(model: nn.Module) -> None:
    with torch.no_grad():
        _first(model).add_(1.0)


def _average(model: nn.Module) -> None:
    parameter = _first(model)
    parameter.data = parameter.data * 0.5


def _place(model: nn.Module) -> tuple[nn.Module, str]:
    return next((m, name) for m in model.modules() for name, p in m._parameters.items() if p is _first(model))


def _replace(model: nn.Module) -> None:
    module, name = _place(model)
    setattr(module, name, nn.Parameter(_first(model).detach().clone()))


def _take_out(model: nn.Module) -> None:
    module, name = _place(model)
    module._parameters[name] = None


def _add(model: nn.Module) -> None:
    model.add_module("more", nn.Identity())


def _freeze(model: nn.Module) -> None:
    model.requires_grad_(False)


def _hook(model: nn.Module) -> None:
    parameter = _first(model)
    if parameter.requires_grad:
        parameter.register_hook(lambda gradient: gradient)


def _backward_hook(model: nn.Module) -> None:
    model.register_full_backward_hook(lambda *arguments: None)


def _spoil(model: nn.Module) -> None:
    _first(model).data.view(-1)[-1] = torch.nan


def _expand(model: nn.Module) -> None:
    model.register_parameter("expanded", nn.Parameter(torch.zeros(1)))
    model.expanded.data = torch.zeros(1).expand(3)


def _share(model: nn.Module) -> None:
    model.register_parameter("shared", nn.Parameter(_first(model).detach()))


class Counting:
    """Another number at every call."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, value: Tensor) -> Tensor:
        self.calls += 1
        return value + 0.01 * self.calls


class Passes:
    """Data that is given pass by pass; the last is that of all further ones."""

    def __init__(self, *passes: Any) -> None:
        self.passes, self.done = passes, 0

    def __iter__(self) -> Iterator[Any]:
        found = self.passes[min(self.done, len(self.passes) - 1)]
        self.done += 1
        if isinstance(found, Exception):
            raise found
        return iter(found)


def _ones(*shape: int) -> Tensor:
    return torch.ones(*shape, dtype=torch.float64)


def _in_inference_mode() -> Tensor:
    with torch.inference_mode():
        return _ones(2)


def _used_up() -> Iterator[Any]:
    yield (_ones(2),)


SECRET = random.SystemRandom()

FAULTS: dict[str, tuple[Change, str]] = {
    "loss: none": (_of_result(lambda value: None), r"is of type NoneType; return a scalar"),
    "loss: float": (_of_result(lambda value: 1.5), r"is of type float; return a scalar"),
    "loss: dict": (_of_result(lambda value: {"loss": value}), r"is of type dict; return a scalar"),
    "loss: three": (_of_result(lambda value: (value, 1, 2)), r"is of type tuple; return a scalar"),
    "loss: array": (_of_result(lambda value: value.detach().numpy()), r"is of type ndarray; return a scalar"),
    "loss: vector": (_of_value(lambda value: value[None]), r"has shape \(1,\); return a scalar"),
    "loss: integer": (_of_value(lambda value: value.long()), r"has dtype torch\.int64; return a real"),
    "loss: complex": (_of_value(lambda value: value + 1j), r"has dtype torch\.complex\d+; return a real"),
    "loss: nan": (_of_value(lambda value: value * torch.nan), r"is nan; a finite loss is wanted, check"),
    "loss: inf": (_of_value(lambda value: value + torch.inf), r"is inf; a finite loss is wanted, check"),
    "loss: detached": (_of_value(Tensor.detach), r"does not depend on the selected parameters .*; select others"),
    "loss: leaf": (_of_value(lambda value: torch.ones((), requires_grad=True)), r"does not depend on .*; select"),
    "loss: random": (
        _of_value(lambda value: value + SECRET.random()),
        r"not deterministic: batch .*; likely .* remove",
    ),
    "loss: counting": (
        lambda problem: _of_value(Counting())(problem),
        r"not deterministic: batch .*; likely .* remove",
    ),
    "loss: count is text": (_of_result(lambda value: (value, "4")), r"count of batch 0 is of type str; return \(sum"),
    "loss: count is none": (_of_result(lambda value: (value, [4])), r"count of batch 0 is of type list; return \(sum"),
    "loss: count is true": (_of_result(lambda value: (value, True)), r"count of batch 0 is of type bool; return"),
    "loss: count is array": (
        _of_result(lambda value: (value, np.ones(2))),
        r"count of batch 0 is of type ndarray; ret",
    ),
    "loss: counts": (_of_result(lambda value: (value, _ones(2))), r"count of batch 0 has shape \(2,\); return"),
    "loss: negative count": (_of_result(lambda value: (value, -1)), r"count of batch 0 is -1\.0; return a finite"),
    "loss: nan count": (_of_result(lambda value: (value, torch.tensor(torch.nan))), r"batch 0 is nan; return a finite"),
    "loss: no terms": (
        _of_result(lambda value: (value, 0)),
        r"hold 0 loss terms; at least one is wanted|of 0 terms; return the number",
    ),
    "loss: huge count": (_of_result(lambda value: (value, 10**400)), r"batch 0 is inf; return a finite count"),
    "loss: used up": (_of_value(lambda value: next(iter(()))), r"raised StopIteration at batch 0.*; give"),
    "loss: text": (_given(loss="mse"), r"loss of type str is not callable; give a function loss\(model, batch\)"),
    "loss: arguments": (_given(loss=lambda model: 0), r"loss has the arguments \(model\).*; give a function loss"),
    "loss: criterion": (
        _given(loss=nn.MSELoss()),
        r"loss is the criterion MSELoss.*; give hesd_fast\.losses\.supervised",
    ),
    "loss: missing": (_given(loss=None), r"got no loss; call analyze\(model, loss, data\)"),
    "writes: data": (_doing(_scale), r"was written to in place .*; its values have been put back, and make"),
    "writes: step": (
        _doing(_step),
        r"was written to in place .*; its values have been put back, and make|by an inplace operation.*; return a loss",
    ),
    "writes: memory": (_doing(_average), r"other memory.*; its values have been put back, and make"),
    "writes: parameter": (_doing(_replace), r"was added, replaced or taken out .*; the model is as it was.*: build"),
    "writes: nothing": (_doing(_take_out), r"was added, replaced or taken out .*; the model is as it was.*: build"),
    "writes: module": (_doing(_add), r"'more' of the model was added.*; the model is as it was.*: build"),
    "writes: requires_grad": (_doing(_freeze), r"turned requires_grad of '.*' off.*; let them leave it"),
    "writes: hook": (_doing(_hook), r"has gradient hooks .*; remove them"),
    "model: none": (_given(model=None), r"model is of type NoneType; give a torch\.nn\.Module"),
    "model: class": (_given(model=nn.Linear), r"model is of type type; give a torch\.nn\.Module"),
    "model: no parameters": (_given(model=nn.Tanh()), r"\(Tanh\) has no parameters; give one that has"),
    "model: nan": (_with_model(_spoil), r"holds NaN or Inf; give a model with finite weights"),
    "model: hook": (_with_model(_hook), r"has gradient hooks .*; remove them"),
    "model: backward hook": (_with_model(_backward_hook), r"module 'model' has backward hooks.*; remove them"),
    "model: expanded": (
        _with_model(_expand),
        r"'expanded', of shape \(3,\) .*share memory.*; give it memory of its own",
    ),
    "model: shared": (
        _with_model(_share),
        r"and 'shared' share memory.*; tie them|'shared' and .* share memory.*; tie them",
    ),
    "data: missing": (_given(data=None), r"got no data; call analyze\(model, loss, data\)"),
    "data: number": (_given(data=5), r"data of type int is neither .*; give a list of batches"),
    "data: text": (_given(data="train"), r"data of type str is neither .*; give a list of batches"),
    "data: array": (_given(data=np.ones((2, 2))), r"data of type ndarray is neither .*; give .*from_numpy"),
    "data: empty": (_given(data=[]), r"data is an empty list; give at least one batch"),
    "data: bare tensors": (
        _given(data=[torch.ones(2), torch.ones(2)]),
        r"list of 2 items with bare tensors.*; for one",
    ),
    "data: one-shot": (_data(_used_up), r"data is a one-shot iterator \(generator\).*; pass list\(data\)"),
    "data: no batch": (_data(lambda: Passes([])), r"the data yields no batch; give at least one"),
    "data: nan": (
        _data(lambda: (torch.full((2, 3), torch.nan),)),
        r"holds NaN or Inf in batch\[0\] .*; clean the data",
    ),
    "data: inf": (_data(lambda: {"x": torch.full((2,), torch.inf)}), r"holds NaN or Inf in batch\['x'\] .*; clean"),
    "data: meta": (
        _data(lambda: (torch.ones(2, device="meta"),)),
        r"batch\[0\] .* is on the meta device.*; give tensors",
    ),
    "data: inference": (_data(lambda: (_in_inference_mode(),)), r"batch\[0\] .* was made in inference mode; make it"),
    "data: changes": (
        _data(lambda: Passes([_ones(2)], [2 * _ones(2)])),
        r"data changed between two passes: batch 0.*; give",
    ),
    "data: ends": (
        _data(lambda: Passes([_ones(2)] * 2, [_ones(2)])),
        r"data changed .* has 1 batches.*had 2; .*; give",
    ),
    "data: goes on": (
        _data(lambda: Passes([_ones(2)], [_ones(2)] * 2)),
        r"data changed between two passes: batch 1.*; give",
    ),
    "data: raises": (_data(lambda: Passes([_ones(2)], OSError("gone"))), r"raised OSError at batch 0 .*: gone; give"),
    "data: ambiguous": (
        _data(lambda: [(_ones(2, 3), _ones(3)), (_ones(4, 3), _ones(3))]),
        r"cannot be told here: .*\. For a loss like this return \(sum, count\)",
    ),
    "data: samples": (
        _data(lambda: [[(_ones(2),)] * 2, [(_ones(2),)] * 3]),
        r"cannot be told here: .*\. For a loss like this return \(sum, count\)",
    ),
    "count: number": (_given(count=5), r"count is of type int; give a function count\(batch\)"),
    "count: arguments": (_given(count=lambda: 5), r"count has the arguments \(\).*; give a function count\(batch\)"),
    "count: text": (
        _given(count=lambda batch: "5", loss=weighted, data=torch.ones(2)),
        r"is of type str; return a number",
    ),
    "parameters: pattern": (_given(parameters="("), r"parameters='\(' is not a regular expression: |missing \)"),
    "parameters: no match": (
        _given(parameters="nothing"),
        r"parameters='nothing' matches no .*; the closest names are",
    ),
    "parameters: empty": (_given(parameters=""), r"parameters='' matches no .*; the closest names are"),
    "parameters: missing": (_given(parameters=["missing"]), r"'missing' does not exist; the closest names are"),
    "parameters: number": (_given(parameters=5), r"parameters is of type int; give None, a regular expression"),
    "parameters: numbers": (_given(parameters=[5]), r"an item of type int; give names"),
    "parameters: no names": (_given(parameters=[]), r"parameters=\[\] selects no parameter; the first names are"),
    "parameters: predicate": (
        _given(parameters=lambda name: True),
        r"predicate with the signature .*; give a function of",
    ),
    "parameters: none": (
        _given(parameters=lambda name, parameter: False),
        r"selects no parameter; the first names are",
    ),
    "mode": (_given(mode="training"), r"mode is 'training'; give one of 'eval', 'train', 'as_is'"),
    "operator": (_given(operator="hesse"), r"operator is 'hesse'; wanted one of 'hessian'"),
    "operator: list": (_given(operator=["hessian"]), r"operator is \['hessian'\]; wanted one of 'hessian'"),
    "operator and hvp": (
        _given(operator="gauss_newton", hvp="kept_graph"),
        r"operator='gauss_newton' .*; leave hvp out",
    ),
    "operator: loss": (
        _given(operator="gauss_newton", loss=weighted, data=torch.ones(2), count=None),
        r"GaussNewtonOperator needs a loss that tells .*; use hesd_fast\.losses\.supervised",
    ),
    "hvp": (_given(hvp="exact"), r"hvp is 'exact'; wanted 'auto' or one of 'double_backward'"),
    "hvp: list": (_given(hvp=["auto"]), r"hvp is \['auto'\]; wanted 'auto' or one of"),
    "block_size: 0": (_given(block_size=0), r"block_size is 0; wanted 1 to \d+, the number of parameters"),
    "block_size: too large": (_given(block_size=10**6), r"block_size is 1000000; wanted 1 to \d+, the number of"),
    "block_size: half": (_given(block_size=0.5), r"block_size is 0\.5; wanted an integer"),
    "block_size: true": (_given(block_size=True), r"block_size is True; wanted an integer"),
    "block_size: text": (_given(block_size="all"), r"block_size is 'all'; wanted an integer or 'auto'"),
    "max_steps: 0": (_given(max_steps=0), r"steps is 0; wanted at least 1"),
    "max_steps: float": (_given(max_steps=3.0), r"steps is 3\.0; wanted an integer"),
    "seed: negative": (_given(seed=-1), r"seed is -1; wanted an integer in \[0, 2\*\*64\)"),
    "seed: too large": (_given(seed=2**64), r"seed is 18446744073709551616; wanted an integer in"),
    "seed: text": (_given(seed="0"), r"seed is '0'; wanted an integer"),
    "protocol": (_given(protocol="pyhessian"), r"protocol is 'pyhessian'; wanted None or one of 'lla'"),
    "protocol and steps": (_given(protocol="lla", max_steps=5), r"protocol='lla' sets .*; leave them out"),
    "reorthogonalization": (_given(reorthogonalization="some"), r"reorthogonalization is 'some'; wanted one of"),
    "basis": (_given(basis="cloud"), r"basis is 'cloud', which is no directory; wanted one of"),
    "basis: number": (_given(basis=5), r"basis is 5; wanted one of"),
    "basis_dtype": (_given(basis_dtype="int8"), r"basis_dtype is 'int8'; wanted 'auto' or one of"),
    "basis_dtype: torch": (_given(basis_dtype=torch.int8), r"basis_dtype is torch\.int8; wanted 'auto' or one of"),
}
"""What is done to the arguments of analyze, and what the message has to say: the thing, and what to do."""
