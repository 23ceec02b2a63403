"""Panels of more than 2**31 elements, on memory that is mapped and never used: indices must have 64 bits."""

from __future__ import annotations

import mmap
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from hesd_fast import kernels

if not sys.platform.startswith("linux"):
    pytest.skip(
        "untouched anonymous memory costs nothing on Linux; elsewhere it is not known to", allow_module_level=True
    )

LARGE = 2**31
MOST_RESIDENT = 2 << 30


def untouched(elements, dtype):
    """Zeros that take no memory until they are written; reading maps one page of zeros again and again."""
    try:
        memory = mmap.mmap(-1, elements * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        pytest.skip(f"the system has no {elements * dtype.itemsize >> 30} GiB of untouched memory: {error}")
    memory.madvise(mmap.MADV_NOHUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype)


def far_apart(rows, columns, dtype, stride=LARGE + 64):
    """A panel whose vectors lie more than 2**31 elements apart."""
    return untouched((rows - 1) * stride + columns, dtype).as_strided((rows, columns), (stride, 1))


@pytest.fixture(autouse=True)
def _little_memory():
    def resident():
        fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        return int(fields["VmRSS"].split()[0]) * 1024, int(fields["VmHWM"].split()[0]) * 1024

    before = resident()[1]
    yield
    # the mark of the highest memory is the process's: what other tests took counts as theirs
    assert resident()[1] <= max(before, MOST_RESIDENT)


def random(rows, columns, dtype, seed=0):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("v_dtype", [torch.float32, torch.bfloat16])
def test_vectors_far_apart(v_dtype):
    n = 1000
    small_v, small_w = random(3, n, v_dtype), random(2, n, torch.float32, 1)
    v, w = far_apart(3, n, v_dtype), far_apart(2, n, torch.float32)
    v.copy_(small_v)
    w.copy_(small_w)
    np.testing.assert_array_equal(kernels.panel_gram(v, w), kernels.panel_gram(small_v, small_w))
    coefficients = torch.randn(3, 2, dtype=torch.float64)
    far, near = (kernels.panel_project(a, b, coefficients) for a, b in ((w, v), (small_w, small_v)))
    for one, other in zip(far, near, strict=True):
        np.testing.assert_array_equal(one, other)
    assert torch.equal(w, small_w)
    kernels.panel_combine(coefficients.T, small_v, w)
    kernels.panel_combine(coefficients.T, v, small_w)
    assert torch.equal(w, small_w)
    factor = kernels.panel_orthonormalize(w)
    assert factor.rank == 2
    assert torch.equal(factor.factor, kernels.panel_orthonormalize(small_w).factor)
    assert torch.equal(w, small_w)


def test_probes_and_products_far_apart():
    n = 1000
    out, parts = far_apart(2, n, torch.float32), far_apart(2, 10, torch.bfloat16)
    near = torch.empty(2, n)
    for panel in (out, near):
        kernels.fill_probes(panel, 7, kind="gaussian")
    assert torch.equal(out, near)
    parts.copy_(random(2, 10, torch.bfloat16))
    kernels.accumulate_hvp(out, [parts], [990], 0.5)
    kernels.accumulate_hvp(near, [parts.contiguous()], [990], 0.5)
    assert torch.equal(out, near)


@pytest.mark.parametrize(("dtype", "columns"), [(torch.bfloat16, LARGE + 4096 + 5), (torch.float32, LARGE // 2 + 7)])
def test_gram_of_vectors_whose_end_is_past_2_to_the_31st(dtype, columns):
    # bfloat16: past 2**31 elements; float32: the bytes are past 2**32
    v, w = untouched(columns, dtype).view(1, -1), untouched(columns, torch.float32).view(1, -1)
    places = torch.tensor([0, 1, columns // 2, columns - 4100, columns - 2, columns - 1])
    v[0, places] = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0, 32.0], dtype=dtype)
    w[0, places] = torch.tensor([1.0, 1.0, 1.0, 1.0, 1.0, 0.5])
    assert kernels.panel_gram(v, w).item() == 1 + 2 + 4 + 8 + 16 + 16


def test_products_are_added_past_2_to_the_31st():
    columns = LARGE + 5000
    out, compensation = (untouched(columns, torch.float32).view(1, -1) for _ in range(2))
    part = random(1, 1000, torch.float32)
    kernels.accumulate_hvp(out, [part[:, :100], part], [5, columns - 1000], 2.0, compensation)
    assert torch.equal(out[:, -1000:], 2 * part)
    assert torch.equal(out[:, 5:105], 2 * part[:, :100])
    assert not out[:, 105:5000].any()  # where an offset cut to 32 bits would lead
    assert not out[:, -2000:-1000].any()


@pytest.mark.parametrize("kind", ["rademacher", "gaussian"])
@pytest.mark.parametrize("boundary", [2**31, 2**32, 2**33, 2**40])
def test_probes_of_a_shard_are_those_of_the_whole_across(kind, boundary):
    whole = torch.empty(2, 400)
    kernels.fill_probes(whole, 3, first_index=boundary - 200, kind=kind)
    for start in (0, 1, 37, 199, 200, 201, 333):
        shard = torch.empty(2, 400 - start)
        kernels.fill_probes(shard, 3, first_index=boundary - 200 + start, kind=kind)
        assert torch.equal(shard, whole[:, start:])
    first = torch.empty(2, 200)
    kernels.fill_probes(first, 3, kind=kind)
    assert not torch.equal(first, whole[:, 200:])  # an index cut to 32 bits starts again


def test_a_vector_of_probes_longer_than_2_to_the_31st_would_not_start_again():
    # The same index from two sides: the last elements of a panel of two vectors far apart, and a panel of their own.
    panel = far_apart(2, 64, torch.float32)
    kernels.fill_probes(panel, 5, first_probe=2**32 - 2, first_index=2**64 - 64)
    own = torch.empty(1, 1)
    kernels.fill_probes(own, 5, first_probe=2**32 - 1, first_index=2**64 - 1)
    assert panel[1, 63] == own.item()
