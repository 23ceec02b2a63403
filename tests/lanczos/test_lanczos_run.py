"""The compiled block Lanczos: recurrence, orthogonality, known spectra, breakdown, deflation, shards."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from lanczos_driver import IN_PLACE, Record, drive, new_engine, new_run, on_threads, overlaps
from matrices import DTYPES, matrix_with
from spectra import hessian_like

import hesd_fast.lanczos.lanczos_run as lanczos_module
from hesd_fast import kernels
from hesd_fast.choices import REORTHOGONALIZATIONS
from hesd_fast.engine import _engine
from hesd_fast.errors import EngineError, OperatorError, PlanError, ProblemError
from hesd_fast.lanczos import memory_budget
from hesd_fast.lanczos.drive import LanczosProgress, block_lanczos
from hesd_fast.operators import MatrixOperator


def record(matrix, steps, block, mode="full", probes=0, window=2):
    run = new_run(kernels.empty_panel, matrix.dtype, len(matrix), steps, block, mode, window)
    return Record(run, matrix, probes, lambda _, panel: panel @ matrix)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block", [1, 2, 4, 7])
@pytest.mark.parametrize("mode", ["full", "full" + IN_PLACE])
def test_recurrence_and_orthogonality(dtype, block, mode):
    matrix = matrix_with(hessian_like(), dtype)
    run = record(matrix, 20, block, mode)
    epsilon = torch.finfo(dtype).eps
    assert run.recurrence_residual() <= 64 * epsilon * 10.0 * block**0.5
    assert overlaps(run.basis_vectors()) <= 32 * epsilon
    assert run.start_residual() <= 32 * epsilon


@pytest.mark.parametrize("mode", REORTHOGONALIZATIONS)
@pytest.mark.parametrize("block", [1, 3])
def test_every_mode_keeps_the_recurrence_and_finds_the_extremes(mode, block):
    matrix = matrix_with(hessian_like())
    run = record(matrix, 25, block, mode)
    # a sweep takes out overlaps of up to sqrt(epsilon) that the coefficients do not record
    assert run.recurrence_residual() <= (10.0 * 2.0**-25 if mode == "partial" else 1e-12)
    loss = overlaps(np.concatenate(run.blocks))
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
    apart, together = (record(matrix, 6, block, mode + where) for where in ("", IN_PLACE))
    assert apart.widths == together.widths
    for j, (one, other) in enumerate(zip(apart.blocks, together.blocks, strict=True)):
        assert np.array_equal(together.working[j * block :][: len(other)], other)
        assert not together.working[j * block + len(other) : (j + 1) * block].any()
        if j < 2:  # later ones differ by rounding that the recurrence amplifies
            assert np.abs(one - other).max() <= 1e-12
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
    run = record(matrix_with(eigenvalues), 30, 8)
    assert run.widths[:2] == [8, 3]
    assert run.engine.invariant
    assert run.recurrence_residual() <= 1e-12


def test_dependent_probes_are_represented_exactly():
    matrix = matrix_with(hessian_like(80))
    probes = torch.empty(4, 80, dtype=torch.float64)
    kernels.fill_probes(probes, 1)
    probes[2] = probes[0] + probes[1]
    probes[3] = 0
    run = record(matrix, 10, 4, probes=probes)
    assert run.engine.start_factor.shape == (4, 2)
    assert run.start_residual() <= 1e-13
    assert run.recurrence_residual() <= 1e-12


def test_slots_of_deflated_blocks_hold_nothing_stale():
    # in window mode slots are used again: a narrower block must clear what an older, wider one left
    eigenvalues = np.zeros(100)
    eigenvalues[:6] = np.linspace(1, 2, 6)
    run = record(matrix_with(eigenvalues), 6, 4, "window", window=1)
    assert run.widths[:3] == [4, 4, 2]
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
    run = record(matrix, 15, 3, probes=probes)
    assert run.engine.extra_sweeps > 0
    assert overlaps(np.concatenate(run.blocks)) <= 32 * 2.0**-52
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


@pytest.mark.parametrize("mode", REORTHOGONALIZATIONS)
def test_two_shards_with_an_all_reduce_give_the_whole_result(mode):
    matrix = matrix_with(hessian_like(101))
    n, cut, steps, block = 101, 40, 8, 3
    pieces = [slice(0, cut), slice(cut, n)]

    def shard(rank, gather):
        columns = pieces[rank]

        def reduce(values):
            values[:] = sum(gather(values.copy()))

        local = columns.stop - columns.start
        run = new_run(
            kernels.empty_panel, torch.float64, local, steps, block, mode, window=steps, size=n, reduce=reduce
        )
        run.fill_probes(9, first_index=columns.start)
        drive(run, lambda panel: (torch.cat(gather(panel.clone()), dim=1) @ matrix)[:, columns])
        return run.engine.diagonal, run.engine.offdiagonal

    results = on_threads(2, shard)
    whole = block_lanczos(
        matrix, steps, block, seed=9, probe_kind="rademacher", reorthogonalization=mode, window=steps * block
    )
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
    engine = new_engine(history, working, 2, 2, 10)
    with pytest.raises(EngineError, match=r"before start\(\)"):
        engine.advance()
    engine.start()
    with pytest.raises(EngineError, match="twice"):
        engine.start()
    with pytest.raises(EngineError, match="needs"):
        new_engine(history, working, 2, 4, 10)
    with pytest.raises(EngineError, match="'half'"):
        new_engine(history, working, 2, 2, 10, "half")
    with pytest.raises(EngineError, match="shares memory"):
        new_engine(working[4:], working, 2, 2, 10)
    with pytest.raises(EngineError, match="smaller than"):
        new_engine(history, working, 2, 2, 9)
    with pytest.raises(EngineError, match="10 rows are needed, and no `history`"):
        new_engine(torch.ones(0, 10), torch.ones(8, 10), 2, 4, 10)
    with pytest.raises(EngineError, match="a history of 2"):
        new_engine(history, torch.ones(10, 10), 2, 4, 10)


def test_ritz_values_of_exhausted_spaces_lie_within_their_bounds():
    for seed in range(60):
        rng = np.random.default_rng(seed)
        n, block = int(rng.integers(5, 24)), int(rng.integers(2, 6))
        eigenvalues = rng.normal(0, 1, n) * 10.0 ** rng.integers(-3, 2, n)
        tridiagonal = block_lanczos(matrix_with(eigenvalues, seed=seed), n, min(block, n), seed=seed)
        values, _, residuals = tridiagonal.ritz()
        assert (np.abs(values[:, None] - eigenvalues[None, :]).min(axis=1) <= residuals).all(), seed
        assert len(values) <= n


@pytest.mark.parametrize("mode", REORTHOGONALIZATIONS)
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


def run_with(reduce, n=40, steps=6, block=2):
    run = new_run(kernels.empty_panel, torch.float64, n, steps, block, reduce=reduce)
    run.fill_probes(0)
    return run


def test_a_step_that_failed_cannot_be_continued():
    calls = []

    def reduce(values):
        calls.append(len(values))
        if armed and len(calls) == 2:
            raise StepError

    armed = False
    run = run_with(reduce)
    run.engine.start()
    calls.clear()
    armed = True
    run.product[...] = run.panel @ matrix_with(hessian_like(40))
    with pytest.raises(StepError):
        run.advance()
    with pytest.raises(EngineError, match="earlier step ended with an error"):
        run.advance()


def test_what_a_reduction_keeps_stays_as_it_was():
    kept = []
    run = run_with(kept.append)
    run.engine.start()
    copies = [values.copy() for values in kept]
    run.product[...] = run.panel @ matrix_with(hessian_like(40))
    run.advance()
    for values, copy in zip(kept, copies, strict=False):
        np.testing.assert_array_equal(values, copy)


def test_nobody_else_reads_or_steps_during_a_step():
    seen = []

    def reduce(values):
        for action in (lambda: engine.diagonal, engine.advance):
            with pytest.raises(EngineError, match="in the middle of a step"):
                action()
            seen.append(action)

    engine = run_with(reduce).engine
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


@pytest.mark.parametrize("mode", REORTHOGONALIZATIONS)
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
