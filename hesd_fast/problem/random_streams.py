"""The random number streams that a forward pass or a data loader may draw from."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hesd_fast.engine import cuda

StreamState = tuple[list[tuple[torch.Generator, Tensor]], dict[str, Any], tuple[Any, ...]]


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
        return [torch.default_generator, *cuda.runtime.generators(), *self._generators]

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

    def have_moved(self, seed: int) -> bool:
        """Whether a stream of PyTorch is no longer where ``seed`` has started it."""
        return any(
            not torch.equal(one.get_state(), torch.Generator(one.device).manual_seed(seed).get_state())
            for one in [torch.default_generator, *cuda.runtime.generators()]
        )

    def seed(self, seed: int) -> None:
        """Start every stream from ``seed``."""
        for generator in self._torch_generators():
            generator.manual_seed(seed)
        np.random.seed(seed)  # noqa: NPY002
        random.seed(seed)
