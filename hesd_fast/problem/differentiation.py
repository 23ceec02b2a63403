"""Derivatives as dense tensors, and what PyTorch says where it has none."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from hesd_fast.errors import OperatorError, first_line, raised_outside_of_libraries


def dense(tensor: Tensor) -> Tensor:
    """Return a strided tensor; derivatives by the weights of embeddings with sparse=True are sparse."""
    return tensor if tensor.layout is torch.strided else tensor.to_dense()


def filled(derivatives: Sequence[Tensor | None], sources: Sequence[Tensor]) -> list[Tensor]:
    """Return a dense derivative by each of some tensors, zeros where there is none."""
    pairs = zip(derivatives, sources, strict=True)
    return [torch.zeros_like(source) if found is None else dense(found) for found, source in pairs]


@contextmanager
def naming_refusals(message: Callable[[str], str]) -> Iterator[None]:
    """Turn what PyTorch refuses to differentiate into an OperatorError; other errors pass.

    Those are memory that does not suffice, and what the user's own code raises.

    Parameters
    ----------
    message : callable
        Of what PyTorch says.
    """
    try:
        yield
    except torch.cuda.OutOfMemoryError:
        raise
    except RuntimeError as error:
        if raised_outside_of_libraries(error):
            raise
        raise OperatorError(message(first_line(error))) from error
