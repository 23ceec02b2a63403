"""The CUDA sources on the CPU: the whole pipeline, the bytes they move, and faults that must be seen."""

from __future__ import annotations

import ctypes
import signal
import subprocess
import sys
from pathlib import Path

import emulation
import numpy as np
import pytest
import torch

import hesd_fast as hesd
from hesd_fast import kernels
from hesd_fast.engine import _engine
from hesd_fast.errors import EngineError, PlanError, ProblemError
from hesd_fast.lanczos import basis_storage as hesd_basis
from hesd_fast.lanczos import memory_budget
from hesd_fast.lanczos.drive import drive, start_run
from hesd_fast.lanczos.options import LanczosSettings
from hesd_fast.operators import as_operator

EPSILON = torch.finfo(torch.float32).eps
THREADS = 256
# When emulated work is done, see csrc/emulation/streams.hpp.
ORDER_AT_ONCE, ORDER_FIRST, ORDER_LAST = -1, 0, 1
ORDERS_AT_RANDOM = (2, 3, 4)
FAULTS = emulation.FOLDER / "planted_faults.so"


# From a model to its report


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("mode", ["full", "partial", "window", "none"])
def test_block_lanczos_finds_what_the_cpu_kernels_find(monkeypatch, mode, dtype):
    generator = torch.Generator().manual_seed(1)
    matrix = torch.randn(700, 700, dtype=torch.float64, generator=generator)
    matrix = ((matrix + matrix.T) / 60).to(dtype)
    for block, steps in [(1, 12), (3, 8), (9, 4)]:
        wanted = hesd.block_lanczos(matrix, steps, block, probe_kind="rademacher", reorthogonalization=mode)
        with monkeypatch.context() as patch:
            emulation.use_emulated_engine(patch)
            found = hesd.block_lanczos(matrix, steps, block, probe_kind="rademacher", reorthogonalization=mode)
        tolerance = 1024 * torch.finfo(dtype).eps  # of a spectrum in [-1.3, 1.3]
        for one, other in zip(wanted.diagonal, found.diagonal, strict=True):
            assert np.abs(one - other).max() <= tolerance
        for one, other in zip(wanted.offdiagonal, found.offdiagonal, strict=True):
            assert np.abs(one - other).max() <= tolerance
        assert found.orthogonality is None or found.orthogonality <= 100 * torch.finfo(dtype).eps


@pytest.mark.parametrize("working", [torch.float64, torch.float32])
@pytest.mark.parametrize("basis_dtype", ["auto", "bfloat16"])
@pytest.mark.parametrize("mode", ["full", "partial", "window", "none"])
@pytest.mark.parametrize("block", [1, 4, 9])
def test_the_host_waits_once_in_a_step(monkeypatch, mode, block, basis_dtype, working):
    generator = torch.Generator().manual_seed(3)
    vectors = torch.linalg.qr(torch.randn(300, 300, dtype=torch.float64, generator=generator))[0]
    matrix = ((vectors * torch.linspace(-1.0, 2.0, 300)) @ vectors.T).to(working)
    emulation.use_emulated_engine(monkeypatch)
    settings = LanczosSettings(block, 60 // block, mode, window=4 * block)
    run = start_run(as_operator(matrix), settings, basis_dtype=basis_dtype)
    waits, sweeps_so_far = [], [0]

    def multiply(panels, products):
        torch.mm(panels[""], matrix, out=products[""])
        emulation.engine().take_waits()

    def count(_):
        waits.append(emulation.engine().take_waits())
        sweeps_so_far.append(run._engine.extra_sweeps + run._engine.partial_sweeps)

    drive({"": run}, multiply, on_step=count)
    sweeps = np.diff(sweeps_so_far)
    assert len(waits) == 60 // block
    # A sweep, which is rare, is decided and waited for by itself; where rounded vectors are kept it may take two.
    most = 2 if (mode, basis_dtype) == ("partial", "bfloat16") else 1
    assert all(1 + sweep <= wait <= 1 + most * sweep for wait, sweep in zip(waits, sweeps, strict=True))
    assert most == 2 or sum(sweeps) <= len(sweeps) / 3


@pytest.mark.parametrize("basis_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("mode", ["full", "partial", "window"])
def test_a_basis_that_stays_off_the_device_is_read_tile_by_tile(monkeypatch, tmp_path, mode, basis_dtype):
    generator = torch.Generator().manual_seed(2)
    matrix = torch.randn(700, 700, generator=generator)
    matrix = (matrix + matrix.T) / 60
    # probes on the sphere are pivoted by rounding, as their norms are equal
    options = {"probe_kind": "rademacher", "reorthogonalization": mode, "basis_dtype": basis_dtype}
    emulation.use_emulated_engine(monkeypatch)
    near = hesd.block_lanczos(matrix, 9, 3, basis="memory", **options)
    monkeypatch.setattr(hesd_basis, "TILE_COLUMNS", 128)
    far = hesd.block_lanczos(matrix, 9, 3, basis=tmp_path, **options)  # tiles count as the host's for the emulation
    assert far.basis_place == "disk"
    for one, other in zip(near.diagonal + near.offdiagonal, far.diagonal + far.offdiagonal, strict=True):
        # both store the same rounded vectors: what differs is the order of sums
        assert np.abs(one - other).max() <= 64 * EPSILON * float(torch.linalg.matrix_norm(matrix, 2))
    if mode != "window":
        # partial mode keeps it to the root of epsilon; a stored vector is off by what its dtype rounds, over sqrt(n)
        stored = 0.0 if basis_dtype == "float32" else torch.finfo(torch.bfloat16).eps / len(matrix) ** 0.5
        assert far.orthogonality <= 32 * EPSILON + stored + (EPSILON**0.5 if mode == "partial" else 0.0)


@pytest.mark.parametrize("order", [ORDER_FIRST, ORDER_LAST, *ORDERS_AT_RANDOM])
@pytest.mark.parametrize("mode", ["full", "partial", "window"])
def test_no_order_of_the_streams_changes_a_bit(monkeypatch, tmp_path, mode, order):
    generator = torch.Generator().manual_seed(4)
    matrix = torch.randn(500, 500, generator=generator)
    matrix = (matrix + matrix.T) / 50
    emulation.use_emulated_engine(monkeypatch)
    monkeypatch.setattr(hesd_basis, "TILE_COLUMNS", 64)
    options = {"reorthogonalization": mode, "basis": tmp_path, "basis_dtype": "bfloat16"}
    wanted = hesd.block_lanczos(matrix, 8, 3, **options)
    emulation.engine().defer(order)
    try:
        found = hesd.block_lanczos(matrix, 8, 3, **options)
    finally:
        emulation.engine().defer(ORDER_AT_ONCE)
    assert found.orthogonality == wanted.orthogonality
    for one, other in zip(found.diagonal + found.offdiagonal, wanted.diagonal + wanted.offdiagonal, strict=True):
        assert np.array_equal(one, other)


def test_a_basis_on_a_device_goes_to_its_host_where_it_does_not_fit(monkeypatch, tmp_path):
    def planned(available, basis="auto", **options):
        return hesd_basis.plan_basis(
            100, 12, 10**6, torch.float32, basis=basis, available=available, device=torch.device("cuda"), **options
        )

    assert planned(10**9).place == "memory"
    working, staging = 12 * 10**6 * 4, 2 * 100 * 65536 * 4
    assert planned(working + staging).place == "host"
    with pytest.raises(PlanError, match=r"and two tiles of the basis 0.0 GiB, but .* are available"):
        planned(working + staging - 1)
    assert planned(10**9, "host").place == "host"
    assert planned(10**9, tmp_path).place == "disk"
    emulation.use_emulated_engine(monkeypatch)
    tiles = planned(10**9, "host").allocate()
    assert [tuple(tile.shape) for tile in tiles] == [(100, 65536)] * 15 + [(100, 10**6 - 15 * 65536)]
    assert all(tile.device.type == "cpu" for tile in tiles)
    monkeypatch.setattr(hesd_basis, "available_memory", lambda: 10**6)
    with pytest.raises(PlanError, match=r"of the host's memory .* are available; take fewer steps"):
        planned(10**9, "host")
    with pytest.raises(PlanError, match=r"are available on cuda; take fewer steps, .* basis=\"host\""):
        planned(10**7, "memory")
    with pytest.raises(ProblemError, match="'host', which is for problems on a CUDA device"):
        hesd_basis.plan_basis(0, 3, 10, torch.float32, basis="host", available=None)


def test_memory_of_the_host_is_pinned_as_it_is_and_let_go(monkeypatch):
    pinned, let_go = [], []
    monkeypatch.setattr(_engine, "pin", lambda address, size: pinned.append((address, size)))
    monkeypatch.setattr(_engine, "unpin", let_go.append)
    plan = hesd_basis.BasisPlan(3, 10**5, torch.float32, None, torch.device("cuda"), host=True)
    tiles = plan.allocate()
    assert pinned == [(tiles[0].data_ptr(), 2 * 3 * 65536 * 4)]
    assert plan.bytes == pinned[0][1]
    tiles[1][2].fill_(7.0)
    last = tiles.pop()
    del tiles
    assert not let_go  # a view holds all of it
    assert bool((last[2] == 7.0).all())
    del last
    assert let_go == [pinned[0][0]]

    def refuse(address, size):
        raise EngineError("no more of it")

    monkeypatch.setattr(_engine, "pin", refuse)
    with pytest.raises(PlanError, match=r"pinned memory .* no more of it; give basis=\"disk\""):
        plan.allocate()
    assert len(let_go) == 1


def test_products_may_keep_what_a_basis_elsewhere_leaves(monkeypatch):
    n, device = 30, torch.device("cuda")
    monkeypatch.setattr(memory_budget, "available_memory", lambda device: 10**6)
    working = 4 * 2 * n * 4
    for place, taken in (("memory", 40 * n * 4), ("host", 2 * 40 * n * 4)):  # two tiles come near
        budget = memory_budget.plan_memory(LanczosSettings(2, 22), n, torch.float32, device, basis=place)
        assert budget.basis == hesd_basis.BasisPlan(40, n, torch.float32, None, device, host=place == "host")
        assert budget.products_bytes == (10**6 - working - taken) // 2


@pytest.mark.parametrize("basis_dtype", ["auto", "bfloat16", "float16"])
def test_analyze_gives_the_report_of_the_cpu_kernels(monkeypatch, basis_dtype):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 12), torch.nn.Tanh(), torch.nn.Linear(12, 3))
    data = [(torch.randn(20, 8), torch.randint(3, (20,))) for _ in range(2)]
    loss = hesd.losses.supervised(torch.nn.functional.cross_entropy)
    options = {"max_steps": 12, "basis_dtype": basis_dtype, "progress": False, "hvp": "double_backward"}
    wanted = hesd.analyze(model, loss, data, **options)
    emulation.use_emulated_engine(monkeypatch)
    emulation.engine().take_traffic()
    found = hesd.analyze(model, loss, data, **options)
    assert sum(emulation.engine().take_traffic()) > 0  # it did the work
    assert found.hesd_type == wanted.hesd_type
    assert all(check.passed for check in found.checks)
    for name in ("lambda_max", "lambda_min", "trace"):
        one, other = getattr(wanted, name).value, getattr(found, name).value
        assert abs(other - one) <= 64 * EPSILON * wanted.trace.value
    assert found.criteria.r_e.value == pytest.approx(wanted.criteria.r_e.value, rel=64 * EPSILON)


@pytest.mark.cuda
@pytest.mark.skipif(not (hesd.build_info()["cuda"] and torch.cuda.is_available()), reason="no GPU, or no CUDA kernels")
@pytest.mark.parametrize("basis", ["memory", "host"])
@pytest.mark.parametrize("mode", ["full", "partial", "window", "none"])
def test_a_problem_on_a_gpu_has_the_spectrum_that_it_has_on_the_cpu(mode, basis):
    reports = []
    for device in ("cpu", "cuda"):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(8, 12), torch.nn.Tanh(), torch.nn.Linear(12, 3)).double().to(device)
        inputs, labels = torch.randn(40, 8, dtype=torch.float64), torch.randint(3, (40,))
        loss = hesd.losses.supervised(torch.nn.functional.cross_entropy)
        options = {"max_steps": 12, "reorthogonalization": mode, "basis": "memory" if device == "cpu" else basis}
        reports.append(hesd.analyze(model, loss, [(inputs, labels)], progress=False, **options))
    on_cpu, on_gpu = reports
    assert on_gpu.hesd_type == on_cpu.hesd_type
    tolerance = 1024 * torch.finfo(torch.float64).eps
    assert on_gpu.lambda_max.value == pytest.approx(on_cpu.lambda_max.value, rel=tolerance)
    assert on_gpu.trace.value == pytest.approx(on_cpu.trace.value, rel=tolerance)


# Bytes. What is ideal is in the contracts; docs/cuda.md has the formulas.

BYTES = {torch.float64: 8, torch.float32: 4, torch.bfloat16: 2, torch.float16: 2}
STORAGE = [*BYTES]
COLUMNS = 8192


def panel(rows, dtype, columns=COLUMNS):
    values = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows))
    return kernels.empty_panel(rows, columns, dtype).copy_(values)


@pytest.fixture
def traffic(monkeypatch):
    """Read, read again from the cache, written: in bytes, since the last call."""
    emulation.use_emulated_engine(monkeypatch)
    emulation.engine().take_traffic()
    return emulation.engine().take_traffic


@pytest.mark.parametrize("storage", STORAGE)
@pytest.mark.parametrize("working", [torch.float64, torch.float32])
@pytest.mark.parametrize(("k", "b"), [(1, 1), (7, 2), (40, 4), (40, 8), (5, 9)])
def test_panels_are_read_once(traffic, storage, working, k, b):
    v, w = panel(k, storage), panel(b, working)
    of_v, of_w = v.numel() * BYTES[storage], w.numel() * BYTES[working]
    passes = -(-b // 8)  # wider blocks are worked on eight rows at a time
    kernels.panel_gram(v, w)
    assert traffic() == (passes * of_v + of_w, 0, 0)
    kernels.panel_project(w, v, torch.ones(k, b, dtype=torch.float64))
    squared = of_w if b > 8 else 0
    assert traffic() == (passes * of_v + of_w + squared, passes * of_v, of_w)
    kernels.panel_project(w, v, torch.ones(k, b, dtype=torch.float64), gram=False, self_gram=False)
    assert traffic() == (passes * of_v + of_w, 0, of_w)
    # The first rows of V that nothing is taken of are read for the Gram matrix alone.
    kernels.panel_project(w, v, torch.ones(k - k // 2, b, dtype=torch.float64), gram_only=k // 2)
    read, again, _ = traffic()
    assert read == passes * of_v + of_w + squared
    assert again == passes * of_v * (k - k // 2) // k


@pytest.mark.parametrize("storage", STORAGE)
@pytest.mark.parametrize("made", STORAGE)
@pytest.mark.parametrize(("k", "r"), [(1, 1), (20, 4), (20, 8), (5, 9)])
def test_combinations_read_the_panel_once_and_write_once(traffic, storage, made, k, r):
    v, x = panel(k, storage), panel(r, made)
    kernels.panel_combine(torch.ones(r, k, dtype=torch.float64), v, x)
    of_v = v.numel() * BYTES[storage]
    assert traffic() == (of_v, of_v * (-(-r // 8) - 1), x.numel() * BYTES[made])


@pytest.mark.parametrize("working", [torch.float64, torch.float32])
@pytest.mark.parametrize("rounds", [1, 2])
def test_a_round_of_orthonormalization_reads_once(traffic, working, rounds):
    w = panel(4, working)
    if (
        rounds == 2
    ):  # rows that lean on each other: a first factor brings them near, a second one makes them orthonormal
        w[1:] += w[0]
    of_w = w.numel() * BYTES[working]
    kernels.panel_orthonormalize(w, tolerance=0.0)
    written = rounds if working == torch.float64 else 1  # float64 rows go back to memory in between
    assert traffic() == ((1 + rounds) * of_w, 0, written * of_w)  # the Gram matrix is one more reading


@pytest.mark.parametrize("working", [torch.float64, torch.float32])
@pytest.mark.parametrize("compensated", [False, True])
def test_accumulation_reads_parts_once_and_moves_out_twice(traffic, working, compensated):
    out = panel(2, working)
    compensation = torch.zeros_like(out) if compensated else None
    parts = [panel(2, torch.bfloat16, length) for length in (3000, 1, 5000)]
    kernels.accumulate_hvp(out, parts, [1, 3001, 3003], 0.5, compensation)
    length = 2 * 8001
    moved = length * BYTES[working] * (2 if compensated else 1)
    assert traffic() == (length * 2 + moved, 0, moved)


@pytest.mark.parametrize("kind", ["rademacher", "gaussian"])
@pytest.mark.parametrize("working", [torch.float64, torch.float32])
def test_probes_are_written_once(traffic, working, kind):
    out = panel(3, working, 1001)
    kernels.fill_probes(out, 1, first_index=3, kind=kind)
    assert traffic() == (0, 0, out.numel() * BYTES[working])


# Launches


def test_all_tensors_of_a_batch_are_accumulated_by_one_launch(traffic):
    out = panel(2, torch.float32)
    for count, launches in ((1, 1), (150, 1), (512, 1), (513, 2)):
        emulation.engine().take_launches()
        kernels.accumulate_hvp(out, [panel(2, torch.float32, 3)] * count, [3 * i for i in range(count)])
        assert emulation.engine().take_launches() == {"accumulate_hvp": (launches, 0)}


@pytest.mark.parametrize(("mode", "basis_dtype", "most"), [("full", "auto", 24), ("window", "auto", 39)])
def test_launches_of_a_step_do_not_grow(traffic, mode, basis_dtype, most):
    generator = torch.Generator().manual_seed(3)
    matrix = torch.randn(300, 300, generator=generator)
    matrix = (matrix + matrix.T) / 35
    run = start_run(as_operator(matrix), LanczosSettings(4, 15, mode), basis_dtype=basis_dtype)
    launches = []

    def multiply(panels, products):
        torch.mm(panels[""], matrix, out=products[""])
        emulation.engine().take_launches()

    drive({"": run}, multiply, on_step=lambda _: launches.append(emulation.engine().take_launches()))
    assert len(launches) == 15
    assert max(sum(count for count, _ in of_step.values()) for of_step in launches) <= most


def test_document_says_how_much_shared_memory_blocks_have(traffic):
    emulation.engine().take_launches()
    for storage in STORAGE:
        for working in (torch.float64, torch.float32):
            for k, b in [(1, 1), (600, 1), (100, 4), (1000, 4), (240, 8), (299, 8), (510, 8), (513, 8)]:
                v, w = panel(k, storage, 16), panel(b, working, 16)
                kernels.panel_project(w, v, torch.zeros(k, b, dtype=torch.float64))
                kernels.panel_combine(torch.zeros(b, k, dtype=torch.float64), v, w)
            for b in (8, 12, 24):  # as much as any b to 192
                kernels.panel_orthonormalize(panel(b, working, 64))
    document = (Path(__file__).resolve().parents[2] / "docs" / "cuda.md").read_text(encoding="utf-8")
    most = {name: shared for name, (_, shared) in emulation.engine().take_launches().items()}
    assert max(most.values()) <= 99 * 1024  # what every device since compute capability 8.0 has
    for name in ("sweep", "combine", "rows"):
        assert f"| {name} | {most[name]:,} |" in document


# Faults. With sanitizers, tests/native sees more of them.


def run_planted(name, argument=0):
    library = ctypes.CDLL(str(FAULTS))
    library.run_planted_kernel.restype = ctypes.c_char_p
    out, given = np.full(THREADS, -1.0, dtype=np.float32), np.arange(2 * THREADS, dtype=np.float32)
    offset = (-given.ctypes.data // 4) % 4  # elements up to the next 16 bytes
    message = library.run_planted_kernel(
        name.encode(),
        ctypes.c_void_p(out.ctypes.data),
        ctypes.c_void_p(given.ctypes.data + 4 * offset),
        ctypes.c_int64(argument),
    )
    return message.decode(), out


def test_a_missing_barrier_shows():
    handed_over = np.roll(np.arange(THREADS, dtype=np.float32), -(THREADS // 2))
    message, out = run_planted("hand_over", 1)
    assert message == ""
    assert np.array_equal(out, handed_over)
    message, out = run_planted("hand_over", 0)
    assert message == ""
    assert np.isnan(out).any()  # shared memory that nobody had written yet


@pytest.mark.parametrize(
    ("name", "fine", "faulty", "message"),
    [
        ("barrier_for_some", 256, 7, "a __syncthreads that not all threads of the block reach"),
        ("exchange_for_some", 32, 31, "a warp exchange that not all lanes of the warp take part in"),
        ("load_vector", 4, 1, "a 16-byte access of an address that is not a multiple of 16"),
        (
            "too_much_shared",
            99 * 1024,
            99 * 1024 + 1,
            "too_much_shared needs 101377 bytes of shared memory for a block, and this device has 101376",
        ),
    ],
)
def test_what_the_hardware_would_not_do_ends_the_launch(name, fine, faulty, message):
    assert run_planted(name, fine)[0] == ""
    assert message in run_planted(name, faulty)[0]
    assert run_planted(name, fine)[0] == ""  # the next launch is whole


@pytest.mark.parametrize(
    ("by_copy", "length", "signal_number"),
    [(True, THREADS, 0), (False, THREADS, signal.SIGSEGV), (True, THREADS + 1, signal.SIGSEGV)],
)
def test_memory_of_the_device_is_out_of_the_hosts_reach(by_copy, length, signal_number):
    code = f"""import ctypes
planted = ctypes.CDLL({str(FAULTS)!r})
planted.reach_device_memory.restype = ctypes.c_float
assert planted.reach_device_memory(ctypes.c_bool({by_copy}), ctypes.c_int64({length})) == 1.0"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ended.returncode == -signal_number, ended.stderr


@pytest.mark.parametrize("order", [ORDER_AT_ONCE, ORDER_FIRST, ORDER_LAST, *ORDERS_AT_RANDOM])
def test_a_stream_that_does_not_wait_for_another_shows(order):
    planted = ctypes.CDLL(str(FAULTS))
    planted.read_across_streams.restype = ctypes.c_float
    assert planted.read_across_streams(ctypes.c_bool(True), ctypes.c_int64(order)) == 1.0
    if order in (ORDER_AT_ONCE, ORDER_FIRST, ORDER_LAST):
        found = planted.read_across_streams(ctypes.c_bool(False), ctypes.c_int64(order))
        assert found == (0.0 if order == ORDER_FIRST else 1.0)


def test_warp_functions_give_what_they_should():
    assert np.array_equal(run_planted("warp_functions")[1], np.ones(THREADS))
    sums = 31 * 32 / 2 * (1 + np.arange(8))
    assert np.array_equal(run_planted("warp_sums")[1], np.tile(np.repeat(sums, 4), THREADS // 32))
