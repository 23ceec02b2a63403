"""Every kernel against its reference at awkward sizes: on every instruction set of this machine, as CUDA sources that
are emulated on the CPU, and on a GPU where there is one (`pytest -m cuda`)."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from emulation import use_emulated_engine

from hesd_fast import kernels
from hesd_fast.engine import _engine, reference
from hesd_fast.errors import EngineError, NumericalError

WORKING = [torch.float64, torch.float32]
STORAGE = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
# 1, tile edges +-1, the chunk edge +-1, several chunks
LENGTHS = [1, 2, 7, 8, 9, 63, 64, 65, 4095, 4096, 4097, 13_001]
SHAPES = [(1, 1), (3, 1), (4, 2), (5, 3), (9, 8), (17, 5)]


class Target:
    """The kernels; on a GPU they get copies of the panels, and what they did to those is copied back."""

    def __init__(self, device=None):
        self._device = device

    def __getattr__(self, name):
        kernel = getattr(kernels, name)
        return kernel if self._device is None else partial(self._run, kernel)

    def _run(self, kernel, *arguments, **options):
        moved = {}

        def move(argument):
            if isinstance(argument, list):
                return [move(part) for part in argument]
            if not isinstance(argument, torch.Tensor):
                return argument
            if id(argument) not in moved:
                copy = kernels.empty_panel(*argument.shape, argument.dtype, self._device)
                moved[id(argument)] = argument, copy.copy_(argument)
            return moved[id(argument)][1]

        found = kernel(*map(move, arguments), **{name: move(option) for name, option in options.items()})
        for original, copy in moved.values():
            original.copy_(copy)
        return found


CPU_TARGETS = _engine.build_info()["cpu_targets_available"]


COMPILED = [*CPU_TARGETS, "emulated", pytest.param("cuda", marks=pytest.mark.cuda)]


@pytest.fixture(params=COMPILED)
def compiled(request, monkeypatch):
    """Kernels that are compared with their references."""
    yield from kernels_of(request.param, monkeypatch)


@pytest.fixture(params=["reference", *COMPILED])
def target(request, monkeypatch):
    """Kernels that are checked by what they have to do, and so are the references."""
    yield from kernels_of(request.param, monkeypatch)


def kernels_of(name, monkeypatch):
    if name == "cuda":
        if not (_engine.build_info()["cuda"] and torch.cuda.is_available()):
            pytest.skip("no GPU, or a build without CUDA kernels")
        yield Target("cuda")
    elif name == "reference":
        yield reference
    elif name == "emulated":
        use_emulated_engine(monkeypatch)
        yield Target()
    else:
        before = _engine.build_info()["cpu_target"]
        kernels.select_target(name)
        yield Target()
        kernels.select_target(before)


def panel(rows, columns, dtype, seed=0, padded=True):
    values = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed + rows * 7919 + columns))
    if not padded:
        return values.to(dtype)
    out = kernels.empty_panel(rows, columns, dtype)
    out.copy_(values)
    return out


def epsilon(dtype):
    return torch.finfo(dtype).eps


def loss_of_orthogonality(q):
    return (q @ q.T - torch.eye(q.shape[0], dtype=q.dtype)).abs().max()


def orthogonality_bound(working, n):
    """Rounding Q to the working precision, plus float64 sums of n terms."""
    return 4 * epsilon(working) + np.sqrt(n) * epsilon(torch.float64)


def arithmetic(storage, working):
    """Epsilon of what the kernels compute in."""
    return epsilon(torch.float64 if torch.float64 in (storage, working) else torch.float32)


def gram_rounding(storage, working, n):
    """Rounding of an inner product, relative to the norms: runs of 64 products in the arithmetic, then float64."""
    return 2 * arithmetic(storage, working) + np.sqrt(n) * epsilon(torch.float64)


def rounding(storage, working, terms):
    """Bound on a sum of so many products and its reference in float64, both then rounded to the working precision."""
    return epsilon(working) + (terms + 3) * arithmetic(storage, working)


@pytest.mark.parametrize("n", LENGTHS)
@pytest.mark.parametrize("storage", STORAGE)
@pytest.mark.parametrize("working", WORKING)
def test_panel_gram_matches_its_reference(compiled, n, storage, working):
    for k, b in SHAPES:
        v, w = panel(k, n, storage), panel(b, n, working, seed=1)
        gram = compiled.panel_gram(v, w)
        scale = v.double().norm(dim=1)[:, None] * w.double().norm(dim=1)[None, :]
        assert gram.shape == (k, b)
        # runs of 64 products and a few more sums
        assert ((gram - reference.panel_gram(v, w)).abs() <= 4 * gram_rounding(storage, working, n) * scale).all()


@pytest.mark.parametrize("n", LENGTHS)
@pytest.mark.parametrize("storage", STORAGE)
@pytest.mark.parametrize("working", WORKING)
def test_panel_project_matches_its_reference(compiled, n, storage, working):
    for k, b in SHAPES:
        gram_only = n % (k + 1)
        v, w = panel(k, n, storage), panel(b, n, working, seed=1)
        c = torch.randn(k - gram_only, b, dtype=torch.float64, generator=torch.Generator().manual_seed(k))
        expected = w.clone()
        reference.panel_project(expected, v, c, gram_only=gram_only)
        before = v.clone()
        gram, self_gram = compiled.panel_project(w, v, c, gram_only=gram_only)
        size = w.double().abs() + c.T.abs() @ v[gram_only:].double().abs()
        assert ((w.double() - expected.double()).abs() <= rounding(storage, working, k) * size).all()
        # the Gram matrices are those of the W that was stored
        scale = v.double().norm(dim=1)[:, None] * w.double().norm(dim=1)[None, :]
        assert ((gram - reference.panel_gram(v, w)).abs() <= 4 * gram_rounding(storage, working, n) * scale).all()
        torch.testing.assert_close(
            self_gram, reference.panel_gram(w, w), rtol=1e-12, atol=1e-13 * n * float(size.max()) ** 2
        )
        assert torch.equal(v, before)


@pytest.mark.parametrize("n", LENGTHS)
@pytest.mark.parametrize("storage", STORAGE)
@pytest.mark.parametrize("working", STORAGE)
def test_panel_combine_matches_its_reference(compiled, n, storage, working):
    for k, r in SHAPES:
        v, x = panel(k, n, storage), panel(r, n, working, seed=1)
        s = torch.randn(r, k, dtype=torch.float64, generator=torch.Generator().manual_seed(k))
        expected = torch.empty_like(x)
        reference.panel_combine(s, v, expected)
        compiled.panel_combine(s, v, x)
        size = s.abs() @ v.double().abs()
        tiny = 2.0**-24 if working == torch.float16 else 0.0  # the step of its subnormal numbers
        assert ((x.double() - expected.double()).abs() <= rounding(storage, working, k) * size + tiny).all()


@pytest.mark.parametrize("working", WORKING)
@pytest.mark.parametrize("compensated", [False, True])
def test_accumulate_hvp_matches_its_reference_bit_for_bit(compiled, working, compensated):
    lengths = [1, 0, 16_383, 16_384, 16_385, 5]
    offsets = [3, 4, 10, 16_500, 40_000, 60_000]
    for b in (1, 3):
        out = panel(b, 60_010, working)
        compensation = torch.zeros_like(out) if compensated else None
        dtypes = [d for d in STORAGE if epsilon(d) >= epsilon(working)]
        parts = [panel(b, length, dtypes[i % len(dtypes)], seed=i) for i, length in enumerate(lengths)]
        expected, errors = out.clone(), None if compensation is None else compensation.clone()
        for _ in range(3):
            compiled.accumulate_hvp(out, parts, offsets, 0.3, compensation)
            reference.accumulate_hvp(expected, parts, offsets, 0.3, errors)
        assert torch.equal(out, expected)
        if compensation is not None:
            assert torch.equal(compensation, errors)
            assert compensation.abs().sum() > 0


@pytest.mark.parametrize("count", [32, 33, 512, 513, 1100])
def test_accumulate_hvp_takes_any_number_of_parts(compiled, count):
    # CUDA launches take 32 or 512 at a time
    out = panel(2, 3 * count + 5, torch.float32)
    parts = [panel(2, 1 + i % 3, torch.float32, seed=i) for i in range(count)]
    offsets = [3 * i + 2 for i in range(count)]
    expected = out.clone()
    compiled.accumulate_hvp(out, parts, offsets, 0.7)
    reference.accumulate_hvp(expected, parts, offsets, 0.7)
    assert torch.equal(out, expected)


@pytest.mark.parametrize("storage", STORAGE)
@pytest.mark.parametrize("working", WORKING)
@pytest.mark.parametrize("k", [299, 310, 600])
def test_many_rows_are_projected_as_few_are(compiled, k, storage, working):
    # where the sums of a CUDA block leave its shared memory
    v, w = panel(k, 530, storage), panel(8, 530, working, seed=1)
    c = torch.randn(k, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(k)) / k
    expected = w.clone()
    wanted, _ = reference.panel_project(expected, v, c)
    gram, _ = compiled.panel_project(w, v, c)
    size = expected.double().abs() + c.T.abs() @ v.double().abs()
    assert ((w.double() - expected.double()).abs() <= rounding(storage, working, k) * size).all()
    scale = v.double().norm(dim=1)[:, None] * size.norm(dim=1)[None, :]
    assert ((gram - wanted).abs() <= (rounding(storage, working, k) + arithmetic(storage, working)) * scale).all()


def test_compensation_recovers_what_float32_loses(target):
    out, compensation = torch.ones(1, 1), torch.zeros(1, 1)
    for _ in range(1000):
        target.accumulate_hvp(out, [torch.ones(1, 1)], [0], 2.0**-26, compensation)
    assert out.item() == 1.0  # 2**-26 is below float32's spacing at 1
    assert (out.double() + compensation.double()).item() == 1.0 + 1000 * 2.0**-26


def test_accumulate_hvp_without_parts_is_a_no_op(target):
    out = torch.ones(2, 3)
    target.accumulate_hvp(out, [], [])
    assert torch.equal(out, torch.ones(2, 3))


@pytest.mark.parametrize("working", WORKING)
@pytest.mark.parametrize("n", [8, 65, 4097])
def test_panel_orthonormalize_gives_an_orthonormal_factorization(target, n, working):
    for b in (1, 2, 5, 8):
        w = panel(b, n, working)
        original = w.clone()
        out = torch.full_like(w, 7.0)
        factor, rank, weakest = target.panel_orthonormalize(w, out)
        q = out[:rank].double()
        assert rank == b
        assert loss_of_orthogonality(q) <= orthogonality_bound(working, n)
        residual = (original.double() - factor @ q).norm()
        assert residual <= 8 * epsilon(working) * original.double().norm()
        assert 0 < weakest <= original.double().norm(dim=1).max() * (1 + 1e-12)


@pytest.mark.parametrize("working", WORKING)
def test_panel_orthonormalize_drops_dependent_and_zero_vectors(target, working):
    w = panel(6, 500, working)
    w[2] = w[0] - 2 * w[1]
    w[3] = 0
    w[5] = w[4]
    original = w.clone()
    factor, rank, _ = target.panel_orthonormalize(w)
    assert rank == 3
    q = w[:rank].double()
    assert loss_of_orthogonality(q) <= orthogonality_bound(working, 500)
    assert (original.double() - factor @ q).norm() <= 64 * epsilon(working) * original.double().norm()
    assert torch.equal(w[rank:], torch.zeros_like(w[rank:]))


@pytest.mark.parametrize("working", WORKING)
@pytest.mark.parametrize("ratio", [1e-2, 1e-4, 1e-5])
def test_panel_orthonormalize_keeps_weak_directions_above_the_tolerance(target, working, ratio):
    w = panel(4, 1000, working)
    w[3] = w[0] + ratio * w[3]
    original = w.clone()
    factor, rank, weakest = target.panel_orthonormalize(w)
    assert rank == 4
    q = w.double()
    assert loss_of_orthogonality(q) <= orthogonality_bound(working, 1000)
    assert (original.double() - factor @ q).norm() <= 16 * epsilon(working) * original.double().norm()
    smallest = torch.linalg.svdvals(original.double())[-1]
    assert smallest * 0.99 <= weakest <= 4 * smallest


@pytest.mark.parametrize("scales", [[1.0, 1e-9, 1e-18, 1e-27], [1e-30, 1.0, 1e30, 1e-3]])
def test_panel_orthonormalize_is_indifferent_to_row_scaling(target, scales):
    w = panel(4, 300, torch.float64) * torch.tensor(scales, dtype=torch.float64)[:, None]
    w = w.contiguous()
    factor, rank, _ = target.panel_orthonormalize(w, tolerance=0.0)
    assert rank == 4
    assert loss_of_orthogonality(w) <= orthogonality_bound(torch.float64, 300)
    assert np.allclose(np.asarray(factor.norm(dim=1)), np.asarray(scales) * 300**0.5, rtol=0.3)


def test_panel_orthonormalize_keeps_at_most_max_rank_directions(target):
    w = panel(4, 50, torch.float64)
    original = w.clone()
    factor, rank, _ = target.panel_orthonormalize(w, max_rank=2)
    assert rank == 2
    # what is kept is the projection onto the kept directions
    torch.testing.assert_close(factor, original @ w[:2].T, rtol=0, atol=1e-13)


def test_panel_orthonormalize_names_non_finite_input(target):
    for bad in (float("nan"), float("inf")):
        w = panel(3, 40, torch.float32)
        w[1, 7] = bad
        with pytest.raises(NumericalError, match="non-finite"):
            target.panel_orthonormalize(w)
        w[1, 7] = bad
        with pytest.raises(NumericalError, match="non-finite"):
            target.panel_orthonormalize(w, tolerance=0.0)


# Known answers of Philox 4x32-10, from the kat_vectors file of Random123 1.14.
PHILOX_ANSWERS = [
    ([0, 0, 0, 0], [0, 0], [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    (
        [0xFFFFFFFF] * 4,
        [0xFFFFFFFF] * 2,
        [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD],
    ),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]


@pytest.mark.parametrize(("counter", "key", "answer"), PHILOX_ANSWERS)
def test_philox_known_answers(counter, key, answer):
    assert reference.philox(torch.tensor(counter), (key[0], key[1])).tolist() == answer


def test_fill_probes_first_known_answer(target):
    # counter (0, 0, 0, 0), key (0, 0): the first 128 signs are the bits of the first known answer
    out = torch.empty(1, 128)
    target.fill_probes(out, seed=0)
    words = [sum(int(out[0, 32 * w + bit] > 0) << bit for bit in range(32)) for w in range(4)]
    assert words == PHILOX_ANSWERS[0][2]


@pytest.mark.parametrize("kind", ["rademacher", "gaussian"])
@pytest.mark.parametrize("working", WORKING)
def test_fill_probes_matches_its_reference_bit_for_bit(compiled, kind, working):
    for seed, probe, index, n in [(0, 0, 0, 1), (7, 3, 5, 1000), (2**64 - 1, 2**32 - 3, 2**40 + 77, 17_000)]:
        out, expected = torch.empty(2, n, dtype=working), torch.empty(2, n, dtype=working)
        compiled.fill_probes(out, seed, first_probe=probe, first_index=index, kind=kind)
        reference.fill_probes(expected, seed, probe, index, kind)
        assert torch.equal(out, expected)


@pytest.mark.parametrize("kind", ["rademacher", "gaussian"])
def test_fill_probes_is_the_same_for_any_split(target, kind):
    whole = torch.empty(3, 5000)
    target.fill_probes(whole, 11, kind=kind)
    for cut in (1, 127, 128, 129, 3333):
        left, right = torch.empty(3, cut), torch.empty(3, 5000 - cut)
        target.fill_probes(left, 11, kind=kind)
        target.fill_probes(right, 11, first_index=cut, kind=kind)
        assert torch.equal(torch.cat((left, right), 1), whole)
    row = torch.empty(1, 5000)
    target.fill_probes(row, 11, first_probe=2, kind=kind)
    assert torch.equal(row[0], whole[2])


def test_probes_have_the_moments_they_should(target):
    n = 400_000
    signs, normals = torch.empty(2, n, dtype=torch.float64), torch.empty(2, n, dtype=torch.float64)
    target.fill_probes(signs, 3)
    target.fill_probes(normals, 3, kind="gaussian")
    six_sigma = 6 / n**0.5
    assert set(signs.unique().tolist()) == {-1.0, 1.0}
    assert (signs.mean(1).abs() < six_sigma).all()
    assert abs((signs[0] * signs[1]).mean()) < six_sigma
    assert (normals.mean(1).abs() < six_sigma).all()
    assert ((normals**2).mean(1) - 1).abs().max() < six_sigma * 2**0.5
    assert ((normals**4).mean(1) - 3).abs().max() < six_sigma * 96**0.5
    assert abs((normals[0, 0::2] * normals[0, 1::2]).mean()) < six_sigma * 2**0.5


@pytest.mark.parametrize("working", WORKING)
def test_results_have_the_same_bits_for_any_thread_count(working):
    n = 300_001
    before = torch.get_num_threads()
    results = []
    for threads in (1, 2, 3, 7):
        torch.set_num_threads(threads)
        try:
            v, w = panel(9, n, torch.float32), panel(4, n, working, seed=1)
            gram = kernels.panel_gram(v, w)
            projected = kernels.panel_project(w, v, gram / n)
            factor = kernels.panel_orthonormalize(w)
            x = torch.empty(2, n, dtype=working)
            kernels.panel_combine(torch.ones(2, 9, dtype=torch.float64), v, x)
            probes = torch.empty(2, n, dtype=working)
            kernels.fill_probes(probes, 5, kind="gaussian")
            results.append([gram, *projected, factor.factor, w, x, probes])
        finally:
            torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_numpy_arrays_work_and_return_arrays():
    rng = np.random.default_rng(0)
    v, w = rng.standard_normal((3, 100)), rng.standard_normal((2, 100))
    gram = kernels.panel_gram(v, w)
    assert isinstance(gram, np.ndarray)
    np.testing.assert_allclose(gram, v @ w.T, rtol=1e-13)
    expected = w - gram.T @ v
    kernels.panel_project(w, v, gram)
    np.testing.assert_allclose(w, expected, rtol=1e-12, atol=1e-12)


def test_float16_subnormals_and_extremes_convert_exactly(target):
    bits = np.arange(0, 0x7C00, dtype=np.uint16)
    values = np.concatenate([bits, bits | 0x8000]).view(np.float16)[None, :]
    one = torch.ones(1, 1, dtype=torch.float64)
    out = torch.empty(values.shape)
    target.panel_combine(one, torch.from_numpy(values), out)
    assert np.array_equal(out.numpy(), values.astype(np.float32))
    for special in (np.inf, -np.inf, np.nan):
        row = torch.full((1, 19), special, dtype=torch.float16)
        out = torch.empty((1, 19))
        target.panel_combine(one, row, out)
        assert np.array_equal(out.numpy(), row.float().numpy(), equal_nan=True)


REFUSED = [
    (lambda: kernels.panel_gram(torch.ones(2, 3, dtype=torch.int64), torch.ones(2, 3)), "`V` has dtype int64"),
    (lambda: kernels.panel_gram(torch.ones(2, 3), torch.ones(2, 3).bfloat16()), "`W` has dtype bfloat16"),
    (lambda: kernels.panel_gram(torch.ones(2, 3), torch.ones(2, 4)), "same length"),
    (lambda: kernels.panel_gram(torch.ones(3), torch.ones(2, 3)), "`V` has 1 dimensions"),
    (lambda: kernels.panel_gram(torch.ones(3, 2).T, torch.ones(2, 3)), "`V` has a stride of 2"),
    (lambda: kernels.panel_gram(torch.ones(2, 3, requires_grad=True), torch.ones(2, 3)), "detach"),
    (lambda: kernels.panel_gram([[1.0]], torch.ones(2, 3)), "`V` is a list"),
    (lambda: kernels.panel_gram(torch.ones(1, 3).expand(2, 3), torch.ones(2, 3)), "overlap"),
    (lambda: kernels.panel_project(torch.ones(2, 3), torch.ones(2, 3), torch.ones(3, 2)), "`C` is not a float64"),
    (lambda: kernels.fill_probes(torch.empty(1, 3), 1, kind="uniform"), "`kind` is 'uniform'"),
    (lambda: kernels.fill_probes(torch.empty(1, 3), -1), "`seed` is -1"),
    (lambda: kernels.accumulate_hvp(torch.ones(1, 3), [torch.ones(1, 2)], [2]), "does not fit"),
    (lambda: kernels.accumulate_hvp(torch.ones(1, 3), [torch.ones(1, 2)], [-1]), "does not fit"),
    (lambda: kernels.accumulate_hvp(torch.ones(1, 3), [torch.ones(1, 2)], []), "one offset for each part"),
    (lambda: kernels.accumulate_hvp(torch.ones(1, 3), [torch.ones(1, 2)] * 2, [0, 1]), "overlap at column 1"),
    (lambda: kernels.accumulate_hvp(torch.ones(1, 3), [torch.ones(1, 2).double()], [0]), "higher precision"),
    (lambda: kernels.panel_orthonormalize(torch.ones(2, 3), tolerance=float("nan")), "`tolerance` is"),
    (lambda: kernels.panel_orthonormalize(torch.ones(2, 3), max_rank=-1), "`max_rank` is -1"),
    (lambda: kernels.accumulate_hvp(torch.ones(1, 3), [torch.ones(1, 2)], [0], float("nan")), "`alpha` is nan"),
    (lambda: kernels.fill_probes(torch.empty(1, 3), 1.5), "`seed` is 1.5"),
    (lambda: kernels.fill_probes(torch.empty(2, 3), 1, first_probe=2**32 - 1), "`first_probe` is 4294967295"),
    (lambda: kernels.panel_combine(torch.ones(1, 2) * 1j, torch.ones(2, 3), torch.ones(1, 3)), "dtype complex"),
    (lambda: kernels.select_target("sse9"), "'sse9' is not in this build"),
]


@pytest.mark.parametrize(("call", "message"), REFUSED)
def test_what_cannot_be_used_is_refused_by_name(call, message):
    with pytest.raises(EngineError, match=message):
        call()


def test_overlapping_panels_are_refused():
    memory = torch.ones(4, 10)
    with pytest.raises(EngineError, match="shares memory"):
        kernels.panel_project(memory[1:3], memory[2:4], torch.ones(2, 2))
    with pytest.raises(EngineError, match="shares memory"):
        kernels.panel_combine(torch.ones(1, 2), memory[:2], memory[1:2])


@pytest.mark.parametrize("working", WORKING)
@pytest.mark.parametrize("seed", [1, 2])
def test_panel_orthonormalize_finds_the_rank_of_every_small_panel(target, working, seed):
    # few columns and exact rank 2: nothing but rounding is left of the other rows, in every possible way
    generator = torch.Generator().manual_seed(seed)
    for _ in range(1500):
        b = int(torch.randint(3, 9, (1,), generator=generator))
        n = int(torch.randint(2, 6, (1,), generator=generator))
        scales = 10.0 ** torch.randint(-3, 4, (b, 1), generator=generator).double()
        factors = torch.randn(b, 2, dtype=torch.float64, generator=generator) * scales
        w = (factors @ torch.randn(2, n, dtype=torch.float64, generator=generator)).to(working).contiguous()
        original = w.double().clone()
        tolerance = 64 * epsilon(working) * float(original.norm(dim=1).max())
        factor, rank, weakest = target.panel_orthonormalize(w, tolerance=tolerance)
        assert rank <= 2
        assert weakest > tolerance
        q = w[:rank].double()
        assert loss_of_orthogonality(q) <= orthogonality_bound(working, n)
        assert (original - factor @ q).norm(dim=1).max() <= 4 * tolerance


@pytest.mark.parametrize("rows", [11, 12, 16])
@pytest.mark.parametrize("condition", [33.0, 1e4])
def test_panel_orthonormalize_is_not_fooled_by_many_small_overlaps(target, rows, condition):
    # unit vectors whose overlaps are all about -1 / (rows - 1): small entries, an almost singular Gram matrix
    gram = torch.eye(rows, dtype=torch.float64) * (1 + 1 / (rows - 1)) - 1 / (rows - 1)
    values, vectors = torch.linalg.eigh(gram)
    values[0] = values[-1] / condition**2
    basis, _ = torch.linalg.qr(torch.randn(200, rows, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
    w = ((vectors * values.sqrt()) @ vectors.T @ basis.T).contiguous()
    _, rank, _ = target.panel_orthonormalize(w)
    assert rank == rows
    assert loss_of_orthogonality(w) <= 2 * orthogonality_bound(torch.float64, 200)


@pytest.mark.parametrize("ratio", [3e-2, 3e-4, 3e-5])
def test_a_binding_max_rank_keeps_the_coefficients_accurate(target, ratio):
    generator = torch.Generator().manual_seed(5)
    plane = torch.randn(2, 300, dtype=torch.float64, generator=generator)
    coefficients = torch.randn(5, 2, dtype=torch.float64, generator=generator)
    coefficients[:, 1] *= ratio
    original = coefficients @ plane
    w = original.clone()
    factor, rank, _ = target.panel_orthonormalize(w, max_rank=2)
    assert rank == 2
    assert (original - factor @ w[:2]).norm() <= 16 * epsilon(torch.float64) * original.norm()


def test_a_binding_max_rank_keeps_the_largest_directions(target):
    w = torch.zeros(3, 50, dtype=torch.float64)
    w[0, 0] = 1.0
    w[1, 0], w[1, 1] = 1.0, 1e-6
    w[2, 2] = 1e-9
    factor, rank, weakest = target.panel_orthonormalize(w, max_rank=2)
    assert rank == 2
    assert abs(w[:2, 1]).max() == pytest.approx(1.0)
    assert weakest == pytest.approx(1e-6, rel=1e-6)
    assert abs(factor[2]).max() == 0.0


@pytest.mark.parametrize("working", WORKING)
def test_more_vectors_than_columns_end_without_a_tolerance(target, working):
    for seed in range(12):
        w = torch.randn(6, 3, dtype=working, generator=torch.Generator().manual_seed(seed))
        _, rank, _ = target.panel_orthonormalize(w, tolerance=0.0, max_rank=3)
        assert rank == 3
        assert loss_of_orthogonality(w[:3].double()) <= orthogonality_bound(working, 3)
