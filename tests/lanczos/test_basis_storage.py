"""Where the Lanczos basis lies and in what precision: what is chosen, what is refused, what is left behind."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from matrices import DTYPES, matrix_with
from spectra import distance, hessian_like, quadrature
from torch import nn

import hesd_fast as hesd
import hesd_fast.lanczos.basis_storage as basis_module
import hesd_fast.lanczos.memory_budget as budget_module
from hesd_fast.choices import REORTHOGONALIZATIONS
from hesd_fast.cli.main import main
from hesd_fast.errors import PlanError, ProblemError
from hesd_fast.lanczos.basis_storage import default_directory, plan_basis
from hesd_fast.lanczos.drive import block_lanczos

F32, F64 = torch.float32, torch.float64


@pytest.fixture
def scratch(tmp_path, monkeypatch):
    """An empty directory on a disk, which bases on disk take."""
    with contextlib.ExitStack() as stack:
        folder = tmp_path / "scratch"
        folder.mkdir()
        if basis_module._in_memory(folder):
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(dir="/var/tmp")))
        if basis_module._in_memory(folder):
            pytest.skip("temporary directories lie in memory here, where no basis goes")
        monkeypatch.setenv("HESD_FAST_SCRATCH", str(folder))
        yield folder


def plan(rows=10, columns=1000, working=F32, available=None, **options):
    return plan_basis(rows, 6, columns, working, available=available, **options)


def test_memory_is_taken_where_the_basis_fits_and_else_the_disk(scratch):
    working, kept = 6 * 1000 * 4, 10 * 1000 * 4
    assert plan(available=working + kept).place == "memory"
    assert plan(available=None).place == "memory"
    on_disk = plan(available=working + kept - 1)
    assert (on_disk.place, on_disk.directory) == ("disk", scratch)
    assert plan(available=working + kept // 2, basis_dtype="bfloat16").place == "memory"
    assert plan(basis="disk", available=10**12).directory == scratch
    assert plan(basis=scratch, available=10**12).directory == scratch
    assert plan(basis=str(scratch), available=10**12).directory == scratch


@pytest.mark.parametrize("place", ["memory", "disk"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", torch.float16])
def test_a_plan_takes_the_bytes_that_it_says_and_gives_the_panel(scratch, place, dtype, monkeypatch):
    monkeypatch.setattr(basis_module, "TILE_COLUMNS", 512)
    chosen = plan(basis=place, basis_dtype=dtype)
    panel = chosen.allocate()
    tiles = panel if isinstance(panel, list) else [panel]
    assert [tile.shape[1] for tile in tiles] == ([512, 488] if place == "disk" else [1000])
    assert all(tile.shape[0] == 10 and tile.dtype == chosen.dtype for tile in tiles)
    columns = 1024 if place == "disk" else 1000
    assert chosen.bytes == 10 * columns * chosen.dtype.itemsize


@pytest.mark.parametrize("basis", ["memory", "disk", "auto"])
@pytest.mark.parametrize("steps", [1, 2])
def test_a_basis_of_no_vectors_needs_no_file(scratch, basis, steps):
    tridiagonal = block_lanczos(matrix_with(hessian_like(30)), steps, 2, basis=basis)
    assert tridiagonal.steps == steps
    assert block_lanczos(matrix_with(hessian_like(30)), 5, 2, basis=basis, reorthogonalization="none").steps == 5
    assert list(scratch.iterdir()) == []


REFUSED = [
    ({"basis": "nowhere at all"}, ProblemError, "'nowhere at all', which is no directory"),
    ({"basis": Path("/no/such/directory")}, ProblemError, "'/no/such/directory', which is no directory"),
    ({"basis": 3}, ProblemError, "basis is 3; wanted one of"),
    ({"basis": None}, ProblemError, "basis is None; wanted one of"),
    ({"basis_dtype": "int8"}, ProblemError, "basis_dtype is 'int8'; wanted 'auto' or one of"),
    ({"basis_dtype": torch.int32}, ProblemError, r"basis_dtype is torch\.int32"),
    ({"basis_dtype": 16}, ProblemError, "basis_dtype is 16"),
    ({"basis_dtype": "float64"}, ProblemError, "basis_dtype is float64, but the products are in float32"),
    ({"basis_dtype": torch.float64}, ProblemError, "the same precision or a lower one"),
]


@pytest.mark.parametrize(("options", "error", "message"), REFUSED)
def test_what_does_not_exist_is_refused(scratch, options, error, message):
    with pytest.raises(error, match=message):
        plan(**options)


def test_a_file_is_no_directory(scratch):
    (scratch / "file").write_text("")
    with pytest.raises(ProblemError, match="which is no directory"):
        plan(basis=scratch / "file")


def test_a_wrong_scratch_directory_is_named(monkeypatch):
    monkeypatch.setenv("HESD_FAST_SCRATCH", "/no/such/scratch")
    with pytest.raises(ProblemError, match="HESD_FAST_SCRATCH is '/no/such/scratch', which is no directory"):
        plan(basis="disk")
    monkeypatch.setenv("HESD_FAST_SCRATCH", "")
    assert default_directory().is_dir()


def test_a_basis_that_fits_nowhere_is_refused_with_what_it_takes(scratch, monkeypatch):
    with pytest.raises(PlanError, match="10 vectors of 1000 float32, and 6 of float32"):
        plan(basis="memory", available=1000)
    with pytest.raises(PlanError, match=r"three blocks of 2 vectors of 1000 float32 take .* take a smaller block"):
        plan(basis="disk", available=1000)
    full = SimpleNamespace(total=10**6, used=10**6, free=0)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: full)
    with pytest.raises(PlanError, match=r"has 0\.0 GiB free"):
        plan(basis="disk")
    with pytest.raises(PlanError, match=r"has 0\.0 GiB free"):
        plan(available=6 * 1000 * 4 + 1)


def test_a_directory_in_memory_is_refused():
    if not basis_module._in_memory(Path("/dev/shm")):
        pytest.skip("/dev/shm is not in memory on this system")
    with pytest.raises(PlanError, match="/dev/shm lies in memory itself"):
        plan(basis="/dev/shm")
    assert not basis_module._in_memory(Path("/proc"))


def test_a_disk_that_is_full_when_the_file_is_made_is_an_error_by_name(scratch, monkeypatch):
    if not hasattr(os, "posix_fallocate"):
        pytest.skip("this system cannot take disk space ahead")

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(PlanError, match=f"cannot be made in {scratch}: .*No space left"):
        block_lanczos(matrix_with(hessian_like(50)), 10, 2, basis="disk")
    assert list(scratch.iterdir()) == []


def test_a_directory_that_cannot_be_written_to_is_an_error_by_name():
    if not sys.platform.startswith("linux"):
        pytest.skip("a directory that nobody can write to is only known on Linux")
    with pytest.raises(PlanError, match=r"(cannot be made in /proc|/proc has)"):
        block_lanczos(matrix_with(hessian_like(50)), 10, 2, basis="/proc")


@pytest.mark.parametrize("mode", REORTHOGONALIZATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("basis_dtype", ["auto", "float32", "bfloat16", "float16"])
def test_the_disk_changes_nothing_in_any_mode(scratch, monkeypatch, mode, dtype, basis_dtype):
    matrix = matrix_with(hessian_like(), dtype)

    def both(steps, block):
        options = {"reorthogonalization": mode, "window": 4 * block, "basis_dtype": basis_dtype, "seed": 3}
        results = [block_lanczos(matrix, steps, block, basis=place, **options) for place in ("memory", "disk")]
        kept = str(dtype).removeprefix("torch.") if basis_dtype == "auto" else basis_dtype
        assert [result.basis_dtype for result in results] == [kept, kept]
        return [result.to_dict() | {"basis_place": None} for result in results], results

    dicts, (memory, _) = both(12, 3)
    in_place = mode in ("full", "partial") and memory.basis_dtype == str(dtype).removeprefix("torch.")
    if not in_place:  # one tile and the same order of sums: the same bits
        assert dicts[0] == dicts[1]
    # Many tiles, the last one short: sums in another order, which the recurrence passes on; entries may even
    # swap, where two vectors of a block tie for the pivot. What was kept in fewer bits
    # than the products may round to the neighbour, so the scale of that precision counts.
    monkeypatch.setattr(basis_module, "TILE_COLUMNS", 77)
    epsilon = torch.finfo(dtype if basis_dtype == "auto" else basis_module.BASIS_DTYPES[basis_dtype]).eps
    epsilon = max(epsilon, torch.finfo(dtype).eps)
    _, (memory, disk) = both(4, 3)
    assert distance(quadrature(memory), quadrature(disk)) <= 32 * epsilon * 10.0
    _, (memory, disk) = both(20, 3)
    extremes = [0, -3, -2, -1]
    np.testing.assert_allclose(memory.ritz()[0][extremes], disk.ritz()[0][extremes], rtol=0, atol=8 * epsilon * 10.0)


@pytest.mark.parametrize("columns", [1, 2, 6, 7, 8, 13, 14, 15])
@pytest.mark.parametrize("mode", REORTHOGONALIZATIONS)
def test_tiles_around_the_length_of_the_vectors(scratch, monkeypatch, columns, mode):
    monkeypatch.setattr(basis_module, "TILE_COLUMNS", 7)
    matrix = matrix_with(np.linspace(1, 2, columns))
    tridiagonal = block_lanczos(matrix, columns, 1, basis=scratch, reorthogonalization=mode)
    values, _, residuals = tridiagonal.ritz()
    distance = np.abs(values[:, None] - np.linspace(1, 2, columns)[None, :]).min(axis=1)
    assert (distance <= residuals + 64 * 2.0**-52 * 2).all()
    if mode in ("full", "partial"):
        assert tridiagonal.orthogonality <= (8 * 2.0**-26 if mode == "partial" else 32 * 2.0**-52)


@pytest.mark.parametrize("basis", ["memory", "disk"])
def test_blocks_that_shrink_leave_nothing_stale_on_disk(scratch, monkeypatch, basis):
    monkeypatch.setattr(basis_module, "TILE_COLUMNS", 32)
    eigenvalues = np.zeros(100)
    eigenvalues[:6] = np.linspace(1, 2, 6)
    for mode in REORTHOGONALIZATIONS:
        tridiagonal = block_lanczos(matrix_with(eigenvalues), 6, 4, basis=basis, reorthogonalization=mode, window=12)
        assert tridiagonal.block_sizes[:3] == (4, 4, 2)
        assert tridiagonal.recurrence_error <= 64 * 2.0**-52 * 2


def test_no_file_is_seen_while_a_run_goes_on_and_none_after(scratch):
    seen = []
    block_lanczos(
        matrix_with(hessian_like(50)), 8, 2, basis="disk", on_step=lambda _: seen.append(list(scratch.iterdir()))
    )
    assert seen == [[]] * 8
    assert list(scratch.iterdir()) == []


def test_an_interrupted_run_gives_its_space_back(scratch):
    class Operator:
        size, dtype, device, products = 200_000, F32, torch.device("cpu"), 0

        def matmat(self, panel, out=None):
            self.products += 1
            if self.products == 4:
                raise KeyboardInterrupt
            return torch.mul(panel, torch.arange(self.size), out=out)

    with pytest.raises(KeyboardInterrupt):
        block_lanczos(Operator(), 40, 1, basis="disk")
    assert list(scratch.iterdir()) == []
    if Path("/proc/self/maps").exists():
        assert str(scratch) not in Path("/proc/self/maps").read_text()


CHILD = """
import sys, time, torch
from hesd_fast.lanczos.drive import block_lanczos

class Operator:
    size, dtype, device, products = 1 << 20, torch.float32, torch.device("cpu"), 0

    def matmat(self, panel, out=None):
        self.products += 1
        if self.products == 5:
            print("ready", flush=True)
            time.sleep(120)
        return torch.mul(panel, torch.arange(self.size), out=out)

block_lanczos(Operator(), 66, 1, basis=sys.argv[1])
"""


def test_a_killed_process_leaves_neither_a_file_nor_taken_space(scratch):
    if not hasattr(os, "posix_fallocate"):
        pytest.skip("this system cannot take disk space ahead")
    size = 64 * (1 << 20) * 4
    before = shutil.disk_usage(scratch).free
    command = [sys.executable, "-c", CHILD, str(scratch)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        try:
            assert child.stdout is not None
            assert child.stdout.readline() == "ready\n"
            assert list(scratch.iterdir()) == []
            during = shutil.disk_usage(scratch).free
        finally:
            child.kill()
    assert child.returncode == -signal.SIGKILL
    assert list(scratch.iterdir()) == []
    # others may write to the same disk meanwhile: half of the file's size tells
    assert before - during > size // 2
    for _ in range(100):  # a file system may take its time
        if shutil.disk_usage(scratch).free - during > size // 2:
            break
        time.sleep(0.1)
    else:
        pytest.fail("the space of the file was not given back in 10 seconds")


def test_reads_of_the_basis_are_counted():
    steps, block = 7, 2
    full = block_lanczos(matrix_with(hessian_like(60)), steps, block)
    # One Gram matrix and two projections of the last two blocks, a Gram matrix and one projection of the older ones.
    recent = 3 * block + 3 * 2 * block * (steps - 1)
    once = recent + sum(2 * (step - 1) * block for step in range(2, steps))
    assert full.basis_vectors_read == once
    none = block_lanczos(matrix_with(hessian_like(60)), steps, block, reorthogonalization="none")
    assert none.basis_vectors_read == 3 * block + 3 * 2 * block * (steps - 1)
    again = hesd.BlockTridiagonal.from_dict(full.to_dict())
    assert again.basis_vectors_read == full.basis_vectors_read
    assert (again.basis_place, again.basis_dtype) == ("memory", "float64")


@pytest.mark.parametrize("mode", ["full", "partial", "window"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("working", DTYPES)
def test_16_bits_move_eigenvalues_by_little(mode, dtype, working):
    # A stored unit vector is off by half an epsilon, which meets a product of length at most 10 along one of sqrt(n)
    # directions; the projections on 40 older vectors add up.
    eigenvalues = hessian_like(1000)
    tridiagonal = block_lanczos(
        matrix_with(eigenvalues, working), 20, 2, reorthogonalization=mode, basis_dtype=dtype, window=40
    )
    values, _, residuals = tridiagonal.ritz()
    error = 0.5 * torch.finfo(getattr(torch, dtype)).eps * 10.0 * (40 / 1000) ** 0.5
    for wanted in (10.0, 5.0, 2.0, 1.0, -0.7):
        assert np.abs(values - wanted).min() <= error
    assert (np.abs(values[:, None] - eigenvalues[None, :]).min(axis=1) <= residuals + error).all()


def problem(size=40):
    torch.manual_seed(0)
    return hesd.Problem(
        nn.Linear(size, 4), hesd.losses.supervised(nn.MSELoss()), (torch.randn(60, size), torch.randn(60, 4))
    )


def test_analyze_passes_basis_on_and_records_it(scratch):
    reports = {}
    for basis, dtype in (("auto", "auto"), ("disk", torch.bfloat16), (scratch, "float16")):
        report = hesd.analyze(problem(), max_steps=6, block_size=2, basis=basis, basis_dtype=dtype, progress=False)
        reports[str(dtype)] = report.options["basis"], report.options["basis_dtype"]
    assert list(reports.values()) == [("memory", "float32"), ("disk", "bfloat16"), ("disk", "float16")]


def test_analyze_refuses_a_basis_before_any_product(monkeypatch):
    monkeypatch.setattr(hesd.Problem, "prepare", lambda _: pytest.fail("the work began"))
    with pytest.raises(ProblemError, match="no directory"):
        hesd.analyze(problem(), basis="/no/such/place")
    with pytest.raises(ProblemError, match="the same precision or a lower one"):
        hesd.analyze(problem(), basis_dtype="float64")


def test_analyze_goes_to_the_disk_by_itself_when_memory_is_short(scratch, monkeypatch):
    short = 3 * 2 * problem().size * 4 + 100
    monkeypatch.setattr(budget_module, "available_memory", lambda device: short)
    report = hesd.analyze(problem(), max_steps=6, block_size=2, progress=False)
    assert report.options["basis"] == "disk"


PROBLEM = """
import torch
from torch import nn
import hesd_fast as hesd

def build():
    torch.manual_seed(0)
    data = torch.randn(60, 40), torch.randn(60, 4)
    return hesd.Problem(nn.Linear(40, 4), hesd.losses.supervised(nn.MSELoss()), data)
"""


def test_the_command_line_takes_and_records_them(scratch, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "basis_problem.py").write_text(PROBLEM)
    start = ["analyze", "basis_problem.py:build", "--out", "out", "--max-steps", "6", "--block-size", "2"]
    result = CliRunner().invoke(main, [*start, "--basis", str(scratch), "--basis-dtype", "bfloat16"])
    assert result.exit_code == 0, result.output
    options = hesd.load_report(tmp_path / "out" / "report.hesd.json").options
    assert (options["basis"], options["basis_dtype"]) == ("disk", "bfloat16")
    result = CliRunner().invoke(main, [*start, "--basis", "nowhere"])
    assert result.exit_code == 1
    assert "'nowhere', which is no directory" in result.output
    result = CliRunner().invoke(main, [*start, "--basis-dtype", "int8"])
    assert result.exit_code == 2
    assert "int8" in result.output
