"""What the bindings take and refuse, by name; what is borrowed comes back."""

from __future__ import annotations

import gc
import sys

import native_engine
import numpy as np
import pytest
from lanczos_driver import new_engine
from native_panels import BFLOAT, CPU, CUDA, CUDA_HOST, FLOAT, METAL, Lender, Panel

from hesd_fast.errors import EngineError

engine = native_engine.load()
EMULATED = engine.build_info().get("emulated", False)
"""Whether what is borrowed as memory of a CUDA device is taken, and worked on by the emulated kernels."""


def ones(rows, columns, dtype="float64"):
    return np.ones((rows, columns), dtype=dtype)


def read_only(rows, columns):
    array = ones(rows, columns)
    array.flags.writeable = False
    return array


def unaligned(rows, columns, dtype):
    memory = np.zeros(rows * columns * np.dtype(dtype).itemsize + 1, dtype=np.uint8)
    return memory[1:].view(dtype).reshape(rows, columns)


def strided(array, shape, strides):
    """Strides in elements."""
    return np.lib.stride_tricks.as_strided(array, shape, [stride * array.itemsize for stride in strides])


def lender(shape=(2, 3), strides=None, dtype="float64", **options):
    return Lender(np.ones(64, dtype=dtype), shape, strides, **options)


# A panel that cannot be used, and what is said of it.
PANELS = [
    (lambda: ones(3, 2).T, "has a stride of 2 elements within a vector"),
    (lambda: ones(2, 6)[:, ::2], "has a stride of 2 elements within a vector"),
    (lambda: ones(2, 3)[:, ::-1], "has a stride of -1 elements within a vector"),
    (lambda: strided(ones(1, 9), (2, 3), (2, 1)), "has vectors 2 elements apart that overlap"),
    (lambda: strided(ones(1, 9), (2, 3), (0, 1)), "has vectors 0 elements apart that overlap"),
    (lambda: ones(2, 3)[::-1], "has vectors -3 elements apart that overlap or run backwards"),
    (lambda: unaligned(2, 3, "float64"), "starts at an address that is not a multiple of its element size"),
    (lambda: unaligned(2, 3, "float32"), "starts at an address that is not a multiple of its element size"),
    (lambda: lender(strides=(3, 1), byte_offset=4), "starts at an address that is not a multiple"),
    (lambda: ones(2, 3, "int64"), "has dtype int64"),
    (lambda: ones(2, 3, "uint16"), "has dtype uint16"),
    (lambda: ones(2, 3, "bool"), "has dtype bool8"),
    (lambda: ones(2, 3, "complex64"), "has dtype complex64"),
    (lambda: lender(lanes=2), "has dtype float64"),
    (lambda: lender(code=99), "has dtype unknown64"),
    (lambda: lender(bits=8), "has dtype float8"),
    (lambda: read_only(2, 3), "read-only array needs a copy"),
    (lambda: np.ones(3), "has 1 dimensions"),
    (lambda: np.ones((1, 2, 3)), "has 3 dimensions"),
    (lambda: np.array(1.0), "has 0 dimensions"),
    (lambda: [[1.0, 2.0, 3.0]], "is a list"),
    (lambda: None, "is a NoneType"),
    *([] if EMULATED else [(lambda: lender(device=CUDA), "is on a CUDA device")]),
    (lambda: lender(device=METAL), "is on a device this build has no kernels for"),
    (lambda: lender(name=b"another"), "gave no DLPack capsule named 'dltensor'"),
]

CALLS = {
    "V": lambda panel: engine.panel_gram(panel, ones(2, 3)),
    "W": lambda panel: engine.panel_gram(ones(2, 3), panel),
    "out": lambda panel: engine.fill_probes(panel, 0, 0, 0, "rademacher"),
    "X": lambda panel: engine.panel_combine(np.ones((2, 2)), ones(2, 3), panel),
    "parts[0]": lambda panel: engine.accumulate_hvp(ones(2, 3), [panel], [0], 1.0, None),
    "compensation": lambda panel: engine.accumulate_hvp(ones(2, 3), [], [], 1.0, panel),
}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize(("panel", "message"), PANELS)
def test_a_panel_that_cannot_be_used_is_refused_by_name(name, panel, message):
    if name == "compensation" and panel() is None:
        CALLS[name](None)  # no compensation is a choice
        return
    with pytest.raises(EngineError) as refusal:
        CALLS[name](panel())
    assert str(refusal.value).startswith(f"`{name}` ")
    assert message in str(refusal.value)


def test_16_bit_panels_cannot_be_worked_in():
    for panel, name in [(Panel(np.ones((2, 3)), "bfloat16").borrowed, "bfloat16"), (ones(2, 3, "float16"), "float16")]:
        for argument in ("W", "out", "compensation"):
            with pytest.raises(EngineError, match=f"`{argument}` has dtype {name}; wanted float64 or float32"):
                CALLS[argument](panel)
        assert np.array_equal(engine.panel_gram(panel, ones(2, 3)), np.full((2, 2), 3.0))


def test_compact_tensors_offsets_and_pinned_memory_are_taken():
    memory = np.arange(64.0)
    panels = [
        (Lender(memory, (2, 3), None), memory[:6].reshape(2, 3)),
        (Lender(memory, (2, 3), (3, 1), byte_offset=16), memory[2:8].reshape(2, 3)),
        (Lender(memory, (2, 3), (10, 1)), memory[:20].reshape(2, 10)[:, :3]),
        (Lender(memory, (2, 3), None, device=CUDA_HOST), memory[:6].reshape(2, 3)),
        (Lender(memory, (1, 3), (0, 1)), memory[:3].reshape(1, 3)),  # the stride of one vector means nothing
        (Lender(memory, (3, 1), (2, 77)), memory[:6:2].reshape(3, 1)),  # nor that within one element
        (Lender(memory, (0, 3), (0, 0)), memory[:0].reshape(0, 3)),
    ]
    for panel, values in panels:
        columns = values.shape[1]
        assert np.array_equal(engine.panel_gram(panel, ones(1, columns)), values.sum(axis=1, keepdims=True))
        assert (panel.borrowed, panel.returned) == (1, 1)


def test_every_panel_comes_back_once_also_after_a_refusal():
    def new(rows=2, columns=3, **options):
        return Lender(np.ones(64), (rows, columns), None, **options)

    def kernels(v, w):
        engine.panel_gram(v, w)
        engine.panel_combine(np.ones((2, 2)), v, w)
        engine.panel_project(w, v, np.ones((2, 2)))
        engine.accumulate_hvp(w, [v], [0], 1.0, None)
        engine.panel_orthonormalize(w, w, 0.0, 2, None)

    v, w = new(), new()
    kernels(v, w)
    assert (v.borrowed, v.returned) == (4, 4)
    assert (w.borrowed, w.returned) == (6, 6)
    for bad in (new(columns=4), new(device=METAL), new(code=BFLOAT)):
        v = new()
        with pytest.raises(EngineError):
            engine.panel_gram(v, bad)
        assert (v.returned, bad.borrowed, bad.returned) == (1, 1, 1)
    v, out = new(), new()
    with pytest.raises(EngineError, match="one offset for each part"):
        engine.accumulate_hvp(out, [v], [], 1.0, None)
    assert out.borrowed == out.returned
    assert v.borrowed == v.returned


@pytest.mark.skipif(not EMULATED, reason="this build has no emulated CUDA kernels")
def test_panels_of_a_device_go_to_its_kernels_together():
    def of(device, fill=1.0, number=0):
        return Lender(np.full(64, fill), (2, 3), None, device=device, device_number=number)

    engine.take_traffic()
    assert np.array_equal(engine.panel_gram(of(CUDA), of(CUDA, 2.0)), np.full((2, 2), 6.0))
    assert engine.take_traffic() == (96, 0, 0)  # the emulated kernels did it
    assert np.array_equal(engine.panel_gram(of(CPU), of(CUDA_HOST, 2.0)), np.full((2, 2), 6.0))
    assert engine.take_traffic() == (0, 0, 0)
    mixed = [
        lambda: engine.panel_gram(of(CPU), of(CUDA)),
        lambda: engine.panel_project(of(CUDA), of(CPU), np.ones((2, 2))),
        lambda: engine.panel_combine(np.ones((2, 2)), of(CPU), of(CUDA)),
        lambda: engine.panel_orthonormalize(of(CUDA), of(CPU), 0.0, 2, None),
        lambda: engine.accumulate_hvp(of(CUDA), [of(CPU)], [0], 1.0, None),
        lambda: engine.accumulate_hvp(of(CUDA), [], [], 1.0, of(CPU)),
        lambda: new_engine(of(CPU), Lender(np.zeros(9), (3, 3), None, device=CUDA), 1, 3, 3),
    ]
    for call in mixed:
        with pytest.raises(EngineError, match=r"is on (the CPU|cuda:0) and `.*` on (the CPU|cuda:0); wanted both"):
            call()
    with pytest.raises(EngineError, match=r"`V` is on cuda:1 and `W` on cuda:0; wanted both on one device"):
        engine.panel_gram(of(CUDA, number=1), of(CUDA))


def test_calls_keep_no_reference():
    v, w, c = ones(2, 30), ones(2, 30), ones(2, 2)
    gc.collect()
    before = [sys.getrefcount(array) for array in (v, w, c)]
    for _ in range(3):
        engine.panel_project(w, v, c)
        engine.panel_gram(v, w)
        with pytest.raises(EngineError):
            engine.panel_project(v[:, :3], v, c)
    gc.collect()
    assert [sys.getrefcount(array) for array in (v, w, c)] == before


def test_an_error_raised_by_the_lender_is_told():
    class Broken:
        def __dlpack__(self, **options):
            raise RuntimeError("not today")

    class Interrupted:
        def __dlpack__(self, **options):
            raise KeyboardInterrupt

    with pytest.raises(EngineError, match=r"`V` cannot be borrowed by DLPack \(not today\)"):
        engine.panel_gram(Broken(), ones(2, 3))
    with pytest.raises(KeyboardInterrupt):
        engine.panel_gram(Interrupted(), ones(2, 3))


MEMORY = np.ones((8, 10))
CONTRADICTIONS = [
    (lambda: engine.panel_gram(ones(2, 3), ones(2, 4)), "same length"),
    (lambda: engine.panel_project(ones(2, 3), ones(3, 3), np.ones((2, 3))), "`C` is not a float64 matrix"),
    (lambda: engine.panel_project(ones(2, 3), ones(3, 3), ones(0, 2), gram_only=4), "`gram_only` is 4; wanted 0 to 3"),
    (
        lambda: engine.panel_project(ones(2, 3), ones(3, 3), ones(4, 2), gram_only=-1),
        "`gram_only` is -1; wanted 0 to 3",
    ),
    (lambda: engine.panel_project(ones(2, 3), ones(3, 3), np.ones(6)), "`C` is not a float64 matrix"),
    (lambda: engine.panel_project(ones(2, 3), ones(3, 3), "text"), "`C` is not a float64 matrix"),
    (lambda: engine.panel_combine(np.ones((3, 2)), ones(3, 3), ones(2, 3)), "`S` is not a float64 matrix"),
    (lambda: engine.panel_project(MEMORY[1:3], MEMORY[2:4], np.ones((2, 2))), "`W` shares memory with `V`"),
    (lambda: engine.panel_combine(np.ones((1, 2)), MEMORY[:2], MEMORY[1:2]), "`X` shares memory with `V`"),
    (lambda: engine.panel_orthonormalize(MEMORY[:3], MEMORY[1:4], 0.0, 3, None), "shares memory with `out`"),
    (lambda: engine.panel_orthonormalize(ones(2, 3), ones(2, 4), 0.0, 2, None), r"`out` has shape \(2, 4\)"),
    (lambda: engine.panel_orthonormalize(ones(2, 3), ones(2, 3, "float32"), 0.0, 2, None), "another precision"),
    (lambda: engine.panel_orthonormalize(ones(2, 3), ones(2, 3), -1.0, 2, None), "`tolerance` is -1"),
    (lambda: engine.panel_orthonormalize(ones(2, 3), ones(2, 3), np.nan, 2, None), "`tolerance` is"),
    (lambda: engine.panel_orthonormalize(ones(2, 3), ones(2, 3), 0.0, -1, None), "`max_rank` is -1"),
    (lambda: engine.accumulate_hvp(ones(1, 3), [ones(1, 2)], [2], 1.0, None), "does not fit"),
    (lambda: engine.accumulate_hvp(ones(1, 3), [ones(1, 2)], [-1], 1.0, None), "does not fit"),
    (lambda: engine.accumulate_hvp(ones(1, 3), [ones(1, 2)], [2**63 - 1], 1.0, None), "does not fit"),
    (lambda: engine.accumulate_hvp(ones(1, 3), [ones(1, 2)], [-(2**63)], 1.0, None), "does not fit"),
    (lambda: engine.accumulate_hvp(ones(1, 3), [ones(1, 4)], [0], 1.0, None), "does not fit"),
    (lambda: engine.accumulate_hvp(ones(1, 3), [ones(2, 2)], [0], 1.0, None), "does not fit"),
    (lambda: engine.accumulate_hvp(ones(1, 3), [ones(1, 2)], [], 1.0, None), "one offset for each part"),
    (lambda: engine.accumulate_hvp(ones(1, 3), [ones(1, 2)] * 2, [1, 0], 1.0, None), "overlap at column 1"),
    (lambda: engine.accumulate_hvp(ones(1, 3, "float32"), [ones(1, 2)], [0], 1.0, None), "higher precision"),
    (lambda: engine.accumulate_hvp(MEMORY[:1], [MEMORY[:1]], [0], 1.0, None), "shares memory with `out`"),
    (lambda: engine.accumulate_hvp(MEMORY[:1], [], [], 1.0, MEMORY[:1]), "`compensation` shares memory"),
    (lambda: engine.accumulate_hvp(ones(1, 10), [MEMORY[:1]], [0], 1.0, MEMORY[:1]), "shares memory"),
    (lambda: engine.accumulate_hvp(ones(1, 3), [], [], 1.0, ones(1, 4)), r"`compensation` has shape \(1, 4\)"),
    (lambda: engine.accumulate_hvp(ones(1, 3), [], [], 1.0, ones(1, 3, "float32")), "another precision"),
    (lambda: engine.accumulate_hvp(ones(1, 3), [], [], np.inf, None), "`alpha` is inf"),
    (lambda: engine.fill_probes(ones(1, 3), 0, 0, 0, "uniform"), "`kind` is 'uniform'"),
    (lambda: engine.select_target("sse9"), "'sse9' is not in this build"),
]


@pytest.mark.parametrize(("call", "message"), CONTRADICTIONS)
def test_arguments_that_contradict_each_other_are_refused_by_name(call, message):
    with pytest.raises(EngineError, match=message):
        call()


def test_the_refused_left_nothing_written():
    assert np.all(MEMORY == 1.0)
    assert (CPU, FLOAT) == (1, 2)
