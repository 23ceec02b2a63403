"""Whether tensors are as they were: versions, which autograd counts, and digests of their values."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

_CHUNK = 1 << 17
"""64-bit integers that are mixed at a time, so that they stay in a cache."""

_ODD = -7046029254386353131  # 2^64 over the golden ratio
_FACTORS = (-49064778989728563, -4265267296055464877)


def version_of(tensor: Tensor) -> int:
    """Return how often a tensor was written to in place; inference tensors do not count, so 0 for them."""
    return 0 if tensor.is_inference() else tensor._version


def first_written(versions: Iterable[tuple[str, Tensor, int]]) -> str | None:
    """Return the name of the first tensor that was written to since its version was noted, or None."""
    return next((name for name, tensor, version in versions if version_of(tensor) != version), None)


def versions_of(tensors: Iterable[tuple[str, Tensor]]) -> list[tuple[str, Tensor, int]]:
    """Return each name and tensor with the tensor's version."""
    return [(name, tensor, version_of(tensor)) for name, tensor in tensors]


def digests_of(tensors: Sequence[Tensor]) -> list[int]:
    """Return a number for each tensor that is another one, all but certainly, when a value or its place is.

    Each 64 bits are mixed with their position, and these numbers added up. Cost: one reading at about a third of the
    speed of memory; small tensors are mixed together; one wait for a device.
    """
    found = [0] * len(tensors)
    places: dict[torch.device, list[int]] = {}
    for position, tensor in enumerate(tensors):
        if has_plain_memory(tensor) and tensor.numel():
            places.setdefault(tensor.device, []).append(position)
    for positions in places.values():
        words = [_words(tensors[position]) for position in positions]
        for position, digest in zip(positions, _digests(words).tolist(), strict=True):
            found[position] = digest
    return found


def _digests(words: Sequence[Tensor]) -> Tensor:
    """Return the digests of tensors of 64-bit integers, of small ones together."""
    found = words[0].new_zeros(len(words))
    places = torch.arange(_CHUNK, device=found.device)
    small = [i for i, one in enumerate(words) if len(one) <= _CHUNK]
    for i, one in enumerate(words):
        if len(one) > _CHUNK:
            parts = [one[first : first + _CHUNK] for first in range(0, len(one), _CHUNK)]
            partial = [_mixed(part, places[: len(part)] + k * _CHUNK).sum() for k, part in enumerate(parts)]
            found[i] = torch.stack(partial).sum()
    if small:
        own = torch.cat([places[: len(words[i])] for i in small])  # whatever stands beside a tensor
        sums = _mixed(torch.cat([words[i] for i in small]), own).cumsum(0)  # wraps around, and so does a difference
        ends = torch.tensor([len(words[i]) for i in small]).cumsum(0)
        totals = sums[(ends - 1).to(sums.device)]
        found[torch.tensor(small, device=found.device)] = totals.diff(prepend=totals.new_zeros(1))
    return found


def _mixed(words: Tensor, places: Tensor) -> Tensor:
    """Return numbers that depend on 64 bits and their place in no linear way (the finalizer of MurmurHash3)."""
    mixed = words + places * _ODD
    for factor in _FACTORS:
        mixed ^= (mixed >> 33) & 0x7FFFFFFF  # a shift of integers carries the sign along
        mixed *= factor
    return mixed.bitwise_xor_((mixed >> 33) & 0x7FFFFFFF)


def _words(tensor: Tensor) -> Tensor:
    """Return the bytes of a tensor as 64-bit integers, without a copy where that can be, filled up with zeros."""
    values = tensor.detach().resolve_conj().resolve_neg().reshape(-1)
    if values.stride() != (1,) or values.data_ptr() % 8:
        values = values.clone(memory_format=torch.contiguous_format)
    octets = values.view(torch.uint8)
    if len(octets) % 8:
        octets = torch.nn.functional.pad(octets, (0, -len(octets) % 8))
    return octets.view(torch.int64)


def has_plain_memory(tensor: Tensor) -> bool:
    """Whether the values of a tensor lie in memory at its address and strides, and nowhere else."""
    return (
        type(tensor) in (Tensor, nn.Parameter, nn.Buffer)
        and tensor.layout is torch.strided
        and not (tensor.is_meta or tensor.is_quantized or tensor.is_nested)
    )
