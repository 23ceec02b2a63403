"""The user's model is borrowed: everything a forward pass can change is put back, bit for bit."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from hesd_fast.engine.memory import available_memory
from hesd_fast.errors import OperatorError
from hesd_fast.problem.random_streams import RandomStreams
from hesd_fast.problem.tensor_digests import digests_of, first_written, has_plain_memory, versions_of
from hesd_fast.problem.torch_settings import full_float32, process_settings, without_autocast, without_cudnn

P = ParamSpec("P")
T = TypeVar("T")

_ABSENT = object()

SESSIONS = threading.RLock()
"""Held while a model is borrowed: random streams and precision settings are those of the whole process."""

if hasattr(os, "register_at_fork"):  # the thread that holds it is not in the child, which would wait for ever
    os.register_at_fork(after_in_child=SESSIONS._at_fork_reinit)  # type: ignore[attr-defined]


def alone(function: Callable[P, T]) -> Callable[P, T]:
    """Let a function wait until no other thread has a model borrowed, so that it sees models as they are."""

    @wraps(function)
    def wait(*args: P.args, **kwargs: P.kwargs) -> T:
        with SESSIONS:
            return function(*args, **kwargs)

    return wait


_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)

_GRADIENT_HOOKS = ("_backward_hooks", "_post_accumulate_grad_hooks")

COPY_SHARE = 0.125
"""Part of the available memory that copies of weights may take while it is not known yet that the loss leaves them."""


class ModelState:
    """What a model looked like when it was borrowed.

    Buffers, and tensors that are plain attributes of a module, are set aside: each forward pass gets fresh copies of
    the buffers, so the originals are never written to, and every pass computes the same function. Plain attributes are
    not copied, since they may share memory on purpose; a write into one is noticed. So is a write into a weight, also
    one that autograd does not see (through ``.data``), by a digest of the values, and another module or parameter in
    the place of one. Hooks that were registered meanwhile are taken off.

    Parameters
    ----------
    model : nn.Module
        What is borrowed.
    copies : bool
        Whether to copy the values, so that they can be put back should the loss write to them; not done where they
        would take more than :data:`COPY_SHARE` of the available memory.

    Attributes
    ----------
    versions : list of (str, tensor, int)
        Name, tensor and version of every parameter and original buffer.
    digests : list of (str, int)
        Name and digest of the values of every parameter, original buffer and plain attribute that is a tensor.
    """

    def __init__(self, model: nn.Module, copies: bool = False) -> None:
        self._modules = list(model.modules())
        self._training = [module.training for module in self._modules]
        self._buffers = [dict(module._buffers) for module in self._modules]
        self._non_persistent = [set(module._non_persistent_buffers_set) for module in self._modules]
        self._attributes = [dict(vars(module)) for module in self._modules]
        self._members = [(dict(module._modules), dict(module._parameters)) for module in self._modules]
        self._names = {module: name for name, module in model.named_modules()}
        self._parameters = dict(model.named_parameters())
        self._hooks = [{name: dict(getattr(module, name)) for name in _HOOKS} for module in self._modules]
        self._gradient_hooks = [
            {name: dict(getattr(parameter, name) or {}) for name in _GRADIENT_HOOKS}
            for parameter in self._parameters.values()
        ]
        self._requires_grad = [parameter.requires_grad for parameter in self._parameters.values()]
        self._gradients = [parameter.grad for parameter in self._parameters.values()]
        self.versions = versions_of([*model.named_parameters(), *model.named_buffers()])
        self._attribute_versions = versions_of(_tensor_attributes(model))
        # What .data is now: forward may give a parameter other memory, as model.double() does.
        self._memory = [tensor.detach() for _, tensor, _ in self._watched]
        names = [name for name, _, _ in self._watched]
        self.digests = list(zip(names, digests_of(self._memory), strict=True))
        self._copies = _copies_that_fit(self._memory) if copies else None
        self._is_known = True
        self._moved: list[tuple[nn.Parameter, Tensor]] = []
        self._written: str | None = None
        self._replaced: str | None = None
        self._is_lost = False

    @property
    def _watched(self) -> list[tuple[str, Tensor, int]]:
        return [*self.versions, *self._attribute_versions]

    def set_training(self, training: bool) -> None:
        """Set the training flag of every module, without the side effects that an overridden ``train`` may have."""
        for module in self._modules:
            module.training = training

    def set_selected(self, selected: Sequence[nn.Parameter]) -> None:
        """Let the selected parameters require gradients and no others, and hide every ``.grad``."""
        wanted = {id(parameter) for parameter in selected}
        for parameter in self._parameters.values():
            parameter.requires_grad_(id(parameter) in wanted)
            parameter.grad = None

    @contextmanager
    def as_the_user_has_it(self) -> Iterator[bool]:
        """Let the parameters require gradients that did when the model was borrowed, beside the selected ones.

        Gives whether these are more than the selected ones.
        """
        before = [parameter.requires_grad for parameter in self._parameters.values()]
        wanted = [one or other for one, other in zip(before, self._requires_grad, strict=True)]
        try:
            for parameter, requires_grad in zip(self._parameters.values(), wanted, strict=True):
                parameter.requires_grad_(requires_grad)
            yield wanted != before
        finally:
            for parameter, requires_grad in zip(self._parameters.values(), before, strict=True):
                parameter.requires_grad_(requires_grad)

    def begin_evaluation(self) -> None:
        """Give the model fresh copies of its buffers, and look at the weights again afterwards; cost: these copies."""
        self._is_known = False
        self.refresh_buffers()

    def refresh_buffers(self) -> None:
        """Give the model fresh copies of its buffers; cost: one copy of all of them."""
        copies: dict[int, Tensor] = {}  # a buffer that two modules share stays shared
        for buffers in self._buffers:
            for buffer in buffers.values():
                if buffer is not None and id(buffer) not in copies:
                    copies[id(buffer)] = buffer.detach().clone()
        self._put_back_tensors(copies)

    def check_unwritten(self) -> None:
        """Raise an OperatorError if a parameter, an original buffer or a tensor attribute was written to or replaced.

        Also if a module was. Values are put back first where there are copies of them. Cost: one reading of the
        weights, if the model was evaluated since the last one.
        """
        self.check_members()
        self._put_back_values()
        if self._written is None:
            return
        outcome = "the model is no longer as it was; reload it" if self._is_lost else "its values have been put back"
        raise OperatorError(
            f"{self._written!r} was written to in place while the loss was computed, or was given other memory, so the "
            f"loss is not one fixed function; {outcome}, and make forward and loss leave the weights alone; state "
            "that forward has to write belongs into a buffer (register_buffer)"
        )

    def check_members(self) -> None:
        """Raise an OperatorError if a module or parameter was added, replaced or taken out; put back are those before.

        Cost: a look at each module.
        """
        self._put_back_members()
        if self._replaced is None:
            return
        raise OperatorError(
            f"{self._replaced!r} of the model was added, replaced or taken out while the loss was computed, so that "
            "is not one fixed function of its parameters; the model is as it was before: build all modules and "
            "parameters before the analysis (a forward pass that builds some must have run once), and let forward and "
            "loss leave them"
        )

    def _put_back_members(self) -> None:
        """Put back modules and parameters under their names, and note the first that was not there."""
        for module, (modules, parameters) in zip(self._modules, self._members, strict=True):
            pairs: list[tuple[dict[str, Any], Any]] = [(modules, module._modules), (parameters, module._parameters)]
            for before, now in pairs:
                changed = next((name for name in (before | now) if not _same_member(before, now, name)), None)
                if changed is None:
                    continue
                self._replaced = self._replaced or f"{self._names[module]}.{changed}".lstrip(".")
                now.clear()
                now.update(before)

    def _put_back_hooks(self) -> None:
        for module, hooks in zip(self._modules, self._hooks, strict=True):
            for name, before in hooks.items():
                present = getattr(module, name)
                if present.keys() != before.keys():
                    present.clear()
                    present.update(before)
        for parameter, gradient_hooks in zip(self._parameters.values(), self._gradient_hooks, strict=True):
            for name, before in gradient_hooks.items():
                if (getattr(parameter, name) or {}).keys() != before.keys():
                    setattr(parameter, name, OrderedDict(before) or None)

    def _put_back_memory(self) -> None:
        """Put back the memory of what was given other memory, and note the first of its names."""
        for (name, tensor, _), memory in zip(self._watched, self._memory, strict=True):
            if not _same_memory(tensor, memory):
                self._written = self._written or name
                tensor.data = memory

    def _put_back_values(self) -> None:
        """Put back memory and values of what was written to, and note the first of its names."""
        if self._is_known:
            return
        self._written = self._written or first_written(self._watched)
        self._put_back_memory()
        for position, ((name, before), now) in enumerate(zip(self.digests, digests_of(self._memory), strict=True)):
            if now == before:
                continue
            self._written = self._written or name
            if self._copies is None:
                self._is_lost = True
            else:
                self._memory[position].data.copy_(self._copies[position])
        self._is_known = True

    @contextmanager
    def moved(self, parameters: Sequence[nn.Parameter]) -> Iterator[list[Tensor]]:
        """Let the caller write to parameters meanwhile; gives copies of them, from which they are put back."""
        self._moved = [(parameter, parameter.detach().clone()) for parameter in parameters]
        try:
            yield [original for _, original in self._moved]
        finally:
            self._put_back_moved()

    def _put_back_moved(self) -> None:
        for parameter, original in self._moved:
            parameter.data.copy_(original)
        self._moved = []  # only now: an interrupt in between leaves them to the end of the session

    def restore(self) -> None:
        """Put everything back; cost: one reading of the weights, if the model was evaluated since the last one."""
        self._put_back_members()
        self._put_back_hooks()
        self._put_back_tensors({})
        for module, training in zip(self._modules, self._training, strict=True):
            module.training = training
        self._put_back_moved()
        self._put_back_memory()
        for parameter, requires_grad, gradient in zip(
            self._parameters.values(), self._requires_grad, self._gradients, strict=True
        ):
            parameter.requires_grad_(requires_grad)
            parameter.grad = gradient
        self._put_back_values()  # last, as it takes memory of its own

    def _put_back_tensors(self, copies: dict[int, Tensor]) -> None:
        for module, buffers, non_persistent, attributes in zip(
            self._modules, self._buffers, self._non_persistent, self._attributes, strict=True
        ):
            module._buffers.clear()
            module._buffers.update({name: copies.get(id(buffer), buffer) for name, buffer in buffers.items()})
            module._non_persistent_buffers_set.clear()
            module._non_persistent_buffers_set.update(non_persistent)
            present = vars(module)
            for name in present.keys() | attributes.keys():
                before, now = attributes.get(name, _ABSENT), present.get(name, _ABSENT)
                if now is before or not (isinstance(before, Tensor) or isinstance(now, Tensor)):
                    continue
                if before is _ABSENT:
                    del present[name]
                else:
                    present[name] = before


def _same_member(before: Mapping[str, Any], now: Mapping[str, Any], name: str) -> bool:
    return before.get(name, _ABSENT) is now.get(name, _ABSENT)


def _same_memory(tensor: Tensor, memory: Tensor) -> bool:
    """Whether a tensor still has the memory that a detached one of before shows."""
    if tensor.dtype != memory.dtype or tensor.shape != memory.shape or tensor.device != memory.device:
        return False
    if not has_plain_memory(memory):
        return True
    return tensor.data_ptr() == memory.data_ptr() and tensor.stride() == memory.stride()


def _copies_that_fit(tensors: Sequence[Tensor]) -> list[Tensor] | None:
    """Return copies of tensors, or None where they would take too much of the memory."""
    plain = [tensor for tensor in tensors if has_plain_memory(tensor)]
    needed: dict[torch.device, int] = {}
    for tensor in plain:
        needed[tensor.device] = needed.get(tensor.device, 0) + tensor.nbytes
    for device, size in needed.items():
        available = available_memory(device)
        if available is not None and size > COPY_SHARE * available:
            return None
    return [tensor.clone() if has_plain_memory(tensor) else tensor for tensor in tensors]


def _tensor_attributes(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for prefix, module in model.named_modules():
        for name, value in vars(module).items():
            if isinstance(value, Tensor):
                yield f"{prefix}.{name}".lstrip("."), value


@contextmanager
def borrowed(
    model: nn.Module, selected: Sequence[nn.Parameter], mode: str, streams: RandomStreams, copies: bool = False
) -> Iterator[ModelState]:
    """Borrow a model: set its mode and differentiable parameters, and give it back exactly as it was.

    Meanwhile float32 operations are in float32, attention runs in the MATH backend, the only one with a second
    derivative, recurrent layers on GPUs without cuDNN, whose ones have none, nor a first one in eval mode, and
    transformer layers without their fast path, which is another function where no parameter requires gradients. An
    autocast around the session is off; one in model or loss is theirs. The default dtype and deterministic algorithms
    are what they were at the end.
    Attributes of modules that are not tensors (lists, dictionaries, numbers) are not looked at: what a forward pass
    puts there stays.

    Raises
    ------
    OperatorError
        At the end, if the forward pass wrote to a weight, to a tensor that is a plain attribute of a module, or to a
        buffer behind the model's back.
    """
    state = ModelState(model, copies)
    random_state = streams.state()
    try:
        if mode != "as_is":
            state.set_training(mode == "train")
        state.set_selected(selected)
        state.refresh_buffers()
        recurrent = any(isinstance(module, nn.RNNBase) for module in model.modules())
        with (
            process_settings(),
            without_autocast(),
            sdpa_kernel(SDPBackend.MATH),
            full_float32(),
            without_cudnn(recurrent),
            _without_fast_path(),
        ):
            yield state
    finally:
        try:
            state.restore()
        finally:
            streams.set_state(random_state)
    state.check_unwritten()


@contextmanager
def _without_fast_path() -> Iterator[None]:
    before = torch.backends.mha.get_fastpath_enabled()
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
