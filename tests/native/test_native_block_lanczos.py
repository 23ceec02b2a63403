"""The compiled block Lanczos on NumPy matrices: spectra that break it down, modes, widths, refusals, threads."""

from __future__ import annotations

import threading

import numpy as np
import pytest
from lanczos_driver import IN_PLACE, drive, new_engine, on_threads, overlaps
from native_lanczos import GuardedRun, Run
from native_panels import EPSILON, STORAGE, WORKING, Lender, Panel, unset

from hesd_fast.errors import EngineError

MODES = ["full", "full" + IN_PLACE, "partial", "partial" + IN_PLACE, "window", "none"]


def dense(eigenvalues, seed=0):
    """A symmetric matrix with these eigenvalues."""
    n = len(eigenvalues)
    q, _ = np.linalg.qr(np.random.default_rng(seed).standard_normal((n, n)))
    matrix = (q * np.asarray(eigenvalues)) @ q.T
    return (matrix + matrix.T) / 2


def allowed(mode, epsilon, norm, block):
    """What the recurrence may miss: rounding, and in partial mode what a sweep took away, the root of epsilon."""
    return (64 * epsilon + (2 * np.sqrt(epsilon) if mode.startswith("partial") else 0.0)) * norm * np.sqrt(block)


def padded(values, n):
    return np.concatenate([values, np.zeros(n - len(values))])


N = 60
SPECTRA = {
    "hilbert": 1.0 / (np.arange(N)[:, None] + np.arange(N)[None, :] + 1.0),
    "clustered": dense(
        np.concatenate([1.0 + 1e-9 * np.arange(30), -2.0 + 1e-7 * np.arange(20), np.linspace(3, 5, 10)])
    ),
    "repeated": dense(np.repeat([-1.0, 0.0, 2.0, 7.0], 15)),
    "indefinite": dense(np.linspace(-3.0, 3.0, N)),
    "low-rank": dense(padded([-2.0, 1.0, 3.0, 5.0, 8.0], N)),
    "rank-one": dense(padded([4.0], N)),
    "hessian-like": dense(np.concatenate([1e-2 * np.random.default_rng(0).standard_normal(N - 4), [-0.7, 2, 5, 10]])),
    "identity": 3.0 * np.eye(N),
    "zero": np.zeros((N, N)),
    "diagonal": np.arange(N) - 20.0,
}


@pytest.mark.parametrize("working", WORKING)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_the_recurrence_holds_on_every_spectrum(target, spectrum, mode, working):
    matrix = SPECTRA[spectrum]
    norm = np.abs(matrix).max() if matrix.ndim == 1 else np.abs(np.linalg.eigvalsh(matrix)).max()
    for block in (1, 3, 8):
        run = Run(matrix, 12, block, mode, working, probes=block)
        epsilon = EPSILON[working]
        assert run.recurrence_residual() <= allowed(mode, epsilon, norm, block)
        if not mode.startswith("partial"):
            assert run.engine.recurrence_error <= 64 * epsilon * norm
        assert norm == 0.0 or 0.0 < run.engine.scale <= norm * (1 + 64 * epsilon)
        assert run.start_residual() <= 32 * epsilon
        q = run.basis_vectors()
        if mode.startswith("full"):
            assert overlaps(q) <= 32 * epsilon
            ritz = np.linalg.eigvalsh(run.projected_matrix())
            assert np.abs(ritz).max() <= norm * (1 + 64 * epsilon)
            if run.engine.invariant:  # then every Ritz value is an eigenvalue
                eigenvalues = np.sort(matrix) if matrix.ndim == 1 else np.linalg.eigvalsh(matrix)
                distance = np.abs(ritz[:, None] - eigenvalues[None, :]).min(axis=1)
                assert distance.max() <= 64 * epsilon * norm * np.sqrt(len(q))
        run.assert_surroundings_untouched()


@pytest.mark.parametrize("working", WORKING)
@pytest.mark.parametrize("mode", MODES)
def test_breakdown_at_the_first_step(target, mode, working):
    for matrix in (3.0 * np.eye(N), np.full(N, -2.0), np.zeros(N)):
        for block in (1, 4):
            run = Run(matrix, 10, block, mode, working)
            assert run.engine.invariant
            assert run.engine.steps == 1
            assert run.offdiagonal[0].shape == (block, 0)
            value = matrix[0] if matrix.ndim == 1 else matrix[0, 0]
            assert np.abs(run.diagonal[0] - value * np.eye(block)).max() <= 16 * EPSILON[working] * abs(value)


@pytest.mark.parametrize("mode", MODES)
def test_breakdown_in_the_middle_with_every_eigenvalue(target, mode):
    distinct = np.array([-2.0, 1.0, 3.0, 5.0, 8.0])
    run = Run(np.repeat(distinct, 10), 12, 1, mode)
    assert run.engine.steps < 12
    assert run.engine.invariant
    ritz = np.linalg.eigvalsh(run.projected_matrix())
    assert np.abs(ritz[:, None] - distinct[None, :]).min(axis=0).max() <= 64 * EPSILON["float64"] * 8


@pytest.mark.parametrize("mode", MODES)
def test_a_block_wider_than_the_rank_narrows(target, mode):
    run = Run(SPECTRA["low-rank"], 10, 8, mode)
    assert run.widths[:2] == [8, 5]
    assert run.engine.invariant
    assert run.recurrence_residual() <= allowed(mode, EPSILON["float64"], 8.0, 8)
    run.assert_surroundings_untouched()


@pytest.mark.parametrize("mode", MODES)
def test_rows_of_narrower_blocks_hold_nothing_stale(target, mode):
    run = Run(padded(np.linspace(1.0, 2.0, 6), 100), 6, 4, mode)
    assert run.widths[:3] == [4, 4, 2]
    third = run.working[8:12] if mode.endswith(IN_PLACE) else run.working[:4]
    assert np.all(third[2:] == 0.0)


@pytest.mark.parametrize("tiles", [(), (1,), (4096,), (100, 101, 5000)])
@pytest.mark.parametrize("storage", STORAGE)
@pytest.mark.parametrize("mode", ["full", "partial", "window"])
def test_a_history_of_lower_precision_or_in_tiles(target, mode, storage, tiles):
    n = 5003
    diagonal = np.concatenate([np.linspace(-0.1, 0.1, n - 2), [-2.0, 4.0]])
    working = "float64" if storage == "float64" else "float32"
    run = Run(diagonal, 7, 3, mode, working, storage=storage, tiles=tiles)
    # what is taken away against a rounded vector stays in the recurrence: the rounding of the history
    epsilon = max(EPSILON[working], EPSILON[storage])
    assert run.recurrence_residual() <= allowed(mode, epsilon, 4.0, 3)
    ritz = np.linalg.eigvalsh(run.projected_matrix())
    assert abs(ritz[-1] - 4.0) <= 64 * epsilon * 4.0
    run.assert_surroundings_untouched()


def test_the_whole_space_gives_the_whole_spectrum(target):
    for n, block in [(1, 1), (2, 2), (5, 5), (7, 3), (9, 4), (12, 1), (30, 7)]:
        matrix = dense(np.random.default_rng(n).standard_normal(n), seed=n)
        probes = np.random.default_rng(n + 1).standard_normal((block, n))
        run = Run(matrix, n, block, probes=probes)
        assert run.engine.invariant
        eigenvalues = np.linalg.eigvalsh(matrix)
        ritz = np.linalg.eigvalsh(run.projected_matrix())
        assert len(ritz) == n
        assert np.abs(ritz - eigenvalues).max() <= 64 * EPSILON["float64"] * np.abs(eigenvalues).max()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("working", WORKING)
def test_zero_and_dependent_probes_narrow_the_first_block(target, mode, working):
    probes = np.random.default_rng(3).choice([-1.0, 1.0], size=(5, N))
    probes[1] = 0.0
    probes[3] = probes[0] - probes[2]
    run = Run(SPECTRA["indefinite"], 6, 5, mode, working, probes=probes)
    start = run.engine.start_factor
    assert start.shape == (5, 3)
    assert np.all(start[1] == 0.0)
    assert run.start_residual() <= 32 * EPSILON[working]
    assert run.recurrence_residual() <= allowed(mode, EPSILON[working], 3.0, 3)


def test_probes_that_are_all_zero_are_refused():
    engine = new_engine(unset(4, N).borrowed, Panel(np.zeros((6, N))).borrowed, 2, 4, N)
    with pytest.raises(EngineError, match="all probes are zero"):
        engine.start()


@pytest.mark.parametrize("working", WORKING)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("block", [1, 3])
def test_several_chunks(target, mode, working, block):
    n = 4097 * 2
    diagonal = np.concatenate([np.linspace(-0.01, 0.01, n - 3), [-0.7, 5.0, 10.0]])
    run = Run(diagonal, 8, block, mode, working)
    assert run.recurrence_residual() <= allowed(mode, EPSILON[working], 10.0, block)
    ritz = np.linalg.eigvalsh(run.projected_matrix())
    assert np.abs(ritz[-1] - 10.0) <= 256 * EPSILON[working] * 10.0
    run.assert_surroundings_untouched()


def test_a_weak_block_is_orthogonalized_once_more(target):
    matrix = SPECTRA["hessian-like"]
    probes = np.random.default_rng(1).choice([-1.0, 1.0], size=(3, N))
    probes[2] = np.linalg.eigh(matrix)[1][:, -1] + 1e-9 * probes[2]  # next to nothing outside the first block
    run = Run(matrix, 8, 3, probes=probes)
    assert run.engine.extra_sweeps > 0
    assert overlaps(run.basis_vectors()) <= 32 * EPSILON["float64"]


@pytest.mark.parametrize("working", WORKING)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_products_that_are_not_finite_name_the_panel(target, working, bad):
    for mode in MODES:
        for step, (row, column) in [(0, (0, 0)), (2, (1, N - 1))]:
            run = GuardedRun(2, N, 5, mode, working)
            run.fill_probes(0)

            def multiply(panel, run=run, step=step, place=(row, column)):
                product = panel * SPECTRA["diagonal"]
                if run.engine.steps == step:
                    product[place] = bad
                return product

            with pytest.raises(EngineError, match="`working` has non-finite values"):
                drive(run, multiply)
            with pytest.raises(EngineError, match="earlier step ended with an error"):
                run.advance()
            assert run.engine.steps == step
            run.assert_surroundings_untouched()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_probes_that_are_not_finite_name_the_panel(bad):
    working = Panel(np.ones((6, N)))
    working.array[5, 3] = bad
    engine = new_engine(unset(4, N).borrowed, working.borrowed, 2, 4, N)
    with pytest.raises(EngineError, match="`working` has non-finite values"):
        engine.start()


def test_calls_in_the_wrong_order_are_refused():
    run = GuardedRun(2, N, 2)
    run.fill_probes(0)
    engine = run.engine
    with pytest.raises(EngineError, match=r"before start\(\)"):
        engine.advance()
    engine.start()
    with pytest.raises(EngineError, match="twice"):
        engine.start()
    for _ in range(2):
        run.product[...] = run.panel * SPECTRA["diagonal"]
        engine.advance()
    assert engine.finished
    with pytest.raises(EngineError, match="has finished"):
        engine.advance()
    assert engine.steps == 2


def ones(rows, columns, precision="float64"):
    return Panel(np.ones((rows, columns)), precision).borrowed


def built(history=4, working=6, block=2, columns=10, steps=4, size=10, mode="full", **options):
    """An engine, or what is refused."""
    panels = [ones(panel, columns) if isinstance(panel, int) else panel for panel in (history, working)]
    return new_engine(*panels, block, steps, size, mode, **options)


BOTH = np.ones((12, 10))
REFUSED = [
    (lambda: built(history=2), "`history` has 2 rows; this mode needs 4"),
    (lambda: built(history=2, mode="partial"), "`history` has 2 rows; this mode needs 4"),
    (lambda: built(mode="half"), "`reorthogonalization` is 'half'"),
    (lambda: built(size=9), "global_size 9 is smaller"),
    (lambda: built(size=11), "no reduction over shards"),
    (lambda: built(steps=0), "must both be at least 1"),
    (lambda: built(block=0), "must both be at least 1"),
    (lambda: built(block=-1), "must both be at least 1"),
    (lambda: built(8, 12, 4, columns=2, size=2), "block size 4 is larger than the dimension 2"),
    (lambda: built(working=5), r"at least three times block size rows \(it has 5\)"),
    (lambda: built(working=ones(6, 11)), "the columns of `history`"),
    (lambda: built(working=ones(6, 10, "float32")), "`history` has a higher precision"),
    (lambda: built(history=0, working=9), "keeps the whole basis: 10 rows are needed"),
    (lambda: built(history=4, working=10), "a history of 4"),
    (lambda: built(multiple=-1.0), "breakdown_multiple"),
    (lambda: built(multiple=np.nan), "breakdown_multiple"),
    (lambda: built(BOTH[:4], BOTH[3:9]), "`history` shares memory with `working`"),
    (lambda: built(BOTH[8:], BOTH[3:9]), "`history` shares memory with `working`"),
    (lambda: built(working=ones(6, 10, "bfloat16")), "`working` has dtype bfloat16"),
    (lambda: built(working=np.ones((10, 6)).T), "`working` has a stride of 6"),
    (lambda: built(history=np.ones((10, 4)).T), "`history` has a stride of 4"),
    (lambda: built(history=[]), "`history` is an empty list"),
    (lambda: built(history=[ones(4, 5), ones(3, 5)]), "differs from the first tile"),
    (lambda: built(history=[ones(4, 5), ones(4, 5, "float32")]), "differs from the first tile"),
    (lambda: built(history=[ones(4, 5), ones(4, 4)]), "columns of `history`"),
]


@pytest.mark.parametrize(("build", "message"), REFUSED)
def test_what_cannot_be_used_is_refused_by_name(build, message):
    with pytest.raises(EngineError, match=message):
        build()


def test_panels_stay_lent_as_long_as_the_engine_lives():
    panels = [Lender(np.ones((rows, N)), (rows, N), None) for rows in (2, 6)]
    engine = new_engine(*panels, 2, 3, N)
    assert [(panel.borrowed, panel.returned) for panel in panels] == [(1, 0)] * 2
    engine.start()
    del engine
    assert [(panel.borrowed, panel.returned) for panel in panels] == [(1, 1)] * 2


class StepError(Exception):
    pass


def test_an_exception_from_a_reduction_ends_the_run():
    calls = []

    def reduce(sums):
        calls.append(sums)
        if len(calls) > started:
            raise StepError

    started = 100
    run = GuardedRun(2, N, 4, reduce=reduce)
    run.fill_probes(0)
    run.engine.start()
    started = len(calls) + 1
    run.product[...] = run.panel * SPECTRA["diagonal"]
    with pytest.raises(StepError):
        run.advance()
    with pytest.raises(EngineError, match="earlier step ended with an error"):
        run.advance()
    kept = [sums.copy() for sums in calls]
    del run
    for mine, copy in zip(calls, kept, strict=True):  # arrays that a callback keeps are Python's own
        assert np.array_equal(mine, copy)


@pytest.mark.parametrize("mode", MODES)
def test_shards_on_two_threads_give_the_whole_result(mode):
    n, cut, steps, block = 5001, 2000, 6, 3
    diagonal = np.concatenate([np.linspace(-0.1, 0.1, n - 2), [-2.0, 4.0]])

    def shard(rank, gather):
        mine = slice(0, cut) if rank == 0 else slice(cut, n)

        def reduce(sums):
            sums[:] = sum(gather(sums.copy()))

        run = GuardedRun(block, mine.stop - mine.start, steps, mode, size=n, reduce=reduce)
        run.fill_probes(9, first_index=mine.start)
        drive(run, lambda panel: panel * diagonal[mine])
        return run.engine.diagonal, run.engine.offdiagonal

    results = on_threads(2, shard)
    whole = Run(diagonal, steps, block, mode, probes=9)
    for mine, theirs in zip(results[0], results[1], strict=True):
        assert all(np.array_equal(a, b) for a, b in zip(mine, theirs, strict=True))
    # rounding moves the basis by about epsilon over the gap it has to resolve; six steps resolve the two outliers
    for a, b in zip(results[0][0], whole.diagonal, strict=True):
        assert np.abs(a - b).max() <= 2**14 * EPSILON["float64"] * 4.0


def test_another_thread_that_looks_on_sees_whole_steps_or_is_refused():
    n, block = 20_000, 2
    diagonal = np.linspace(-1.0, 5.0, n)
    run = GuardedRun(block, n, 20)
    run.fill_probes(1)
    engine = run.engine
    done = threading.Event()
    seen, failures = [], []

    def look():
        try:
            while not done.is_set():
                try:
                    seen.append((engine.steps, len(engine.diagonal), engine.scale, engine.current_row))
                except EngineError as error:
                    assert "in the middle of a step" in str(error)  # noqa: PT017
                    seen.append(None)
        except BaseException as error:
            failures.append(error)

    watcher = threading.Thread(target=look)
    watcher.start()
    try:
        drive(run, lambda panel: panel * diagonal)
    finally:
        done.set()
        watcher.join()
    assert failures == []
    assert seen
    steps = [entry[0] for entry in seen if entry is not None]
    assert steps == sorted(steps)
