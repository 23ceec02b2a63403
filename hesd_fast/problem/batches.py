"""Batches: how data is iterated again and again, and how a change between two passes is noticed."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from types import FunctionType, MethodType, SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils.data import DataLoader, Dataset, IterableDataset

from hesd_fast.errors import ProblemError
from hesd_fast.problem.tensor_digests import version_of

DEFAULT_BATCH_SIZE = 256


def as_batches(data: Any, batch_size: int | None = None) -> Iterable[Any]:
    """Turn what the user calls data into something that yields the same batches again and again.

    Parameters
    ----------
    data
        A re-iterable of batches; or one batch (a tensor, tuple, mapping or dataclass instance); or a dataset of
        samples, which a sequential DataLoader collates into batches. An ``IterableDataset`` is a dataset of samples
        too, as in PyTorch; one that yields whole batches belongs into ``DataLoader(dataset, batch_size=None)``.
    batch_size
        Samples per batch of a dataset, 256 by default. Other data has batches already, so giving it is an error.

    Raises
    ------
    ProblemError
        If the data can be read only once, is ambiguous, or is not data at all.
    """
    if _is_dataset(data):
        size = DEFAULT_BATCH_SIZE if batch_size is None else batch_size
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise ProblemError(f"batch_size is {size!r}; give an integer of at least 1")
        return DataLoader(data, batch_size=size, shuffle=False)
    if batch_size is not None:
        raise ProblemError(
            f"batch_size={batch_size!r} was given, but data of type {type(data).__name__} has its batches already; "
            "leave batch_size out, or give a torch Dataset of samples"
        )
    if _is_one_batch(data):
        return [data]
    if hasattr(data, "__next__"):
        raise ProblemError(
            f"data is a one-shot iterator ({type(data).__name__}), but the analysis reads it many times; "
            "pass list(data), or an object whose __iter__ starts afresh each time"
        )
    if isinstance(data, list):
        _check_list_of_batches(data)
        return data
    if isinstance(data, str | bytes | np.ndarray) or not hasattr(data, "__iter__"):
        raise ProblemError(
            f"data of type {type(data).__name__} is neither a batch nor an iterable of batches; "
            "give a list of batches, a DataLoader, a Dataset, or one batch (a tensor, tuple, mapping or dataclass); "
            "torch.from_numpy makes a tensor of an array"
        )
    batches: Iterable[Any] = data
    return batches


def _is_dataset(data: Any) -> bool:
    # Hugging Face datasets do not derive from torch's Dataset, but follow its protocol: __getitems__ exists only for
    # a DataLoader's sake. An object with a length and items but no __iter__ is a map-style dataset in PyTorch as well.
    if isinstance(data, Dataset | IterableDataset) or hasattr(data, "__getitems__"):
        return True
    return hasattr(data, "__getitem__") and hasattr(data, "__len__") and not hasattr(data, "__iter__")


def _is_one_batch(data: Any) -> bool:
    if isinstance(data, Tensor | tuple | Mapping):
        return True
    if callable(getattr(data, "to_dict", None)) and callable(getattr(data, "to", None)):
        return True  # a graph batch, which iterates over its attributes
    return dataclasses.is_dataclass(data) and not isinstance(data, type) and not hasattr(data, "__iter__")


def _check_list_of_batches(data: list[Any]) -> None:
    if not data:
        raise ProblemError("data is an empty list; give at least one batch")
    if any(isinstance(item, Tensor) for item in data):
        raise ProblemError(
            f"data is a list of {len(data)} items with bare tensors among them, which can mean one batch or several; "
            "for one batch pass tuple(data); for several wrap each, as in [(x,) for x in data], or use mappings"
        )


PlainValue = bool | int | float | complex | str | bytes | np.generic | None
"""What a batch may hold besides tensors and arrays; its value is what is compared."""


def items(value: Any) -> list[tuple[str, Any]] | None:
    """Return (suffix of the path, item) for all items of a mapping, tuple, list or dataclass; None for others."""
    if isinstance(value, Mapping):
        return [(f"[{key!r}]", item) for key, item in value.items()]
    if isinstance(value, tuple | list):
        return [(f"[{position}]", item) for position, item in enumerate(value)]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return [(f".{field.name}", getattr(value, field.name)) for field in dataclasses.fields(value)]
    return None


def attributes(value: Any) -> list[tuple[str, Any]] | None:
    """Return (suffix of the path, item) for what an object of a class of the user's holds; None for other objects.

    That is what its ``to_dict()`` returns, as graph batches have one, or else its public attributes: private ones are
    often caches, which a forward pass may fill.
    """
    if isinstance(value, Tensor | np.ndarray | PlainValue | type | nn.Module | Dataset | FunctionType | MethodType):
        return None
    if _is_of_a_library(value):
        return None
    found: Any = None
    if callable(to_dict := getattr(value, "to_dict", None)):
        with contextlib.suppress(Exception):  # it may want arguments, or be something else altogether
            found = to_dict()
    if not isinstance(found, Mapping):
        names = [name for kind in type(value).__mro__ for name in _as_names(vars(kind).get("__slots__", ()))]
        found = {name: getattr(value, name) for name in names if hasattr(value, name)} | getattr(value, "__dict__", {})
        found = {name: item for name, item in found.items() if not str(name).startswith("_")}
    return [(f".{name}", item) for name, item in found.items()] or None


def _is_of_a_library(value: Any) -> bool:
    if isinstance(value, SimpleNamespace):
        return False
    # An image of Pillow has public attributes that change when its file is read.
    return type(value).__module__.partition(".")[0] in {*sys.stdlib_module_names, "PIL"}


def _as_names(slots: Any) -> list[str]:
    return [slots] if isinstance(slots, str) else list(slots)


def leaves(batch: Any, path: str = "batch") -> Iterator[tuple[str, Any]]:
    """Yield ``(path, leaf)`` for every leaf of a batch built of mappings, tuples, lists, dataclasses and objects."""
    yield from _leaves(batch, path, (), {})


def _leaves(value: Any, path: str, enclosing: tuple[int, ...], seen: dict[int, Any]) -> Iterator[tuple[str, Any]]:
    inside = items(value)
    if inside is None and id(value) not in seen and (inside := attributes(value)) is not None:
        seen[id(value)] = value  # objects often refer to each other, so each is opened once
    if inside is None:
        yield path, value
    elif id(value) not in enclosing:
        for suffix, item in inside:
            yield from _leaves(item, path + suffix, (*enclosing, id(value)), seen)


def shape_of(tensor: Tensor | np.ndarray) -> tuple[int, ...]:
    """Return the shape of a tensor or array; of a nested tensor its number of parts and that of all their elements."""
    if isinstance(tensor, Tensor) and tensor.is_nested:
        return tensor.size(0), tensor.numel()
    return tuple(tensor.shape)


def size_in_bytes(batch: Any) -> int:
    """Return the bytes of all tensors of a batch."""
    return sum(part.nbytes for _, leaf in leaves(batch) if isinstance(leaf, Tensor) for part in strided_parts(leaf))


def rebuilt(value: Any, function: Callable[[Any], Any]) -> Any:
    """Return a mapping, tuple, list or dataclass with ``function`` of each item; mappings come back as dicts."""
    if isinstance(value, Mapping):
        return {key: function(item) for key, item in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*map(function, value))
    if isinstance(value, tuple | list):
        return type(value)(map(function, value))
    made = copy.copy(value)
    for field in dataclasses.fields(value):
        # The instance may be frozen, and a field need not be an argument of its class.
        object.__setattr__(made, field.name, function(getattr(value, field.name)))
    return made


def to_device(batch: Any, device: torch.device) -> Any:
    """Return the batch with every tensor on ``device``; mappings come back as dicts, and objects by their ``to``."""
    if isinstance(batch, PackedSequence):
        return batch.to(device=device)  # type: ignore[call-arg]
    if isinstance(batch, Tensor):
        return batch.to(device)
    if items(batch) is not None:
        return rebuilt(batch, lambda item: to_device(item, device))
    if attributes(batch) is not None and callable(getattr(batch, "to", None)):
        return copy.copy(batch).to(device)  # graph batches move themselves in place
    return batch


def check_batch(batch: Any, index: int) -> None:
    """Raise a ProblemError naming batch and leaf if a tensor holds NaN or +Inf, or cannot take part in autograd.

    Additive attention masks hold -Inf on purpose; where it does harm, the loss is not finite, which is seen there.
    """
    for path, leaf in leaves(batch):
        if not isinstance(leaf, Tensor):
            continue
        if leaf.is_meta:
            raise ProblemError(
                f"{path} of batch {index} of the data is on the meta device, where tensors have shapes but no values; "
                "give tensors with values"
            )
        if leaf.is_inference():
            raise ProblemError(
                f"{path} of batch {index} of the data was made in inference mode; make it outside, or clone it there"
            )
        if any(not _holds_numbers(part) for part in strided_parts(leaf)):
            raise ProblemError(
                f"batch {index} of the data holds NaN or Inf in {path} (shape {shape_of(leaf)}); "
                "clean the data, or use a boolean mask in place of non-finite numbers"
            )


def _holds_numbers(tensor: Tensor) -> bool:
    if tensor.is_floating_point() and tensor.itemsize == 1:
        tensor = tensor.float()  # the formats of 8 bits have no such functions
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return True
    return bool((torch.isfinite(tensor) | torch.isneginf(tensor.real)).all())


def digest(batch: Any, known: MutableMapping[Tensor, tuple[int, int]] | None = None) -> int:
    """Return a CRC-32 of everything in a batch: paths, types, shapes and bytes.

    Equal batches have equal digests on every device. What objects hold counts as :func:`attributes` finds it, and other
    leaves that are not tensors, arrays or plain Python values by their type only. Cost: one reading of the data, at
    several GB/s on the CPU.

    ``known`` keeps what was found for tensors on other devices, with their versions: these are read anew only when
    they are other tensors or were written to, as autograd sees it (not through ``.data``), since to read them the host
    waits for all that the device still has to do.
    """
    crc = 0
    for path, leaf in leaves(batch):
        if isinstance(leaf, Tensor):
            crc = zlib.crc32(f"{path}|{leaf.dtype}|{shape_of(leaf)}".encode(), crc)
            crc = zlib.crc32(_digest_of_tensor(leaf, known).to_bytes(4, "little"), crc)
        elif isinstance(leaf, np.ndarray) and not leaf.dtype.hasobject:
            crc = zlib.crc32(f"{path}|{leaf.dtype}|{leaf.shape}".encode(), crc)
            crc = zlib.crc32(leaf.tobytes(), crc)
        else:
            value = leaf if isinstance(leaf, PlainValue) else ""
            crc = zlib.crc32(f"{path}|{type(leaf).__qualname__}|{value!r}".encode(), crc)
    return crc


def _digest_of_tensor(tensor: Tensor, known: MutableMapping[Tensor, tuple[int, int]] | None) -> int:
    version = version_of(tensor)
    keeps = known is not None and tensor.device.type != "cpu" and not tensor.is_inference()
    if known is not None and keeps and known.get(tensor, (None, 0))[0] == version:
        return known[tensor][1]
    crc = 0
    for part in strided_parts(tensor):
        crc = zlib.crc32(tensor_bytes(part), crc)
    if known is not None and keeps:
        known[tensor] = (version, crc)
    return crc


def tensor_bytes(tensor: Tensor) -> memoryview:
    """Return the bytes of a dense tensor in row-major order; a copy only if it is strided or not on the CPU."""
    values = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous()
    return values.reshape(-1).view(torch.uint8).numpy().data


def strided_parts(tensor: Tensor) -> list[Tensor]:
    """Return the dense tensors that a tensor is stored as: itself, or parts of a sparse, nested or quantized one."""
    if tensor.is_nested:
        return list(tensor.unbind())
    if tensor.is_quantized:
        return [tensor.int_repr(), *_quantization(tensor)]
    if tensor.layout is torch.sparse_coo:
        return [tensor._indices(), tensor._values()]
    if tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        return [tensor.crow_indices(), tensor.col_indices(), tensor.values()]
    if tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
        return [tensor.ccol_indices(), tensor.row_indices(), tensor.values()]
    return [tensor if tensor.layout is torch.strided else tensor.to_dense()]


def _quantization(tensor: Tensor) -> list[Tensor]:
    """Return scale and zero point of a quantized tensor."""
    if tensor.qscheme() in (torch.per_tensor_affine, torch.per_tensor_symmetric):
        return [torch.tensor([tensor.q_scale(), tensor.q_zero_point()], dtype=torch.float64)]
    return [tensor.q_per_channel_scales(), tensor.q_per_channel_zero_points()]


def loader_generators(data: Any) -> list[torch.Generator]:
    """Return the random generators that a DataLoader and its samplers own, which every pass must rewind."""
    if not isinstance(data, DataLoader):
        return []
    owners = [data, data.sampler, data.batch_sampler, getattr(data.batch_sampler, "sampler", None)]
    found = [getattr(owner, "generator", None) for owner in owners]
    return list({id(generator): generator for generator in found if isinstance(generator, torch.Generator)}.values())
