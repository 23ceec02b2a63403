"""Every kernel, and the sweep made of them, next to the fastest ways that plain PyTorch offers.

    make bench
    .venv/bin/python -m pytest bench -k sweep

Bytes are the ideal column of the kernels' contracts. A competitor with a bfloat16 basis may work in bfloat16
throughout, at bfloat16's accuracy, or convert the basis to float32 piece by piece.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import workloads
from bench_limits import gemm_probes, read_probes
from contest import Contestant, Target
from torch import Tensor

from hesd_fast import kernels
from hesd_fast.engine import reference

STORAGES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
PIECE = 1 << 16
"""Columns that a check converts to float64 at a time."""

CONVERTED = 1 << 13
"""Columns that a competitor converts to float32 at a time: 64 rows of them fit into the cache of a core."""

BATCHED = 4000
"""Columns of one matrix of a batched product."""


@dataclass(frozen=True)
class Rounding:
    """What a contestant may be off by: an entry of a panel, and a sum over n terms, each relative to its scale."""

    entry: float
    total: float


EPSILON = {dtype: torch.finfo(dtype).eps for dtype in STORAGES.values()}
ENGINE = Rounding(4 * EPSILON[torch.float32], 4 * EPSILON[torch.float32])


def rounding(accuracy: torch.dtype, n: int) -> Rounding:
    """Rounding of PyTorch, which sums float32 panels in float32 and loses three digits more over millions of terms."""
    if accuracy is torch.bfloat16:
        return Rounding(4 * EPSILON[accuracy], 4 * EPSILON[accuracy])
    return Rounding(64 * EPSILON[accuracy], 16 * n**0.5 * EPSILON[accuracy])


# Ways to multiply and subtract in plain PyTorch.


@dataclass(frozen=True)
class Way:
    """One way to write the two halves of Gram-Schmidt: C = V W^T (k, b), and W <- W - C^T V in place."""

    gram_name: str
    subtract_name: str
    gram: Callable[[Tensor, Tensor], Tensor]
    subtract: Callable[[Tensor, Tensor, Tensor], object]
    storage: torch.dtype = torch.float32
    accuracy: torch.dtype = torch.float32
    only_one: bool = False

    @property
    def name(self) -> str:
        return f"{self.gram_name}, {self.subtract_name}"

    @property
    def group(self) -> str:
        return f"PyTorch, {str(self.storage).removeprefix('torch.')} basis"

    def rounding(self, n: int) -> Rounding:
        return rounding(self.accuracy, n)


def _addmm(w, v, c):
    return w.addmm_(c.T, v, alpha=-1)


def _one_by_one_gram(v, w):
    return torch.stack([torch.mv(v, row) for row in w], dim=1)


def _one_by_one_subtract(w, v, c):
    for row, coefficients in zip(w, c.T.contiguous(), strict=True):
        row.addmv_(v.T, coefficients, alpha=-1)


def _loop_gram(v, w):
    return torch.stack([torch.dot(row, w[0]) for row in v])[:, None]


def _loop_subtract(w, v, c):
    for row, coefficient in zip(v, c[:, 0].tolist(), strict=True):
        w[0].add_(row, alpha=-coefficient)


def _batched_gram(v, w):
    whole = v.shape[1] // BATCHED * BATCHED
    left = v[:, :whole].unflatten(1, (-1, BATCHED)).transpose(0, 1)
    right = w[:, :whole].unflatten(1, (-1, BATCHED)).permute(1, 2, 0)
    return torch.bmm(left, right).sum(0) + v[:, whole:] @ w[:, whole:].T


def _converted_gram(v, w):
    pieces = zip(v.split(CONVERTED, dim=1), w.split(CONVERTED, dim=1), strict=True)
    return sum(piece.float() @ columns.T for piece, columns in pieces)


def _converted_subtract(w, v, c):
    for piece, columns in zip(v.split(CONVERTED, dim=1), w.split(CONVERTED, dim=1), strict=True):
        columns.addmm_(c.T, piece.float(), alpha=-1)


WAYS = [
    Way("V @ W.T", "addmm_", lambda v, w: v @ w.T, _addmm),
    Way("(W @ V.T).T", "addmm_", lambda v, w: (w @ v.T).T, _addmm),
    Way("mv for each vector", "addmv_", _one_by_one_gram, _one_by_one_subtract),
    Way("bmm over pieces of columns", "addmm_", _batched_gram, _addmm),
    Way("dot for each pair", "add_", _loop_gram, _loop_subtract, only_one=True),
    Way("mm of pieces as float32", "addmm_", _converted_gram, _converted_subtract, storage=torch.bfloat16),
    Way(
        "mm of bfloat16",
        "mm of bfloat16 and sub_",
        lambda v, w: (v @ w.bfloat16().T).float(),
        lambda w, v, c: w.sub_(c.T.bfloat16() @ v),
        storage=torch.bfloat16,
        accuracy=torch.bfloat16,
    ),
]


def ways(storages, block):
    return [way for way in WAYS if way.storage in storages and (block == 1 or not way.only_one)]


# Inputs, and the truth in float64.


@dataclass
class Panels:
    """A nearly orthonormal basis in both storages, and a panel that has about half of its length inside its span."""

    basis: dict[torch.dtype, Tensor]
    original: Tensor

    @property
    def length(self) -> int:
        return self.original.shape[1]

    @classmethod
    def make(cls, n: int, k: int, block: int) -> Panels:
        generator = torch.Generator().manual_seed(n + k + block)
        basis = kernels.empty_panel(k, n)
        basis.normal_(generator=generator).mul_(n**-0.5)
        original = kernels.empty_panel(block, n)
        original.normal_(generator=generator)
        inside = torch.randn(block, k, generator=generator) * (n / k) ** 0.5
        original.addmm_(inside, basis)
        low = kernels.empty_panel(k, n, torch.bfloat16)
        low.copy_(basis)
        return cls({torch.float32: basis, torch.bfloat16: low}, original)

    def about(self, storage: str) -> str:
        (k, n), block = self.basis[torch.float32].shape, len(self.original)
        return f"n = {n:,}, k = {k}, b = {block}, {storage} basis"

    def work(self) -> tuple[Tensor, Callable[[], object]]:
        """Return a panel of its own for one contestant, and what restores it."""
        work = kernels.empty_panel(*self.original.shape)
        work.copy_(self.original)
        return work, lambda: work.copy_(self.original)


@pytest.fixture(scope="module")
def panels(request, sizes):
    length, block = request.param
    n = sizes.panel_lengths[block] if length == "long" else sizes.kernel_length
    return Panels.make(n, sizes.basis, block)


def blocks(length, *sizes):
    return pytest.mark.parametrize(
        "panels", [(length, block) for block in sizes], ids=[f"b{block}" for block in sizes], indirect=True
    )


both_storages = pytest.mark.parametrize("storage", STORAGES)


def exact_gram(v, w):
    pieces = zip(v.split(PIECE, dim=1), w.split(PIECE, dim=1), strict=True)
    return sum(a.double() @ b.double().T for a, b in pieces)


def exact_combination(s, v):
    """``S @ V`` in float64."""
    return torch.cat([s @ piece.double() for piece in v.split(PIECE, dim=1)], dim=1)


def exact_sweep(v, w):
    """``(I - V^T V)^2 W`` in float64: what classical Gram-Schmidt gives when it is done twice."""
    w = w.double()
    for _ in range(2):
        w = w - exact_combination(exact_gram(v, w).T, v)
    return w


def assert_near(got, truth, relative, scale):
    """Every entry of a matrix or panel within ``relative * scale``."""
    assert got.shape == truth.shape
    error = max(float((a - b).abs().max()) for a, b in zip(got, truth, strict=True))
    assert error <= relative * scale, f"off by {error:.3g}, allowed {relative * scale:.3g}"


def lengths_of(v, w):
    """Largest product of the norms of a vector of each panel."""
    return float(v.norm(dim=1, dtype=torch.float32).max() * w.norm(dim=1).max())


def gigaflops(panels, products):
    """Arithmetic of products of the whole basis with the panel."""
    (k, n), block = panels.basis[torch.float32].shape, len(panels.original)
    return 2e-9 * n * k * block * products


def gigabytes(tensor):
    return 1e-9 * tensor.numel() * tensor.element_size()


def read_limits(panels):
    basis = panels.basis[torch.float32]
    return read_probes(basis if basis.is_contiguous() else basis.clone(memory_format=torch.contiguous_format))


def limits(panels, sizes):
    """Reading the basis; for a block, which is as much arithmetic as traffic, matrix products as well."""
    return read_limits(panels) + (gemm_probes(sizes.gemm // 2) if len(panels.original) > 1 else [])


# The benches.

SWEEP_TARGETS = {
    (1, "float32"): [Target("ratio to PyTorch, float32 basis", 1.7), Target("share of read bandwidth", 0.85)],
    (1, "bfloat16"): [Target("ratio to PyTorch, float32 basis", 2.8)],
    (8, "float32"): [Target("ratio to PyTorch, float32 basis", 5.0)],
    (8, "bfloat16"): [Target("ratio to PyTorch, float32 basis", 5.0)],
}


@both_storages
@blocks("long", 1, 4, 8)
def test_sweep(hold, sizes, panels, storage):
    """One orthogonalization by classical Gram-Schmidt done twice."""
    storage_type = STORAGES[storage]
    truth = {kind: exact_sweep(panels.basis[kind], panels.original) for kind in {torch.float32, storage_type}}
    scale = float(panels.original.abs().max())

    def contestant(name, sweep, kind, rounding, group):
        basis = panels.basis[kind]
        work, restore = panels.work()
        return Contestant(
            name,
            lambda: sweep(work, basis),
            lambda result: assert_near(result, truth[kind], rounding.entry, scale),
            group,
            restore,
        )

    def engine(work, basis):
        first = kernels.panel_gram(basis, work)
        second, _ = kernels.panel_project(work, basis, first, self_gram=False)
        kernels.panel_project(work, basis, second, gram=False)
        return work

    def pytorch(way):
        def sweep(work, basis):
            for _ in range(2):
                way.subtract(work, basis, way.gram(basis, work))
            return work

        return contestant(way.name, sweep, way.storage, way.rounding(panels.length), way.group)

    block = len(panels.original)
    hold(
        contestant("panel_gram, panel_project, panel_project", engine, storage_type, ENGINE, "engine"),
        [pytorch(way) for way in ways({torch.float32, storage_type}, block)],
        sizes.rounds if block == 1 else sizes.long_rounds,
        about=f"{panels.about(storage)}; bytes: three reads of the basis",
        limits=limits(panels, sizes),
        gigabytes=3 * gigabytes(panels.basis[storage_type]),
        gigaflops=gigaflops(panels, 4),
        targets=SWEEP_TARGETS.get((block, storage), ()),
    )


@both_storages
@blocks("short", 1, 8)
def test_panel_gram(hold, sizes, panels, storage):
    kind = STORAGES[storage]
    basis, work = panels.basis[kind], panels.original
    truth = exact_gram(basis, work)
    scale = lengths_of(basis, work)

    def contestant(name, gram, rounding, group):
        return Contestant(
            name, lambda: gram(basis, work), lambda got: assert_near(got, truth, rounding.total, scale), group
        )

    hold(
        contestant("panel_gram", kernels.panel_gram, ENGINE, "engine"),
        [
            contestant(way.gram_name, way.gram, way.rounding(panels.length), way.group)
            for way in ways({kind}, len(work))
        ],
        sizes.short_rounds,
        about=panels.about(storage),
        limits=limits(panels, sizes),
        gigabytes=gigabytes(basis) + gigabytes(work),
        gigaflops=gigaflops(panels, 1),
    )


@both_storages
@blocks("short", 1, 8)
def test_panel_project(hold, sizes, panels, storage):
    """The update, and the Gram matrices of what it leaves."""
    kind = STORAGES[storage]
    basis, original = panels.basis[kind], panels.original
    coefficients = exact_gram(basis, original)
    truth = original.double() - exact_combination(coefficients.T, basis)
    gram, self_gram = exact_gram(basis, truth), exact_gram(truth, truth)
    scale = float(original.abs().max())

    def contestant(name, project, rounding, group):
        work, restore = panels.work()

        def check(result):
            assert_near(work, truth, rounding.entry, scale)
            assert_near(result[0], gram, rounding.total, lengths_of(basis, original))
            assert_near(result[1], self_gram, rounding.total, lengths_of(original, original))

        return Contestant(name, lambda: project(work), check, group, restore)

    def pytorch(way):
        c = coefficients.float()

        def project(work):
            way.subtract(work, basis, c)
            return way.gram(basis, work), work @ work.T

        return contestant(f"{way.name}, W @ W.T", project, way.rounding(panels.length), way.group)

    hold(
        contestant("panel_project", lambda work: kernels.panel_project(work, basis, coefficients), ENGINE, "engine"),
        [pytorch(way) for way in ways({kind}, len(original))],
        sizes.short_rounds,
        about=panels.about(storage),
        limits=limits(panels, sizes),
        gigabytes=gigabytes(basis) + 2 * gigabytes(original),
        gigaflops=gigaflops(panels, 2),
    )


@both_storages
@blocks("short", 8)
def test_panel_combine(hold, sizes, panels, storage):
    """As many Ritz vectors as the block is wide."""
    kind = STORAGES[storage]
    basis, count = panels.basis[kind], len(panels.original)
    coefficients = torch.randn(count, len(basis), dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    truth = exact_combination(coefficients, basis)
    scale = float(truth.abs().max())

    def contestant(name, combine, accuracy=torch.float32, group="PyTorch"):
        relative = ENGINE.entry if group == "engine" else rounding(accuracy, panels.length).entry
        out = kernels.empty_panel(count, basis.shape[1])

        def run():
            combine(out)
            return out

        return Contestant(name, run, lambda got: assert_near(got, truth, relative, scale), group)

    def converted(out):
        for piece, columns in zip(basis.split(CONVERTED, dim=1), out.split(CONVERTED, dim=1), strict=True):
            columns.copy_(single @ piece.float())

    single, low = coefficients.float(), coefficients.bfloat16()
    competitors = [contestant("mm into out", lambda out: torch.mm(single, basis, out=out))]
    if kind is torch.bfloat16:
        competitors = [
            contestant("mm of pieces as float32", converted),
            contestant("mm of bfloat16, copy_", lambda out: out.copy_(low @ basis), torch.bfloat16),
        ]
    hold(
        contestant("panel_combine", lambda out: kernels.panel_combine(coefficients, basis, out), group="engine"),
        competitors,
        sizes.short_rounds,
        about=f"{panels.about(storage).replace('b =', 'r =')}",
        limits=limits(panels, sizes),
        gigabytes=gigabytes(basis) + gigabytes(panels.original),
        gigaflops=gigaflops(panels, 1),
    )


@blocks("short", 8)
def test_panel_orthonormalize(hold, sizes, panels):
    original = panels.original
    block, n = original.shape
    longest = float(original.abs().max())

    def contestant(name, orthonormalize, group):
        relative = (ENGINE if group == "engine" else rounding(torch.float32, n)).total
        work, restore = panels.work()

        def check(result):
            q, factor = result
            assert_near(exact_gram(q, q), torch.eye(block, dtype=torch.float64), relative, 1.0)
            assert_near(exact_combination(factor.double(), q), original, relative, longest)

        return Contestant(name, lambda: orthonormalize(work), check, group, restore)

    def engine(work):
        return work, kernels.panel_orthonormalize(work).factor

    def householder(work):
        # In float32 its R is off by half a percent at two million rows.
        q, r = torch.linalg.qr(work.T.double())
        return q.T.float(), r.T

    def cholesky_twice(work, solve, dtype):
        work, factor = work.to(dtype), torch.eye(block, dtype=dtype)
        for _ in range(2):
            lower = torch.linalg.cholesky(work @ work.T)
            work, factor = solve(lower, work), factor @ lower
        return work.float(), factor

    def substitution(lower, work):
        return torch.linalg.solve_triangular(lower, work, upper=False)

    def inverse(lower, work):
        return torch.linalg.inv(lower) @ work

    single, double = "PyTorch, float32", "PyTorch, float64 inside"
    hold(
        contestant("panel_orthonormalize", engine, "engine"),
        [
            contestant("qr", householder, double),
            *(
                contestant(f"Cholesky QR twice, {name}", lambda w, s=solve, d=dtype: cholesky_twice(w, s, d), group)
                for name, solve in (("solve_triangular", substitution), ("inv and mm", inverse))
                for dtype, group in ((torch.float32, single), (torch.float64, double))
            ),
        ],
        sizes.short_rounds,
        about=f"n = {n:,}, b = {block}, float32, in place",
        limits=read_limits(panels),
        # Read twice, written once, and stored once.
        gigabytes=4 * gigabytes(original),
        gigaflops=8e-9 * n * block**2,
    )


@pytest.mark.parametrize("kind", ["rademacher", "gaussian"])
@blocks("short", 8)
def test_fill_probes(hold, sizes, panels, kind):
    """Probes that depend on seed, probe and index alone, next to PyTorch's own generator."""
    n, rows = panels.original.shape[1], len(panels.original)
    seed = 17

    def check_bits(out):
        for first in (0, n - min(n, 1000)):
            wanted = torch.empty(rows, n - first if first else min(n, 1000))
            reference.fill_probes(wanted, seed, first_index=first, kind=kind)
            assert torch.equal(out[:, first : first + wanted.shape[1]], wanted), "not the bits of the reference"
        check_moments(out)

    def check_moments(out):
        count = out.numel()
        mean, square = float(out.double().mean()), float(out.double().square().mean())
        # six standard deviations; the square of a standard normal has variance 2
        assert abs(mean) <= 6 * count**-0.5
        assert abs(square - 1) <= (6 * (2 / count) ** 0.5 if kind == "gaussian" else 0.0)

    def contestant(name, fill, check=check_moments, group="PyTorch"):
        out = kernels.empty_panel(rows, n)

        def run():
            fill(out)
            return out

        return Contestant(name, run, check, group)

    if kind == "gaussian":
        competitors = [
            contestant("normal_", lambda out: out.normal_()),
            contestant("torch.randn, copy_", lambda out: out.copy_(torch.randn(rows, n))),
        ]
    else:
        competitors = [
            contestant("bernoulli_, mul_, sub_", lambda out: out.bernoulli_(0.5).mul_(2).sub_(1)),
            contestant("random_(2), mul_, sub_", lambda out: out.random_(2).mul_(2).sub_(1)),
            contestant("randint, mul, sub, copy_", lambda out: out.copy_(torch.randint(2, (rows, n)) * 2 - 1)),
        ]
    hold(
        contestant(
            "fill_probes", lambda out: kernels.fill_probes(out, seed, kind=kind), check=check_bits, group="engine"
        ),
        competitors,
        sizes.short_rounds,
        about=f"n = {n:,}, b = {rows}, float32, {kind}",
        limits=read_limits(panels),
        gigabytes=gigabytes(panels.original),
    )


@pytest.mark.parametrize("compensated", [False, True], ids=["plain", "compensated"])
@blocks("short", 8)
def test_accumulate_hvp(hold, sizes, panels, compensated):
    """One batch's products of all the parameters of gpt-s, for a block of vectors."""
    counts = [parameter.numel() for parameter in workloads.build("gpt-s", 1).model.parameters()]
    rows, n = len(panels.original), sum(counts)
    offsets = [sum(counts[:i]) for i in range(len(counts))]
    generator = torch.Generator().manual_seed(0)
    parts = [torch.randn(rows, count, generator=generator) for count in counts]
    original = torch.randn(rows, n, generator=generator)
    alpha = 0.25  # a power of two, so that the truth is one rounded addition
    added = alpha * torch.cat(parts, dim=1).double()
    truth = original.double() + added
    largest = float(truth.abs().max())

    def contestant(name, accumulate, group="PyTorch"):
        out, compensation = kernels.empty_panel(rows, n), kernels.empty_panel(rows, n)
        views = [out[:, offset : offset + count] for offset, count in zip(offsets, counts, strict=True)]
        lost = [compensation[:, offset : offset + count] for offset, count in zip(offsets, counts, strict=True)]

        def restore():
            out.copy_(original)
            compensation.zero_()

        def run():
            accumulate(out, compensation, views, lost)
            return out

        def check(got):
            assert_near(got, truth, EPSILON[torch.float32], largest)
            if compensated:
                # the error of one addition is a float32 itself
                assert_near(got.double() + compensation.double(), truth, 4 * torch.finfo(torch.float64).eps, largest)

        return Contestant(name, run, check, group, restore)

    def engine(out, compensation, _views, _lost):
        kernels.accumulate_hvp(out, parts, offsets, alpha, compensation if compensated else None)

    def one_by_one(_out, _compensation, views, _lost):
        for view, part in zip(views, parts, strict=True):
            view.add_(part, alpha=alpha)

    def all_at_once(_out, _compensation, views, _lost):
        torch._foreach_add_(views, parts, alpha=alpha)

    def two_sum(_out, _compensation, views, lost):
        for view, part, error in zip(views, parts, lost, strict=True):
            term = alpha * part
            total = view + term
            shared = total - view
            error.add_((view - (total - shared)) + (term - shared))
            view.copy_(total)

    competitors = (
        [contestant("two-sum in tensor operations", two_sum)]
        if compensated
        else [contestant("add_ for each tensor", one_by_one), contestant("torch._foreach_add_", all_at_once)]
    )
    hold(
        contestant("accumulate_hvp", engine, "engine"),
        competitors,
        sizes.short_rounds,
        about=f"{len(counts)} tensors, n = {n:,}, b = {rows}, float32",
        limits=read_limits(panels),
        gigabytes=(5 if compensated else 3) * gigabytes(original),
    )
