"""Every kernel on NumPy memory with watched surroundings, at awkward sizes, on every instruction set."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import native_engine
import numpy as np
import pytest
from native_panels import EPSILON, STORAGE, WORKING, Panel, unset

from hesd_fast.errors import EngineError

engine = native_engine.load()

# Edges of lanes, tiles, blocks, runs of float32 sums and chunks; several chunks.
LENGTHS = [
    *(0, 1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 255, 256, 257),
    *(511, 512, 513, 1023, 1024, 1025, 4095, 4096, 4097, 12_289),
]
if os.environ.get("HESD_NATIVE_SANITIZER") == "thread":  # slow, and which thread touches what depends on few edges
    LENGTHS = [0, 1, 7, 17, 64, 257, 1023, 4097, 12_289]
# Rows of V and of W: nothing, less than a tile, edges of tiles, several.
SHAPES = [(0, 2), (1, 1), (3, 2), (4, 3), (5, 4), (8, 5), (9, 6), (4, 7), (7, 8), (17, 9), (2, 0)]
PADDINGS = [0, 1, 3, 13]


def cases():
    """Every length, each with a third of the shapes in turn; paddings take turns too."""
    for number, n in enumerate(LENGTHS):
        for k, b in SHAPES[number % 3 :: 3]:
            yield n, k, b, PADDINGS[(number + k) % len(PADDINGS)]


def integers(rows, columns, seed, largest=3):
    """Small integers: sums of their products are exact in float32, so results have one right value."""
    return np.random.default_rng([seed, rows, columns]).integers(-largest, largest, (rows, columns), endpoint=True)


def normals(rows, columns, seed=0):
    return np.random.default_rng([seed, rows, columns]).standard_normal((rows, columns))


def product(left, right):
    """Matrix product in extended precision."""
    return np.einsum("ik,kj->ij", left.astype(np.longdouble), right.astype(np.longdouble))


def inner(left, right):
    return product(left, right.T)


# Gram matrices, projections and combinations: exact values first, rounding after.


@pytest.mark.parametrize("storage", STORAGE)
@pytest.mark.parametrize("working", WORKING)
def test_panel_gram_is_exact_on_integers(target, storage, working):
    for n, k, b, padding in cases():
        v = Panel(integers(k, n, 1), storage, padding)
        w = Panel(integers(b, n, 2), working, PADDINGS[-1] - padding)
        assert np.array_equal(engine.panel_gram(v.borrowed, w.borrowed), v.values @ w.values.T), (n, k, b)
        v.assert_untouched()
        w.assert_untouched()


@pytest.mark.parametrize("storage", STORAGE)
@pytest.mark.parametrize("working", WORKING)
def test_panel_project_is_exact_on_integers(target, storage, working):
    for n, k, b, padding in cases():
        v = Panel(integers(k, n, 1), storage, padding)
        w = Panel(integers(b, n, 2), working, PADDINGS[-1] - padding)
        gram_only = n % (k + 1)
        c = integers(k - gram_only, b, 3, largest=1).astype(np.float64)
        expected = w.values - c.T @ v.values[gram_only:]
        gram, self_gram = engine.panel_project(w.borrowed, v.borrowed, c, gram_only=gram_only)
        assert np.array_equal(w.values, expected), (n, k, b)
        assert np.array_equal(gram, v.values @ expected.T), (n, k, b)
        assert np.array_equal(self_gram, expected @ expected.T), (n, k, b)
        v.assert_untouched()
        w.assert_surroundings_untouched()


@pytest.mark.parametrize("storage", STORAGE)
@pytest.mark.parametrize("made", STORAGE)
def test_panel_combine_is_exact_on_integers(target, storage, made):
    for n, k, r, padding in cases():
        v = Panel(integers(k, n, 1), storage, padding)
        x = unset(r, n, made, PADDINGS[-1] - padding)
        s = integers(r, k, 3).astype(np.float64)
        engine.panel_combine(s, v.borrowed, x.borrowed)
        assert np.array_equal(x.values, s @ v.values), (n, k, r)
        v.assert_untouched()
        x.assert_surroundings_untouched()


@pytest.mark.parametrize("storage", STORAGE)
@pytest.mark.parametrize("working", WORKING)
@pytest.mark.parametrize("n", [5, 513, 12_289])
def test_panels_of_normals_are_right_to_the_working_precision(target, storage, working, n):
    epsilon = EPSILON[working]
    for k, b in [(1, 1), (5, 2), (17, 9)]:
        v, w = Panel(normals(k, n, 1), storage), Panel(normals(b, n, 2), working)
        c, s = normals(k, b, 3), normals(b, k, 4)
        sizes = np.abs(v.values) @ np.abs(w.values).T
        assert (
            np.abs(engine.panel_gram(v.borrowed, w.borrowed) - inner(v.values, w.values)) <= 4 * epsilon * sizes
        ).all()

        x = unset(b, n, working)
        engine.panel_combine(s, v.borrowed, x.borrowed)
        sizes = np.abs(s) @ np.abs(v.values)
        assert (np.abs(x.values - product(s, v.values)) <= 4 * epsilon * sizes).all()

        expected = w.values - product(c.T, v.values)
        sizes = np.abs(w.values) + np.abs(c.T) @ np.abs(v.values)
        gram, self_gram = engine.panel_project(w.borrowed, v.borrowed, c)
        assert (np.abs(w.values - expected) <= 4 * epsilon * sizes).all()
        # the Gram matrices are those of the W that was stored
        sizes = np.abs(v.values) @ np.abs(w.values).T
        assert (np.abs(gram - inner(v.values, w.values)) <= 4 * epsilon * sizes).all()
        sizes = np.abs(w.values) @ np.abs(w.values).T
        assert (np.abs(self_gram - inner(w.values, w.values)) <= 4 * epsilon * sizes).all()
        assert np.array_equal(self_gram, self_gram.T)


@pytest.mark.parametrize("working", WORKING)
def test_a_panel_with_itself_and_parts_of_itself(target, working):
    for n in (1, 65, 4097):
        w = Panel(integers(7, n, 5), working)
        assert np.array_equal(engine.panel_gram(w.borrowed, w.borrowed), w.values @ w.values.T)
        for first, count in [(0, 3), (2, 4), (6, 1)]:
            part = w.rows_of(first, count)
            assert np.array_equal(engine.panel_gram(w.borrowed, part), w.values @ part.astype(np.float64).T)
            assert np.array_equal(engine.panel_gram(part, w.borrowed), part.astype(np.float64) @ w.values.T)
        w.assert_untouched()


@pytest.mark.parametrize("storage", ["bfloat16", "float16"])
def test_every_16_bit_number_is_read_as_it_is(target, storage):
    bits = np.arange(2**16, dtype=np.uint32).astype(np.uint16)
    with np.errstate(invalid="ignore"):
        numbers = (bits.astype(np.uint32) << 16).view(np.float32) if storage == "bfloat16" else bits.view(np.float16)
        expected = numbers.astype(np.float32)
    for working in WORKING:
        for r in (1, 4):  # few and many rows take different paths
            v = Panel(np.zeros((1, 2**16)), storage, padding=0)
            v._cells[0] = bits
            x = unset(r, 2**16, working)
            engine.panel_combine(np.ones((r, 1)), v.borrowed, x.borrowed)
            for row in x.array:
                assert np.array_equal(row, expected, equal_nan=True)


# accumulate_hvp


def accumulated(out, parts, offsets, alpha, compensation):
    """The contract of accumulate_hvp, each operation rounded to out's type."""
    factor = out.dtype.type(alpha)
    for part, offset in zip(parts, offsets, strict=True):
        columns = slice(offset, offset + part.shape[1])
        old = out[:, columns].copy()
        term = factor * part.astype(out.dtype)
        total = old + term
        if compensation is not None:
            shared = total - old
            compensation[:, columns] += (old - (total - shared)) + (term - shared)
        out[:, columns] = total


@pytest.mark.parametrize("working", WORKING)
@pytest.mark.parametrize("compensated", [False, True])
def test_accumulate_hvp_matches_its_contract_bit_for_bit(target, working, compensated):
    lengths = [1, 0, 7, 16_383, 16_384, 16_385, 33]
    offsets = [3, 4, 5, 20, 16_500, 40_000, 60_000]
    storages = [name for name in STORAGE if EPSILON[name] >= EPSILON[working]]
    for b in (0, 1, 3):
        out = Panel(normals(b, 60_040), working)
        compensation = Panel(np.zeros((b, 60_040)), working, padding=1) if compensated else None
        parts = [
            Panel(normals(b, length, i), storages[i % len(storages)], PADDINGS[i % 4])
            for i, length in enumerate(lengths)
        ]
        expected = out.array.copy()
        errors = None if compensation is None else compensation.array.copy()
        for alpha in (0.3, -1.0):
            borrowed = None if compensation is None else compensation.borrowed
            engine.accumulate_hvp(out.borrowed, [part.borrowed for part in parts], offsets, alpha, borrowed)
            accumulated(expected, [part.values for part in parts], offsets, alpha, errors)
        assert np.array_equal(out.array, expected)
        out.assert_surroundings_untouched()
        for part in parts:
            part.assert_untouched()
        if compensation is not None:
            assert np.array_equal(compensation.array, errors)
            assert b == 0 or np.abs(errors).sum() > 0
            compensation.assert_surroundings_untouched()


def test_accumulate_hvp_of_many_small_parts_and_of_none(target):
    lengths = [1, 2, 3, 5, 8, 13, 21] * 30
    offsets = [int(total) for total in np.cumsum([0, *lengths[:-1]])]
    order = np.random.default_rng(0).permutation(len(lengths))  # parts in any order
    out = Panel(np.zeros((2, sum(lengths))), "float32")
    parts = [Panel(integers(2, length, i), STORAGE[1 + i % 3]) for i, length in enumerate(lengths)]
    engine.accumulate_hvp(out.borrowed, [parts[i].borrowed for i in order], [offsets[i] for i in order], 2.0, None)
    assert np.array_equal(out.values, 2.0 * np.concatenate([part.values for part in parts], axis=1))
    out = Panel(integers(2, 9, 0))
    engine.accumulate_hvp(out.borrowed, [], [], 1.0, None)
    out.assert_untouched()


# fill_probes


def philox(block, probe, kind, seed):
    """Philox 4x32-10 for an array of block numbers; words (4, blocks)."""
    mask = np.uint64(0xFFFFFFFF)
    c = [block & mask, block >> np.uint64(32), np.full_like(block, probe), np.full_like(block, kind)]
    k0, k1 = seed & 0xFFFFFFFF, seed >> 32
    for _ in range(10):
        p0, p1 = np.uint64(0xD2511F53) * c[0], np.uint64(0xCD9E8D57) * c[2]
        c = [
            (p1 >> np.uint64(32)) ^ c[1] ^ np.uint64(k0),
            p1 & mask,
            (p0 >> np.uint64(32)) ^ c[3] ^ np.uint64(k1),
            p0 & mask,
        ]
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return np.stack(c)


def probe_values(n, seed, probe, first_index, kind):
    index = np.uint64(first_index) + np.arange(n, dtype=np.uint64)
    if kind == "rademacher":
        words = philox(index // np.uint64(128), probe, 0, seed)
        bit = index % np.uint64(128)
        word = words[(bit // np.uint64(32)).astype(int), np.arange(n)]
        return np.where((word >> (bit % np.uint64(32))) & np.uint64(1), 1.0, -1.0)
    words = philox(index // np.uint64(4), probe, 1, seed)
    item = (index % np.uint64(4)).astype(int)
    pair = item // 2 * 2
    radius = np.sqrt(-2.0 * np.log((words[pair, np.arange(n)].astype(np.float64) + 1.0) * 2.0**-32))
    turn = words[pair + 1, np.arange(n)].astype(np.float64) * (2.0 * np.pi * 2.0**-32)
    return radius * np.where(item % 2 == 0, np.cos(turn), np.sin(turn))


PLACES = [
    *[(n, 5, 1, 3) for n in (0, 1, 2, 127, 128, 129, 16_383, 16_384, 16_385)],
    (1000, 2**64 - 1, 2**32 - 2, 2**64 - 1000),  # the very end of the table
    (777, 2**63, 0, 2**40 + 77),
]


@pytest.mark.parametrize("kind", ["rademacher", "gaussian"])
@pytest.mark.parametrize("working", WORKING)
def test_fill_probes_gives_the_values_of_its_contract(target, kind, working):
    for n, seed, probe, index in PLACES:
        out = unset(2, n, working)
        engine.fill_probes(out.borrowed, seed, probe, index, kind)
        out.assert_surroundings_untouched()
        expected = np.stack([probe_values(n, seed, probe + row, index, kind) for row in range(2)])
        if kind == "rademacher":
            assert np.array_equal(out.values, expected)
        else:
            # NumPy rounds the angle 2 pi turn: an error of up to 8 units of float64, times a radius of at most 7
            allowed = 64 * EPSILON["float64"] + EPSILON[working] * np.abs(expected)
            assert (np.abs(out.values - expected) <= allowed).all()


@pytest.mark.parametrize("kind", ["rademacher", "gaussian"])
@pytest.mark.parametrize("working", WORKING)
def test_fill_probes_is_the_same_for_any_split(target, kind, working):
    n = 17_000
    whole = unset(3, n, working)
    engine.fill_probes(whole.borrowed, 11, 4, 6, kind)
    for cut in (1, 3, 127, 129, 16_383, 16_385):
        left, right = unset(3, cut, working), unset(3, n - cut, working)
        engine.fill_probes(left.borrowed, 11, 4, 6, kind)
        engine.fill_probes(right.borrowed, 11, 4, 6 + cut, kind)
        assert np.array_equal(np.concatenate((left.array, right.array), axis=1), whole.array)
    row = unset(1, n, working)
    engine.fill_probes(row.borrowed, 11, 6, 6, kind)
    assert np.array_equal(row.array[0], whole.array[2])


# panel_orthonormalize


def hilbert(b, n):
    return 1.0 / (np.arange(b)[:, None] + np.arange(n)[None, :] + 1.0)


def low_rank(b, n, rank):
    return normals(b, rank, 8) @ normals(rank, n, 9)


def with_rows(values, **rows):
    values = values.copy()
    for name, row in rows.items():
        values[int(name[3:])] = row
    return values


A = normals(9, 700)
# name, rows, rank (None: whatever the rounding leaves above the tolerance)
FAMILIES = {
    "hilbert": (hilbert(9, 700), None),
    "hilbert-wide": (hilbert(9, 9), None),
    "repeated": (np.tile(A[:1], (6, 1)), 1),
    "repeated-scaled": (np.outer(np.arange(1.0, 7.0), A[0]), 1),
    "zero": (np.zeros((5, 300)), 0),
    "zero-first": (with_rows(A, row0=0.0, row4=0.0), 7),
    "one-zero-row": (np.zeros((1, 300)), 0),
    "dependent": (with_rows(A, row2=A[0] - 2.0 * A[1], row8=A[7]), 7),
    "low-rank": (low_rank(8, 513, 3), 3),
    "more-rows-than-columns": (normals(8, 3), 3),
    "square": (normals(9, 9), 9),
    "single": (normals(1, 1), 1),
    "nearly-dependent": (with_rows(A, row3=A[0] + 1e-4 * A[3], row5=A[1] - 1e-5 * A[5]), 9),
    "graded": (A * 2.0 ** -np.arange(9)[:, None], 9),
    "large": (A * 1e15, 9),
    "small": (A * 1e-15, 9),
    "already-orthonormal": (np.eye(6, 600), 6),
}


def factorization_is_right(original, out, rank, weakest, factor, tolerance, working):
    """W = L Q up to the tolerance, Q orthonormal, zeros in the rest."""
    epsilon, n = EPSILON[working], original.shape[1]
    q = out.values[:rank]
    assert np.abs(inner(q, q) - np.eye(rank)).max(initial=0.0) <= 4 * epsilon + 2 * np.sqrt(n) * EPSILON["float64"]
    left = np.linalg.norm((original - product(factor[:, :rank], q)).astype(np.float64), axis=1)
    # rounding of Q for each of the rows, on top of what may be dropped
    rounding = 16 * epsilon * np.linalg.norm(original, axis=1)
    assert (left <= 4 * tolerance + rounding).all()
    assert np.all(out.values[rank:] == 0.0)
    assert np.all(factor[:, rank:] == 0.0)
    assert weakest > tolerance


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("working", WORKING)
@pytest.mark.parametrize("family", FAMILIES)
def test_panel_orthonormalize_factors_every_kind_of_panel(target, family, working, in_place):
    values, wanted_rank = FAMILIES[family]
    w = Panel(values, working)
    original = w.values
    b, n = original.shape
    singular = np.linalg.svd(original, compute_uv=False)
    tolerance = 8 * EPSILON[working] * float(np.linalg.norm(original, axis=1).max())
    if wanted_rank is not None and family not in ("zero", "one-zero-row"):
        tolerance *= 8  # rounding of the given rows to the working precision leaves remainders of its own
    out = w if in_place else unset(b, n, working, padding=1)
    rank, weakest, factor = engine.panel_orthonormalize(w.borrowed, out.borrowed, tolerance, b, None)
    factorization_is_right(original, out, rank, weakest, factor, tolerance, working)
    if wanted_rank is None:
        assert rank >= (singular > 8 * b * tolerance).sum()
        assert rank <= (singular > tolerance / (8 * b)).sum()
    else:
        assert rank == wanted_rank
    w.assert_surroundings_untouched()
    out.assert_surroundings_untouched()


@pytest.mark.parametrize("working", WORKING)
def test_panel_orthonormalize_at_every_width_and_edge(target, working):
    for n in (1, 2, 9, 63, 64, 65, 255, 257, 4095, 4096, 4097):
        for b in range(1, 10):
            w, out = Panel(normals(b, n, b), working), unset(b, n, working, padding=b)
            original = w.values
            tolerance = 64 * EPSILON[working] * float(np.linalg.norm(original, axis=1).max())
            rank, weakest, factor = engine.panel_orthonormalize(w.borrowed, out.borrowed, tolerance, b, None)
            # min(b, n) normal vectors are independent, unless two numbers are all there is to tell them apart
            assert rank == min(b, n) or (n == 2 and rank == 1)
            factorization_is_right(original, out, rank, weakest, factor, tolerance, working)
            w.assert_surroundings_untouched()
            out.assert_surroundings_untouched()


def test_panel_orthonormalize_of_nothing(target):
    for shape in [(0, 5), (3, 0), (0, 0)]:
        w, out = Panel(np.zeros(shape)), unset(*shape)
        rank, weakest, factor = engine.panel_orthonormalize(w.borrowed, out.borrowed, 0.0, shape[0], None)
        assert rank == 0
        assert weakest == np.inf
        assert factor.shape == (shape[0], shape[0])
        assert np.all(factor == 0.0)


@pytest.mark.parametrize("scales", [[1.0, 1e-9, 1e-18, 1e-27], [1e-30, 1.0, 1e30, 1e-3], [1e-120, 1e120, 1.0, 1e-60]])
def test_panel_orthonormalize_of_tiny_and_huge_rows_together(target, scales):
    w = Panel(normals(4, 300) * np.array(scales)[:, None])
    original = w.values
    rank, _, factor = engine.panel_orthonormalize(w.borrowed, w.borrowed, 0.0, 4, None)
    assert rank == 4
    q = w.values
    assert np.abs(q @ q.T - np.eye(4)).max() <= 4 * np.sqrt(300) * EPSILON["float64"]
    left = np.linalg.norm(original - factor @ q, axis=1)
    assert (left <= 16 * EPSILON["float64"] * np.linalg.norm(original, axis=1)).all()


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_panel_orthonormalize_of_float32_rows_that_float32_cannot_square(target, scale):
    w = Panel(normals(3, 300) * scale, "float32")
    rank, weakest, _ = engine.panel_orthonormalize(w.borrowed, w.borrowed, 0.0, 3, None)
    assert rank == 3
    assert np.abs(inner(w.values, w.values) - np.eye(3)).max() <= 4 * EPSILON["float32"]
    assert 0.1 <= weakest / (scale * np.sqrt(300)) <= 2.0


@pytest.mark.parametrize("max_rank", [0, 1, 3])
def test_panel_orthonormalize_keeps_at_most_max_rank_directions(target, max_rank):
    w = Panel(A)
    rank, _, factor = engine.panel_orthonormalize(w.borrowed, w.borrowed, 0.0, max_rank, None)
    assert rank == max_rank
    q = w.values
    assert np.all(q[rank:] == 0.0)
    # what is kept is the projection onto the kept directions
    scale = np.linalg.norm(A, axis=1).max()
    assert np.abs(factor[:, :rank] - A @ q[:rank].T).max(initial=0.0) <= 32 * EPSILON["float64"] * scale


@pytest.mark.parametrize("working", WORKING)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_panel_orthonormalize_names_numbers_that_are_not_finite(target, working, bad):
    for row, column in [(0, 0), (2, 64), (4, 299)]:
        for tolerance in (0.0, 1.0):
            values = normals(5, 300)
            values[row, column] = bad
            w = Panel(values, working)
            with pytest.raises(EngineError, match="non-finite"):
                engine.panel_orthonormalize(w.borrowed, w.borrowed, tolerance, 5, None)
            w.assert_surroundings_untouched()


def test_panel_orthonormalize_names_rows_that_cannot_be_squared(target):
    w = Panel(normals(3, 50) * 1e200)
    with pytest.raises(EngineError, match=r"panel_orthonormalize: "):
        engine.panel_orthonormalize(w.borrowed, w.borrowed, 0.0, 3, None)


def test_panel_orthonormalize_sums_gram_matrices_over_shards(target):
    n, cut, b = 900, 401, 4
    values = normals(b, n)
    whole = Panel(values)
    rank, weakest, factor = engine.panel_orthonormalize(whole.borrowed, whole.borrowed, 0.0, b, None)
    barrier = threading.Barrier(2, timeout=60)
    shared, results = [None, None], [None, None]

    def shard(place):
        w = Panel(values[:, :cut] if place == 0 else values[:, cut:])

        def reduce(sums):
            shared[place] = sums.copy()
            barrier.wait()
            sums[:] = shared[0] + shared[1]
            barrier.wait()

        results[place] = (engine.panel_orthonormalize(w.borrowed, w.borrowed, 0.0, b, reduce), w)

    threads = [threading.Thread(target=shard, args=(place,)) for place in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    q = np.concatenate([w.values for _, w in results], axis=1)
    (left_rank, left_weakest, left), (right_rank, right_weakest, right) = results[0][0], results[1][0]
    assert left_rank == right_rank == rank
    assert left_weakest == right_weakest
    assert np.array_equal(left, right)
    scale = np.linalg.norm(values, axis=1).max()
    assert abs(left_weakest - weakest) <= 32 * EPSILON["float64"] * scale
    assert np.abs(left - factor).max() <= 32 * EPSILON["float64"] * scale
    assert np.abs(q - whole.values).max() <= 32 * EPSILON["float64"]


class ReductionError(Exception):
    pass


def test_an_exception_from_a_reduction_comes_through(target):
    def reduce(sums):
        raise ReductionError

    w = Panel(A)
    with pytest.raises(ReductionError):
        engine.panel_orthonormalize(w.borrowed, w.borrowed, 0.0, 9, reduce)
    w.assert_surroundings_untouched()


# Threads


def digests(threads, target):
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": str(threads),
        "HESD_FAST_TARGET": target,
        "HESD_NATIVE_ENGINE": str(Path(engine.__file__).parent),
        "PYTHONPATH": str(Path(__file__).parents[1] / "support"),
    }
    script = Path(__file__).parent / "native_digests.py"
    done = subprocess.run(
        [sys.executable, str(script)], check=False, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return dict(line.split() for line in done.stdout.splitlines())


@pytest.mark.parametrize("name", [name for name in native_engine.targets() if name != "emulated"])
def test_results_have_the_same_bits_for_any_number_of_threads(name):
    one, two, three = (digests(threads, name) for threads in (1, 2, 3))
    assert [one.pop("threads"), two.pop("threads"), three.pop("threads")] == ["1", "2", "3"]
    assert one.pop("target") == two.pop("target") == three.pop("target") == name
    assert len(one) >= 12
    assert one == two == three


def test_kernels_of_several_python_threads_at_once():
    n = 9000
    v = Panel(integers(5, n, 1), "float32")
    expected = v.values @ v.values.T
    failures = []

    def work(number):
        try:
            for round_ in range(4):
                w = Panel(integers(3, n, number), "float32")
                c = integers(5, 3, round_, largest=1).astype(np.float64)
                wanted = w.values - c.T @ v.values
                engine.panel_project(w.borrowed, v.borrowed, c)
                assert np.array_equal(w.values, wanted)
                assert np.array_equal(engine.panel_gram(v.borrowed, v.borrowed), expected)
                x = unset(2, n, "float32")
                engine.panel_combine(np.ones((2, 5)), v.borrowed, x.borrowed)
                engine.fill_probes(x.borrowed, number, 0, 0, "gaussian")
                w.assert_surroundings_untouched()
                engine.select_target(native_engine.targets()[round_ % len(native_engine.targets())])
        except BaseException as error:
            failures.append(error)

    before = engine.build_info()["cpu_target"]
    threads = [threading.Thread(target=work, args=(number,)) for number in range(3)]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        engine.select_target(before)
    assert failures == []
    v.assert_untouched()
