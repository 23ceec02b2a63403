"""The compiled block Lanczos: recurrence, orthogonality, known spectra, breakdown, deflation, shards."""

from __future__ import annotations

import dataclasses
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import hesd_fast.lanczos.lanczos_run as lanczos_module
from hesd_fast import kernels
from hesd_fast.engine import _engine
from hesd_fast.errors import EngineError, OperatorError, PlanError, ProblemError
from hesd_fast.lanczos import memory_budget
from hesd_fast.lanczos.drive import LanczosProgress, block_lanczos
from hesd_fast.operators import MatrixOperator

MODES = ["full", "partial", "window", "none"]
DTYPES = [torch.float64, torch.float32]


def matrix_with(eigenvalues, dtype=torch.float64, seed=0):
    n = len(eigenvalues)
    generator = torch.Generator().manual_seed(seed)
    q, _ = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64, generator=generator))
    matrix = (q * torch.as_tensor(eigenvalues, dtype=torch.float64)) @ q.T
    return ((matrix + matrix.T) / 2).to(dtype)


def hessian_like(n=300, seed=0):
    rng = np.random.default_rng(seed)
    return np.concatenate([rng.normal(0, 1e-2, n - 6), [-0.7, -0.2, 1.0, 2.0, 5.0, 10.0]])


class Recorder:
    """Runs the engine by hand and keeps every block, to check the recurrence itself."""

    def __init__(
        self,
        matrix,
        steps,
        block,
        mode="full",
        slots=None,
        seed=0,
        multiple=8.0,
        probes=None,
        storage=None,
        in_place=False,
    ):
        n = matrix.shape[0]
        slots = max(steps - 2, 0) if slots is None else slots
        self.matrix = matrix
        history = kernels.empty_panel(0 if in_place else slots * block, n, matrix.dtype if storage is None else storage)
        self.working = kernels.empty_panel((steps + 1 if in_place else 3) * block, n, matrix.dtype)
        for panel in (history, self.working):
            panel.fill_(float("nan"))  # what was never written must never be read
        self.engine = _engine.BlockLanczos(history, self.working, block, steps, n, mode, multiple, None)
        work = self.working[self.engine.work_row :][:block]
        if probes is None:
            kernels.fill_probes(work, seed)
        else:
            work.copy_(probes)
        self.probes = work.clone()
        self.engine.start()
        self.blocks = []
        while not self.engine.finished:
            row, width = self.engine.current_row, self.engine.current_width
            self.blocks.append(self.working[row : row + width].double().clone())
            self.working[self.engine.work_row :][:width] = self.blocks[-1].to(matrix.dtype) @ matrix
            self.engine.advance()
        following = self.working[self.engine.work_row :][: self.engine.offdiagonal[-1].shape[1]]
        self.following = following.double().clone()
        self.diagonal = [torch.from_numpy(a) for a in self.engine.diagonal]
        self.offdiagonal = [torch.from_numpy(c) for c in self.engine.offdiagonal]

    def recurrence_residual(self):
        blocks = [*self.blocks, self.following]
        worst = 0.0
        for j, a in enumerate(self.diagonal):
            expected = a @ blocks[j] + self.offdiagonal[j] @ blocks[j + 1]
            if j > 0:
                expected = expected + self.offdiagonal[j - 1].T @ blocks[j - 1]
            worst = max(worst, float((blocks[j] @ self.matrix.double() - expected).norm()))
        return worst


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block", [1, 2, 4, 7])
@pytest.mark.parametrize("in_place", [False, True])
def test_recurrence_and_orthogonality(dtype, block, in_place):
    matrix = matrix_with(hessian_like(), dtype)
    run = Recorder(matrix, 20, block, in_place=in_place)
    epsilon = torch.finfo(dtype).eps
    assert run.recurrence_residual() <= 64 * epsilon * 10.0 * block**0.5
    q = torch.cat([*run.blocks, run.following])
    assert (q @ q.T - torch.eye(len(q), dtype=torch.float64)).abs().max() <= 32 * epsilon
    start = torch.from_numpy(run.engine.start_factor)
    assert (start @ run.blocks[0] - run.probes.double()).norm() <= 32 * epsilon * run.probes.double().norm()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("block", [1, 3])
def test_every_mode_keeps_the_recurrence_and_finds_the_extremes(mode, block):
    matrix = matrix_with(hessian_like())
    slots = {"full": 23, "partial": 23, "window": 2, "none": 0}[mode]
    run = Recorder(matrix, 25, block, mode, slots)
    # a sweep takes out overlaps of up to sqrt(epsilon) that the coefficients do not record
    assert run.recurrence_residual() <= (10.0 * 2.0**-25 if mode == "partial" else 1e-12)
    q = torch.cat(run.blocks)
    loss = (q @ q.T - torch.eye(len(q), dtype=torch.float64)).abs().max()
    if mode == "full":
        assert loss <= 1e-13
    elif mode == "partial":
        assert 1e-13 < loss <= 2.0**-26
    else:
        assert loss > 1e-8  # the modes differ in what they are for
    tridiagonal = block_lanczos(matrix, 25, block, reorthogonalization=mode, window=4 * block)
    values, _, residuals = tridiagonal.ritz()
    assert abs(values[-1] - 10.0) <= max(residuals[-1], 1e-9)
    assert abs(values[0] + 0.7) <= max(residuals[0], 1e-6)


@pytest.mark.parametrize("mode", ["full", "partial"])
@pytest.mark.parametrize("block", [1, 4])
def test_a_basis_that_stays_where_it_was_made_is_the_same_basis(mode, block):
    matrix = matrix_with(np.concatenate([np.linspace(1, 2, 6), np.zeros(94)]))  # of rank 6: the last block is narrow
    apart, together = (Recorder(matrix, 6, block, mode, in_place=in_place) for in_place in (False, True))
    assert [len(a) for a in apart.diagonal] == [len(a) for a in together.diagonal]
    for j, (one, other) in enumerate(zip(apart.blocks, together.blocks, strict=True)):
        assert torch.equal(together.working[j * block :][: len(other)], other)
        assert not together.working[j * block + len(other) : (j + 1) * block].any()
        if j < 2:  # later ones differ by rounding that the recurrence amplifies
            assert (one - other).abs().max() <= 1e-12
    assert together.recurrence_residual() <= (2.0 * 2.0**-25 if mode == "partial" else 1e-12)


@pytest.mark.parametrize("block", [1, 2, 5])
def test_all_eigenvalues_when_the_space_is_exhausted(block):
    eigenvalues = np.sort(hessian_like(60))
    tridiagonal = block_lanczos(matrix_with(eigenvalues), steps=60, block_size=block)
    values, _, _ = tridiagonal.ritz()
    assert len(values) == 60
    assert tridiagonal.breakdown
    np.testing.assert_allclose(values, eigenvalues, rtol=0, atol=64 * 2.0**-52 * 10)


@pytest.mark.parametrize("dtype", DTYPES)
def test_breakdown_at_the_first_step(dtype):
    tridiagonal = block_lanczos(torch.eye(50, dtype=dtype) * 3, steps=10, block_size=4)
    assert tridiagonal.steps == 1
    assert tridiagonal.breakdown
    np.testing.assert_allclose(tridiagonal.ritz()[0], 3.0, rtol=8 * torch.finfo(dtype).eps)
    zero = block_lanczos(torch.zeros(50, 50, dtype=dtype), steps=10, block_size=4)
    assert zero.steps == 1
    assert zero.breakdown
    assert np.all(zero.matrix() == 0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_low_rank_breaks_down_in_the_middle_with_all_eigenvalues(dtype):
    eigenvalues = np.zeros(200)
    eigenvalues[:5] = [-2.0, 1.0, 3.0, 5.0, 8.0]
    tridiagonal = block_lanczos(matrix_with(eigenvalues, dtype), steps=50, block_size=2)
    values, _, _ = tridiagonal.ritz()
    epsilon = torch.finfo(dtype).eps
    for wanted in [-2.0, 1.0, 3.0, 5.0, 8.0]:
        assert np.abs(values - wanted).min() <= 64 * epsilon * 8
    # rounding noise may carry the recurrence on inside the null space, where all Ritz values are zero
    others = [v for v in values if np.abs(np.array([-2.0, 1.0, 3.0, 5.0, 8.0]) - v).min() > 64 * epsilon * 8]
    assert np.abs(others).max(initial=0.0) <= 64 * epsilon * 8
    assert tridiagonal.steps < 50


def test_block_with_more_probes_than_rank_deflates():
    eigenvalues = np.zeros(100)
    eigenvalues[:3] = [1.0, 2.0, 4.0]
    run = Recorder(matrix_with(eigenvalues), 30, 8)
    sizes = [len(a) for a in run.diagonal]
    assert sizes[0] == 8
    assert sizes[1] == 3
    assert run.engine.invariant
    assert run.recurrence_residual() <= 1e-12


def test_dependent_probes_are_represented_exactly():
    matrix = matrix_with(hessian_like(80))
    probes = torch.empty(4, 80, dtype=torch.float64)
    kernels.fill_probes(probes, 1)
    probes[2] = probes[0] + probes[1]
    probes[3] = 0
    run = Recorder(matrix, 10, 4, probes=probes)
    start = torch.from_numpy(run.engine.start_factor)
    assert start.shape == (4, 2)
    assert (start @ run.blocks[0] - probes).norm() <= 1e-13 * probes.norm()
    assert run.recurrence_residual() <= 1e-12


def test_slots_of_deflated_blocks_hold_nothing_stale():
    # in window mode slots are used again: a narrower block must clear what an older, wider one left
    eigenvalues = np.zeros(100)
    eigenvalues[:6] = np.linspace(1, 2, 6)
    run = Recorder(matrix_with(eigenvalues), 6, 4, "window", 1)
    assert [len(a) for a in run.diagonal][:3] == [4, 4, 2]
    assert torch.equal(run.working[2:4], torch.zeros(2, 100, dtype=torch.float64))
    assert run.recurrence_residual() <= 1e-12


def test_repeated_eigenvalues_are_found_as_often_as_the_block_is_wide():
    eigenvalues = np.concatenate([np.linspace(-0.1, 0.1, 94), [4.0] * 3, [9.0] * 3])
    values, _, _ = block_lanczos(matrix_with(eigenvalues), steps=12, block_size=3).ritz()
    assert (np.abs(values - 9.0) < 1e-9).sum() == 3
    assert (np.abs(values - 4.0) < 1e-9).sum() == 3


def test_weak_directions_are_orthogonalized_once_more():
    matrix = matrix_with(hessian_like())
    probes = torch.empty(3, 300, dtype=torch.float64)
    kernels.fill_probes(probes, 1)
    eigenvector = torch.linalg.eigh(matrix).eigenvectors[:, -1]
    probes[2] = eigenvector + 1e-9 * probes[2]  # its product has next to nothing outside the first block
    run = Recorder(matrix, 15, 3, probes=probes)
    q = torch.cat(run.blocks)
    assert run.engine.extra_sweeps > 0
    assert (q @ q.T - torch.eye(len(q), dtype=torch.float64)).abs().max() <= 32 * 2.0**-52
    assert run.recurrence_residual() <= 1e-12


def test_same_bits_for_any_thread_count_and_run_to_run():
    eigenvalues = hessian_like(9000)
    operator = MatrixOperator(torch.diag(torch.as_tensor(eigenvalues, dtype=torch.float32)))
    before = torch.get_num_threads()
    results = []
    for threads in (1, 2, 5, 1):
        torch.set_num_threads(threads)
        try:
            results.append(block_lanczos(operator, 12, 3, seed=4).to_dict())
        finally:
            torch.set_num_threads(before)
    assert all(result == results[0] for result in results[1:])


def test_recurrence_error_sees_an_asymmetric_operator():
    matrix = matrix_with(hessian_like(100))

    class Operator:
        size, dtype, device, products = 100, torch.float64, torch.device("cpu"), 0

        def __init__(self, skew):
            self.matrix = matrix + skew * torch.triu(torch.ones(100, 100, dtype=torch.float64), 1)

        def matmat(self, panel, out=None):
            return torch.mm(panel, self.matrix.T, out=out)

    assert block_lanczos(Operator(0.0), 10, 2).recurrence_error <= 1e-13
    assert block_lanczos(Operator(1e-6), 10, 2).recurrence_error >= 1e-7


@pytest.mark.parametrize("mode", MODES)
def test_two_shards_with_an_all_reduce_give_the_whole_result(mode):
    matrix = matrix_with(hessian_like(101))
    n, cut, steps, block = 101, 40, 8, 3
    pieces = [slice(0, cut), slice(cut, n)]
    barrier = threading.Barrier(2, timeout=60)
    shared = [None, None]
    results = [None, None]

    def all_reduce(rank):
        def reduce(values):
            shared[rank] = values.copy()
            barrier.wait()
            values[:] = shared[0] + shared[1]
            barrier.wait()

        return reduce

    def shard(rank):
        columns = pieces[rank]
        local = columns.stop - columns.start
        history = kernels.empty_panel((steps - 2) * block, local, torch.float64)
        working = kernels.empty_panel(3 * block, local, torch.float64)
        recent, work = working[: 2 * block], working[2 * block :]
        kernels.fill_probes(work, 9, first_index=columns.start)
        engine = _engine.BlockLanczos(history, working, block, steps, n, mode, 8.0, all_reduce(rank))
        engine.start()
        while not engine.finished:
            row, width = engine.current_row, engine.current_width
            shared[rank] = recent[row : row + width].clone()
            barrier.wait()
            whole = torch.cat(shared, dim=1)
            barrier.wait()
            work[:width] = (whole @ matrix)[:, columns]
            engine.advance()
        results[rank] = engine.diagonal, engine.offdiagonal

    threads = [threading.Thread(target=shard, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    whole = block_lanczos(matrix, steps, block, seed=9, reorthogonalization=mode, window=steps * block)
    for mine, theirs in zip(results[0], results[1], strict=True):
        assert all(np.array_equal(a, b) for a, b in zip(mine, theirs, strict=True))
    # a recurrence that is not reorthogonalized amplifies rounding, and so the entries of its blocks differ
    if mode in ("full", "window"):
        for a, b in zip(results[0][0], whole.diagonal, strict=True):
            np.testing.assert_allclose(a, b, rtol=0, atol=1e-12)
    np.testing.assert_allclose(results[0][0][0], whole.diagonal[0], rtol=0, atol=1e-12)
    sharded = dataclasses.replace(whole, diagonal=tuple(results[0][0]), offdiagonal=tuple(results[0][1]))
    np.testing.assert_allclose(sharded.ritz()[0][[0, -2, -1]], whole.ritz()[0][[0, -2, -1]], rtol=0, atol=1e-12 * 10)


def test_progress_is_reported_after_each_step():
    seen = []
    block_lanczos(matrix_with(hessian_like(50)), 5, 2, on_step=seen.append)
    assert seen == [LanczosProgress(i, 5, 2 * i) for i in range(1, 6)]


def test_given_probes_are_used_and_carry_no_sampling_claim():
    matrix = matrix_with(hessian_like(50))
    probes = torch.eye(50, dtype=torch.float64)[:2]
    tridiagonal = block_lanczos(matrix, 1, probes=probes)
    assert tridiagonal.probe_kind == "given"
    moment = tridiagonal.start @ tridiagonal.diagonal[0] @ tridiagonal.start.T
    np.testing.assert_allclose(moment, matrix[:2, :2].numpy(), rtol=0, atol=1e-13)


REFUSED = [
    ({"steps": 0}, ProblemError, "steps is 0"),
    ({"steps": -3}, ProblemError, "steps is -3"),
    ({"steps": 2.5}, ProblemError, "steps is 2.5"),
    ({"block_size": 0}, ProblemError, "block_size is 0"),
    ({"block_size": 21}, ProblemError, "block_size is 21; wanted 1 to 20"),
    ({"seed": -1}, ProblemError, "seed is -1"),
    ({"seed": 2**64}, ProblemError, "seed is"),
    ({"window": 0}, ProblemError, "window is 0"),
    ({"reorthogonalization": "half"}, ProblemError, "'half'"),
    ({"probe_kind": "uniform"}, ProblemError, "'uniform'"),
    ({"probes": torch.ones(2, 19)}, ProblemError, r"wanted a floating-point tensor of shape \(b, 20\)"),
    ({"probes": torch.full((2, 20), float("nan"))}, ProblemError, "not finite"),
    ({"probes": torch.zeros(2, 20)}, EngineError, "all probes are zero"),
]


@pytest.mark.parametrize(("options", "error", "message"), REFUSED)
def test_bad_options_are_refused_before_any_product(options, error, message):
    operator = MatrixOperator(torch.eye(20))
    with pytest.raises(error, match=message):
        block_lanczos(operator, **options)
    assert operator.products == 0


def test_a_basis_that_does_not_fit_is_refused(monkeypatch):
    monkeypatch.setattr(memory_budget, "available_memory", lambda device: 1000)
    with pytest.raises(PlanError, match="GiB are available"):
        block_lanczos(torch.eye(20), 10, 2, basis="memory")


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_products_are_named(bad):
    class Operator:
        size, dtype, device, products = 30, torch.float32, torch.device("cpu"), 0
        calls = 0

        def describe(self, column):
            return f"layer.weight[{column}]"

        def matmat(self, panel, out=None):
            out.copy_(panel * torch.arange(30))
            self.calls += 1
            if self.calls == 3:
                out[1, 17] = bad
            return out

    with pytest.raises(OperatorError, match=r"vector 1 is (nan|inf) at layer.weight\[17\]"):
        block_lanczos(Operator(), 10, 2)


@pytest.mark.parametrize("step", ["start", "advance"])
def test_an_error_of_the_engine_is_not_explained_by_the_numbers(monkeypatch, step):
    class Failing:
        def __init__(self, *arguments, **options):
            self._engine = _engine.BlockLanczos(*arguments, **options)

        def __getattr__(self, name):
            if name != step:
                return getattr(self._engine, name)
            raise EngineError("CUDA: out of something")

    monkeypatch.setattr(lanczos_module, "_engine", SimpleNamespace(BlockLanczos=Failing))
    with pytest.raises(EngineError, match=r"^CUDA: out of something$"):
        block_lanczos(torch.eye(20), 3, 2)


def test_the_engine_refuses_wrong_order_and_wrong_panels():
    history, working = torch.ones(2, 10), torch.ones(6, 10)
    kernels.fill_probes(working[4:], 0)
    engine = _engine.BlockLanczos(history, working, 2, 2, 10, "full", 8.0, None)
    with pytest.raises(EngineError, match=r"before start\(\)"):
        engine.advance()
    engine.start()
    with pytest.raises(EngineError, match="twice"):
        engine.start()
    with pytest.raises(EngineError, match="needs"):
        _engine.BlockLanczos(history, working, 2, 4, 10, "full", 8.0, None)
    with pytest.raises(EngineError, match="'half'"):
        _engine.BlockLanczos(history, working, 2, 2, 10, "half", 8.0, None)
    with pytest.raises(EngineError, match="shares memory"):
        _engine.BlockLanczos(working[4:], working, 2, 2, 10, "full", 8.0, None)
    with pytest.raises(EngineError, match="smaller than"):
        _engine.BlockLanczos(history, working, 2, 2, 9, "full", 8.0, None)
    with pytest.raises(EngineError, match="10 rows are needed, and no `history`"):
        _engine.BlockLanczos(torch.ones(0, 10), torch.ones(8, 10), 2, 4, 10, "full", 8.0, None)
    with pytest.raises(EngineError, match="a history of 2"):
        _engine.BlockLanczos(history, torch.ones(10, 10), 2, 4, 10, "full", 8.0, None)


def test_ritz_values_of_exhausted_spaces_lie_within_their_bounds():
    for seed in range(60):
        rng = np.random.default_rng(seed)
        n, block = int(rng.integers(5, 24)), int(rng.integers(2, 6))
        eigenvalues = rng.normal(0, 1, n) * 10.0 ** rng.integers(-3, 2, n)
        tridiagonal = block_lanczos(matrix_with(eigenvalues, seed=seed), n, min(block, n), seed=seed)
        values, _, residuals = tridiagonal.ritz()
        assert (np.abs(values[:, None] - eigenvalues[None, :]).min(axis=1) <= residuals).all(), seed
        assert len(values) <= n


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("block", [1, 4])
def test_more_steps_than_dimensions_are_fine_in_every_mode(mode, block):
    eigenvalues = hessian_like(30)
    tridiagonal = block_lanczos(matrix_with(eigenvalues), 30, block, reorthogonalization=mode)
    values, _, residuals = tridiagonal.ritz()
    assert (np.abs(values[:, None] - eigenvalues[None, :]).min(axis=1) <= residuals + 1e-9).all()
    assert np.abs(values[-1] - 10.0) <= 1e-9


def test_an_operator_that_returns_a_panel_of_its_own_is_heard():
    class Operator:
        size, dtype, device, products = 20, torch.float64, torch.device("cpu"), 0

        def matmat(self, panel, out=None):
            return panel * torch.arange(20, dtype=torch.float64)

    values, _, _ = block_lanczos(Operator(), 20, 1).ritz()
    np.testing.assert_allclose(values, np.arange(20), atol=1e-12)


class StepError(Exception):
    pass


def engine_with(reduce, n=40, steps=6, block=2):
    history = kernels.empty_panel((steps - 2) * block, n, torch.float64)
    working = kernels.empty_panel(3 * block, n, torch.float64)
    recent, work = working[: 2 * block], working[2 * block :]
    kernels.fill_probes(work, 0)
    return _engine.BlockLanczos(history, working, block, steps, n, "full", 8.0, reduce), recent, work


def test_a_step_that_failed_cannot_be_continued():
    calls = []

    def reduce(values):
        calls.append(len(values))
        if armed and len(calls) == 2:
            raise StepError

    armed = False
    engine, recent, work = engine_with(reduce)
    engine.start()
    calls.clear()
    armed = True
    matrix = matrix_with(hessian_like(40))
    work[:2] = recent[:2] @ matrix
    with pytest.raises(StepError):
        engine.advance()
    with pytest.raises(EngineError, match="earlier step ended with an error"):
        engine.advance()


def test_what_a_reduction_keeps_stays_as_it_was():
    kept = []
    engine, recent, work = engine_with(kept.append)
    engine.start()
    copies = [values.copy() for values in kept]
    work[:2] = recent[:2] @ matrix_with(hessian_like(40))
    engine.advance()
    for values, copy in zip(kept, copies, strict=False):
        np.testing.assert_array_equal(values, copy)


def test_nobody_else_reads_or_steps_during_a_step():
    seen = []

    def reduce(values):
        for action in (lambda: engine.diagonal, engine.advance):
            with pytest.raises(EngineError, match="in the middle of a step"):
                action()
            seen.append(action)

    engine, _, _ = engine_with(reduce)
    engine.start()
    assert len(seen) >= 2


@pytest.mark.parametrize("scale", [1e-160, 1e160])
def test_scales_that_cannot_be_squared_are_named(scale):
    with pytest.raises(OperatorError, match=r"multiply the loss|not finite"):
        block_lanczos(matrix_with(hessian_like(40)) * scale, 10, 2)


@pytest.mark.parametrize("scale", [1e-120, 1e-30, 1e30, 1e120])
def test_other_scales_change_nothing(scale):
    matrix = matrix_with(hessian_like(40))
    values, _, _ = block_lanczos(matrix, 10, 2).ritz()
    scaled, _, _ = block_lanczos(matrix * scale, 10, 2).ritz()
    np.testing.assert_allclose(scaled / scale, values, rtol=0, atol=1e-12)


def test_an_asymmetric_operator_is_refused():
    matrix = matrix_with(hessian_like(100))

    class Operator:
        size, dtype, device, products = 100, torch.float64, torch.device("cpu"), 0

        def matmat(self, panel, out=None):
            return torch.mm(panel, (matrix + torch.triu(torch.ones(100, 100), 1) * 0.1).double(), out=out)

    with pytest.raises(OperatorError, match="not those of one symmetric matrix"):
        block_lanczos(Operator(), 10, 2)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_nearly_dependent_blocks_stay_orthogonal_to_their_neighbours_in_every_mode(mode, dtype):
    # low rank: next to a strong direction the block has one of rounding noise, just above the breakdown tolerance
    eigenvalues = np.zeros(300)
    eigenvalues[:10] = np.linspace(-0.5, 1.0, 10)
    matrix = matrix_with(eigenvalues, dtype)
    epsilon = torch.finfo(dtype).eps
    for seed in range(30):
        tridiagonal = block_lanczos(matrix, 20, 4, seed=seed, reorthogonalization=mode)
        assert tridiagonal.recurrence_error <= 64 * epsilon
        values, _, residuals = tridiagonal.ritz()
        distance = np.abs(values[:, None] - eigenvalues[None, :]).min(axis=1)
        assert (distance <= residuals + 64 * epsilon).all()
