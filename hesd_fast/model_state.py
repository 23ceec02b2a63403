"""The user's model is borrowed: everything a forward pass can change is put back, bit for bit."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from hesd_fast import cuda
from hesd_fast.errors import OperatorError
from hesd_fast.precision import full_float32, without_cudnn

StreamState = tuple[list[tuple[torch.Generator, Tensor]], dict[str, Any], tuple[Any, ...]]

_ABSENT = object()


class RandomStreams:
    """The random number streams a forward pass or a data loader may draw from.

    These are the global streams of torch (CPU, and every CUDA device once CUDA is in use), NumPy and Python.

    Parameters
    ----------
    generators
        Further torch generators, for example those of a DataLoader.
    """

    def __init__(self, generators: Sequence[torch.Generator] = ()) -> None:
        self._generators = list(generators)

    def _torch_generators(self) -> list[torch.Generator]:
        # torch.manual_seed would also reseed devices that are not in use yet, which could not be undone.
        return [torch.default_generator, *cuda.generators(), *self._generators]

    def state(self) -> StreamState:
        """Return the state of every stream."""
        torch_states = [(generator, generator.get_state()) for generator in self._torch_generators()]
        # The legacy stream of NumPy is the one that is global, so the one to save.
        numpy_state = np.random.get_state(legacy=False)  # noqa: NPY002
        return torch_states, numpy_state, random.getstate()

    def set_state(self, state: StreamState) -> None:
        """Put every stream back to a state got from ``state()``."""
        torch_states, numpy_state, python_state = state
        for generator, value in torch_states:
            generator.set_state(value)
        np.random.set_state(numpy_state)  # noqa: NPY002
        random.setstate(python_state)

    def seed(self, seed: int) -> None:
        """Start every stream from ``seed``."""
        for generator in self._torch_generators():
            generator.manual_seed(seed)
        np.random.seed(seed)  # noqa: NPY002
        random.seed(seed)


class ModelState:
    """What a model looked like when it was borrowed.

    Buffers, and tensors that are plain attributes of a module, are set aside: each forward pass gets fresh copies of
    the buffers, so the originals are never written to, and every pass computes the same function. Plain attributes are
    not copied, since they may share memory on purpose; a write into one is noticed.

    Attributes
    ----------
    versions : list of (str, tensor, int)
        Name, tensor and version of every parameter and original buffer.
    """

    def __init__(self, model: nn.Module) -> None:
        self._modules = list(model.modules())
        self._training = [module.training for module in self._modules]
        self._buffers = [dict(module._buffers) for module in self._modules]
        self._non_persistent = [set(module._non_persistent_buffers_set) for module in self._modules]
        self._attributes = [dict(vars(module)) for module in self._modules]
        self._parameters = dict(model.named_parameters())
        self._requires_grad = [parameter.requires_grad for parameter in self._parameters.values()]
        self._gradients = [parameter.grad for parameter in self._parameters.values()]
        self.versions = _versions_of([*model.named_parameters(), *model.named_buffers()])
        self._attribute_versions = _versions_of(_tensor_attributes(model))

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

    def refresh_buffers(self) -> None:
        """Give the model fresh copies of its buffers; cost: one copy of all of them."""
        copies: dict[int, Tensor] = {}  # a buffer that two modules share stays shared
        for buffers in self._buffers:
            for buffer in buffers.values():
                if buffer is not None and id(buffer) not in copies:
                    copies[id(buffer)] = buffer.detach().clone()
        self._put_back_tensors(copies)

    def check_unwritten(self) -> None:
        """Raise an OperatorError if a parameter, an original buffer or a tensor attribute was written to in place."""
        if (written := first_written([*self.versions, *self._attribute_versions])) is not None:
            raise OperatorError(
                f"{written!r} was written to in place while the loss was computed, so the loss is not one fixed "
                "function and the model is no longer as it was; reload it, and make forward and loss leave the weights "
                "alone; state that forward has to write belongs into a buffer (register_buffer)"
            )

    def restore(self) -> None:
        """Put everything back; cost: no copies."""
        self._put_back_tensors({})
        for module, training in zip(self._modules, self._training, strict=True):
            module.training = training
        for parameter, requires_grad, gradient in zip(
            self._parameters.values(), self._requires_grad, self._gradients, strict=True
        ):
            parameter.requires_grad_(requires_grad)
            parameter.grad = gradient

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


def version_of(tensor: Tensor) -> int:
    """Return how often a tensor was written to in place; inference tensors do not count, so 0 for them."""
    return 0 if tensor.is_inference() else tensor._version


def first_written(versions: Iterable[tuple[str, Tensor, int]]) -> str | None:
    """Return the name of the first tensor that was written to since its version was noted, or None."""
    return next((name for name, tensor, version in versions if version_of(tensor) != version), None)


def _versions_of(tensors: Iterable[tuple[str, Tensor]]) -> list[tuple[str, Tensor, int]]:
    return [(name, tensor, version_of(tensor)) for name, tensor in tensors]


def _tensor_attributes(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for prefix, module in model.named_modules():
        for name, value in vars(module).items():
            if isinstance(value, Tensor):
                yield f"{prefix}.{name}".lstrip("."), value


@contextmanager
def borrowed(
    model: nn.Module, selected: Sequence[nn.Parameter], mode: str, streams: RandomStreams
) -> Iterator[ModelState]:
    """Borrow a model: set its mode and differentiable parameters, and give it back exactly as it was.

    Meanwhile float32 operations are in float32, attention runs in the MATH backend, the only one with a second
    derivative, and recurrent layers on GPUs without cuDNN, whose ones have none, nor a first one in eval mode.
    Attributes of modules that are not tensors (lists, dictionaries, numbers) are not looked at: what a forward pass
    puts there stays.

    Raises
    ------
    OperatorError
        At the end, if the forward pass wrote to a weight, to a tensor that is a plain attribute of a module, or to a
        buffer behind the model's back.
    """
    state = ModelState(model)
    random_state = streams.state()
    try:
        if mode != "as_is":
            state.set_training(mode == "train")
        state.set_selected(selected)
        state.refresh_buffers()
        recurrent = any(isinstance(module, nn.RNNBase) for module in model.modules())
        with sdpa_kernel(SDPBackend.MATH), full_float32(), without_cudnn(recurrent):
            yield state
    finally:
        state.restore()
        streams.set_state(random_state)
    state.check_unwritten()
