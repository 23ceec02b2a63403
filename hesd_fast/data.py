"""Batches: how data is iterated again and again, and how a change between two passes is noticed."""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Iterable, Iterator, Mapping, MutableMapping
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset

from hesd_fast.errors import ProblemError
from hesd_fast.model_state import version_of

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
    if isinstance(data, torch.Tensor | tuple | Mapping):
        return True
    return dataclasses.is_dataclass(data) and not isinstance(data, type) and not hasattr(data, "__iter__")


def _check_list_of_batches(data: list[Any]) -> None:
    if not data:
        raise ProblemError("data is an empty list; give at least one batch")
    if any(isinstance(item, torch.Tensor) for item in data):
        raise ProblemError(
            f"data is a list of {len(data)} items with bare tensors among them, which can mean one batch or several; "
            "for one batch pass tuple(data); for several wrap each, as in [(x,) for x in data], or use mappings"
        )


def leaves(batch: Any, path: str = "batch") -> Iterator[tuple[str, Any]]:
    """Yield ``(path, leaf)`` for every leaf of a batch built of mappings, tuples, lists and dataclasses."""
    if isinstance(batch, Mapping):
        for key, value in batch.items():
            yield from leaves(value, f"{path}[{key!r}]")
    elif isinstance(batch, tuple | list):
        for position, value in enumerate(batch):
            yield from leaves(value, f"{path}[{position}]")
    elif dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        for field in dataclasses.fields(batch):
            yield from leaves(getattr(batch, field.name), f"{path}.{field.name}")
    else:
        yield path, batch


def leading_dimension(batch: Any) -> int | None:
    """Return the leading dimension of the first tensor leaf that has one, or None if there is none."""
    for _, leaf in leaves(batch):
        if isinstance(leaf, torch.Tensor) and leaf.ndim >= 1:
            return int(leaf.size(0))
    return None


def size_in_bytes(batch: Any) -> int:
    """Return the bytes of all tensors of a batch."""
    return sum(leaf.nbytes for _, leaf in leaves(batch) if isinstance(leaf, torch.Tensor) and not leaf.is_nested)


def to_device(batch: Any, device: torch.device) -> Any:
    """Return the batch with every tensor on ``device``; mappings come back as dicts."""
    if isinstance(batch, torch.Tensor):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {key: to_device(value, device) for key, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(to_device(value, device) for value in batch))
    if isinstance(batch, tuple | list):
        return type(batch)(to_device(value, device) for value in batch)
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        moved = {field.name: to_device(getattr(batch, field.name), device) for field in dataclasses.fields(batch)}
        return dataclasses.replace(batch, **moved)
    return batch


def check_batch(batch: Any, index: int) -> None:
    """Raise a ProblemError naming batch and leaf if a tensor holds NaN or +Inf, or cannot take part in autograd.

    Additive attention masks hold -Inf on purpose; where it does harm, the loss is not finite, which is seen there.
    """
    for path, leaf in leaves(batch):
        if not isinstance(leaf, torch.Tensor):
            continue
        if leaf.is_inference():
            raise ProblemError(
                f"{path} of batch {index} of the data was made in inference mode; make it outside, or clone it there"
            )
        if (leaf.is_floating_point() or leaf.is_complex()) and any(
            not (torch.isfinite(part) | torch.isneginf(part.real)).all() for part in strided_parts(leaf)
        ):
            raise ProblemError(
                f"batch {index} of the data holds NaN or Inf in {path} (shape {tuple(leaf.shape)}); "
                "clean the data, or use a boolean mask in place of non-finite numbers"
            )


def digest(batch: Any, known: MutableMapping[torch.Tensor, tuple[int, int]] | None = None) -> int:
    """Return a CRC-32 of everything in a batch: paths, types, shapes and bytes.

    Equal batches have equal digests on every device. Leaves that are not tensors, arrays or plain Python values
    count by their type only. Cost: one reading of the data, at several GB/s on the CPU.

    ``known`` keeps what was found for tensors on other devices, with their versions: these are read anew only when
    they are other tensors or were written to, as autograd sees it (not through ``.data``), since to read them the host
    waits for all that the device still has to do.
    """
    crc = 0
    for path, leaf in leaves(batch):
        if isinstance(leaf, torch.Tensor):
            crc = zlib.crc32(f"{path}|{leaf.dtype}|{tuple(leaf.shape)}".encode(), crc)
            crc = zlib.crc32(_digest_of_tensor(leaf, known).to_bytes(4, "little"), crc)
        elif isinstance(leaf, np.ndarray) and not leaf.dtype.hasobject:
            crc = zlib.crc32(f"{path}|{leaf.dtype}|{leaf.shape}".encode(), crc)
            crc = zlib.crc32(leaf.tobytes(), crc)
        else:
            plain = leaf is None or isinstance(leaf, bool | int | float | complex | str | bytes)
            crc = zlib.crc32(f"{path}|{type(leaf).__qualname__}|{leaf if plain else ''!r}".encode(), crc)
    return crc


def _digest_of_tensor(tensor: torch.Tensor, known: MutableMapping[torch.Tensor, tuple[int, int]] | None) -> int:
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


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """Return the bytes of a dense tensor in row-major order; a copy only if it is strided or not on the CPU."""
    values = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous()
    return values.reshape(-1).view(torch.uint8).numpy().data


def strided_parts(tensor: torch.Tensor) -> list[torch.Tensor]:
    """Return the dense tensors that hold a tensor's values: itself, or the parts of a sparse or nested one."""
    if tensor.is_nested:
        return list(tensor.unbind())
    if tensor.layout is torch.strided:
        return [tensor]
    coordinates = tensor.to_sparse(layout=torch.sparse_coo).coalesce()
    return [coordinates.indices(), coordinates.values()]


def loader_generators(data: Any) -> list[torch.Generator]:
    """Return the random generators that a DataLoader and its samplers own, which every pass must rewind."""
    if not isinstance(data, DataLoader):
        return []
    owners = [data, data.sampler, data.batch_sampler, getattr(data.batch_sampler, "sampler", None)]
    found = [getattr(owner, "generator", None) for owner in owners]
    return list({id(generator): generator for generator in found if isinstance(generator, torch.Generator)}.values())
