"""Problems whose parameters lie on a device: everything that they go through, and what the host waits for."""

from __future__ import annotations

from types import SimpleNamespace

import cuda_bench
import pytest
import torch
from catalogue import CATALOGUE, Case
from devices import REAL, TYPE, move, used_the_cuda_kernels
from fake_cuda import count_waits

import hesd_fast as hesd
from hesd_fast import kernels
from hesd_fast.errors import EngineError, OperatorError, ProblemError
from hesd_fast.hvp import ALL_STRATEGIES
from hesd_fast.lanczos import basis_storage as hesd_basis
from hesd_fast.operators import EmpiricalFisherOperator, GaussNewtonOperator, HessianOperator
from hesd_fast.problem import softmax_cross_entropy
from hesd_fast.problem.problem import Problem

EPSILON = torch.finfo(torch.float32).eps
NUMBERS = ("lambda_max", "lambda_min", "trace")
LOSS = hesd.losses.supervised(torch.nn.functional.cross_entropy)

# These tests' own models and losses make tensors on the CPU, or reach weights that moving a model does not find.
ON_THE_CPU = ("linear", "kept-reference", "kept-reference-later", "attention-eager-full", "attention-eager-grouped")
ON_THE_CPU += ("fourier", "slopes")
# A GPU draws other random numbers than the CPU.
OTHER_NUMBERS = pytest.mark.skipif(REAL, reason="a GPU draws other random numbers")
DRAWS = ("-train", "dropout")
# PyTorch's CUDA kernel has 1 / 6 in float32, also for float64.
FLOAT32_CONSTANTS = ("activation-hardswish",)
# PyTorch has code for CUDA alone here, or none for this device's sparse tensors.
FOR_CUDA_ALONE = ("gru", "lstm", "lstm-bidirectional", "lstm-packed", "sparse-gradient")


def model_and_data(*sizes, classes=3):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 12), torch.nn.Tanh(), torch.nn.Linear(12, classes))
    return model, [(torch.randn(rows, 8), torch.randint(classes, (rows,))) for rows in sizes or (20, 12)]


def probes_for(operator, count):
    panel = kernels.empty_panel(count, operator.size, device=operator.device)
    kernels.fill_probes(panel, 1)
    return panel


def assert_close(found, wanted, tolerance=256 * EPSILON):
    """Reports agree to a part of their largest number: a device adds in another order, in every product of a run."""
    scale = max(abs(getattr(wanted, name).value) for name in NUMBERS)
    for name in NUMBERS:
        assert abs(getattr(found, name).value - getattr(wanted, name).value) <= tolerance * scale
    assert found.hesd_type == wanted.hesd_type


@pytest.mark.parametrize("hvp", [*ALL_STRATEGIES, "auto"])
def test_analyze_by_every_strategy(device, hvp):
    model, batches = model_and_data()
    options = {"max_steps": 12, "progress": False, "hvp": hvp}
    wanted = hesd.analyze(model, LOSS, batches, **options)
    assert used_the_cuda_kernels() is not True
    state = {name: value.clone() for name, value in model.state_dict().items()}
    found = hesd.analyze(move(model), LOSS, batches, **options)  # batches on the CPU, as a DataLoader makes them
    assert used_the_cuda_kernels() is not False
    # A difference of two gradients has their rounding over its step: traces differ by 22 sqrt(EPSILON) on an H200.
    assert_close(found, wanted, **({"tolerance": 64 * EPSILON**0.5} if "differences" in hvp else {}))
    assert all(check.passed for check in found.checks)
    for name, value in model.state_dict().items():
        assert value.device.type == TYPE
        assert torch.equal(value.cpu(), state[name])


@pytest.mark.parametrize("case", [case for case in CATALOGUE if case.name not in ON_THE_CPU + FOR_CUDA_ALONE], ids=str)
def test_products_of_every_model(device, case: Case):
    if REAL and any(word in case.name for word in DRAWS):
        pytest.skip("a GPU draws other random numbers")
    found = []
    for move_it in (False, True):
        torch.manual_seed(0)
        model, loss, data = case.build()
        operator = HessianOperator(
            Problem(move(model) if move_it else model, loss, data, mode=case.mode), hvp="double_backward"
        )
        panel = torch.randn(3, operator.size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        panel = panel.to(operator.device, operator.dtype)
        try:
            found.append(operator.matmat(panel))
        except OperatorError as error:  # no second derivative
            found.append(str(error))
    on_cpu, on_device = found
    if isinstance(on_cpu, str):
        assert on_device == on_cpu
        return
    assert on_device.device.type == TYPE
    tolerance = 16 * case.tolerance if REAL else case.tolerance  # a GPU adds in another order
    if REAL and case.name in FLOAT32_CONSTANTS:
        tolerance = EPSILON
    assert torch.linalg.vector_norm(on_device.cpu() - on_cpu) <= tolerance * torch.linalg.vector_norm(on_cpu)


@pytest.mark.parametrize("kind", [GaussNewtonOperator, EmpiricalFisherOperator])
@pytest.mark.parametrize("jvp", ["forward", "reverse", "auto"])
def test_gauss_newton_and_fisher(device, kind, jvp):
    model, batches = model_and_data()
    problem = Problem(model, LOSS, batches)
    panel = kernels.empty_panel(3, problem.size)
    kernels.fill_probes(panel, 1)
    wanted = kind(problem, jvp=jvp).matmat(panel)
    found = kind(Problem(move(model), LOSS, batches), jvp=jvp).matmat(panel.to(device))
    assert (found.cpu() - wanted).abs().max() <= 64 * EPSILON * wanted.abs().max()


def test_forward_mode_that_runs_out_of_memory_gives_way_to_reverse_mode(device, monkeypatch):
    model, batches = model_and_data()
    operator = GaussNewtonOperator(Problem(move(model), LOSS, batches))
    panel = probes_for(operator, 2)
    wanted = operator.matmat(panel).cpu()
    operator = GaussNewtonOperator(Problem(model, LOSS, batches))

    def too_much(*_):
        raise torch.cuda.OutOfMemoryError("too much")

    monkeypatch.setattr(operator, "_forward", too_much)
    assert (operator.matmat(panel).cpu() - wanted).abs().max() <= 64 * EPSILON * wanted.abs().max()
    assert operator.reason == "too much"


@pytest.mark.parametrize("basis_dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("basis", ["memory", "host", "disk"])
@pytest.mark.parametrize("mode", ["full", "partial", "window", "none"])
def test_block_lanczos_with_every_place_of_the_basis(device, monkeypatch, tmp_path, mode, basis, basis_dtype):
    monkeypatch.setattr(hesd_basis, "TILE_COLUMNS", 128)  # several tiles
    generator = torch.Generator().manual_seed(1)
    matrix = torch.randn(500, 500, generator=generator)
    matrix = (matrix + matrix.T) / 60
    options = {"reorthogonalization": mode, "basis_dtype": basis_dtype}
    wanted = hesd.block_lanczos(matrix, 9, 3, **options)
    assert used_the_cuda_kernels() is not True
    found = hesd.block_lanczos(matrix.to(device), 9, 3, basis=tmp_path if basis == "disk" else basis, **options)
    assert used_the_cuda_kernels() is not False
    nothing_kept = mode == "none"
    assert found.basis_place == ("memory" if nothing_kept else basis)
    nodes = [hesd.SpectralMeasure.from_tridiagonal(one).nodes[0] for one in (found, wanted)]  # rows may change places
    # both store the same rounded vectors: what differs is the order of sums
    assert abs(nodes[0] - nodes[1]).max() <= 64 * EPSILON * float(torch.linalg.matrix_norm(matrix, 2))


def test_probes_may_lie_elsewhere(device):
    matrix = torch.diag(torch.linspace(-1, 3, 60))
    probes = torch.randn(2, 60, generator=torch.Generator().manual_seed(0))
    wanted = hesd.block_lanczos(matrix, 4, probes=probes)
    found = hesd.block_lanczos(matrix.to(device), 4, probes=probes)
    assert abs(found.diagonal[-1] - wanted.diagonal[-1]).max() <= 32 * EPSILON * float(matrix.max())


class Operator:
    """A linear operator as curvlinops has them, on the device that is current."""

    def __init__(self, matrix):
        self.matrix, self.shape, self.dtype, self.device = matrix, matrix.shape, matrix.dtype, torch.device(TYPE)

    def __matmul__(self, columns):
        return self.matrix @ columns


def test_a_linear_operator_may_leave_the_number_of_its_device_out(device):
    matrix = torch.diag(torch.linspace(-1, 3, 60)).to(device)
    wanted = hesd.block_lanczos(matrix, 4, 2)
    found = hesd.block_lanczos(Operator(matrix), 4, 2)
    assert abs(found.diagonal[-1] - wanted.diagonal[-1]).max() <= 32 * EPSILON * float(matrix.max())


@pytest.mark.parametrize("groups", ["modules", "parameters"])
def test_groups(device, groups):
    model, batches = model_and_data()
    options = {"max_steps": 5, "progress": False}
    wanted = hesd.analyze_groups(model, LOSS, batches, groups=groups, **options)
    found = hesd.analyze_groups(move(model), LOSS, batches, groups=groups, **options)
    assert used_the_cuda_kernels() is not False
    for name, report in wanted.items():
        assert_close(found[name], report)


@pytest.mark.parametrize("mode", ["eval", pytest.param("train", marks=OTHER_NUMBERS)])
def test_buffers_and_random_numbers(device, mode):
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Linear(8, 10), torch.nn.BatchNorm1d(10), torch.nn.Dropout(0.3), torch.nn.Tanh(), torch.nn.Linear(10, 3)
    )
    _, batches = model_and_data()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    options = {"max_steps": 6, "progress": False, "hvp": "double_backward"}
    wanted = hesd.analyze(hesd.Problem(model, LOSS, batches, mode=mode), **options)
    found = hesd.analyze(hesd.Problem(move(model), LOSS, batches, mode=mode), **options)
    assert_close(found, wanted)
    assert all(torch.equal(value.cpu(), before[name]) for name, value in model.state_dict().items())


def test_report_plan_and_scipy(device, tmp_path):
    model, batches = model_and_data()
    problem = hesd.Problem(move(model), LOSS, batches)
    report = hesd.analyze(problem, max_steps=6, progress=False)
    report.save(tmp_path / "run.hesd.json")
    assert hesd.load_report(tmp_path / "run.hesd.json").lambda_max == report.lambda_max
    assert REAL or report.cost.peak_bytes == 2**20  # the device's
    assert REAL or report.versions["device"] == device
    (determinism,) = (check for check in report.checks if check.name == "determinism")
    assert "allowed 0.00012" in determinism.detail  # sums of a GPU come in any order
    plan = hesd.plan(problem, max_steps=6)
    assert plan.peak_bytes is None
    assert all(trial.peak_bytes is None for trial in plan.products.trials)
    vector = torch.randn(problem.size)
    product = HessianOperator(problem).to_scipy() @ vector.numpy()
    wanted = HessianOperator(problem).matmat(vector[None].to(device)).cpu().numpy()[0]
    assert abs(product - wanted).max() <= 16 * EPSILON * abs(wanted).max()


@pytest.mark.parametrize("which", ["LA", "BE"])
def test_eigenpairs(device, which, tmp_path):
    model, batches = model_and_data()
    wanted = hesd.eigsh(hesd.Problem(model, LOSS, batches), 3, which)
    assert used_the_cuda_kernels() is not True
    found = hesd.eigsh(hesd.Problem(move(model), LOSS, batches), 3, which)
    assert used_the_cuda_kernels() is not False
    assert found.panel.device.type == TYPE
    assert found.converged.all()
    assert found.complete
    scale = abs(wanted.values).max()
    assert abs(found.values - wanted.values).max() <= 64 * EPSILON * scale
    assert (found.residuals <= found.tolerance).all()
    found.save(tmp_path / "pairs")
    again = hesd.load_eigenpairs(tmp_path / "pairs")
    assert torch.equal(again.panel, found.panel.cpu())
    assert list(again.vectors[0]) == list(found.vectors[0]) == ["0.weight", "0.bias", "2.weight", "2.bias"]


def test_large_cross_entropies(device, monkeypatch):
    monkeypatch.setattr(softmax_cross_entropy, "CUDA_CHUNK", 7 * 6)  # several chunks
    assert len(softmax_cross_entropy._chunks(torch.zeros(20, 7, device=device))) == 4
    model, batches = model_and_data(20, 12, classes=7)
    options = {"max_steps": 5, "progress": False}
    wanted = hesd.analyze(model, LOSS, batches, **options)
    assert_close(hesd.analyze(move(model), LOSS, batches, **options), wanted)


def test_devices_that_do_not_fit_are_named(device):
    model, batches = model_and_data()
    move(model[0])
    with pytest.raises(ProblemError, match=rf"{TYPE}:0"):
        Problem(model, LOSS, batches)
    panel = kernels.empty_panel(2, 10, device=device)
    with pytest.raises(EngineError, match="`V` is on the CPU and `W` on cuda:0; wanted both on one device"):
        kernels.panel_gram(torch.zeros(2, 10), panel)
    problem = Problem(move(model), LOSS, batches)
    with pytest.raises(OperatorError, match=f"is on cpu; give it on {TYPE}:0"):
        HessianOperator(problem).matmat(torch.zeros(1, problem.size))


def test_what_a_device_says_is_not_taken_for_batches_elsewhere(device):
    model, batches = model_and_data()

    def loss(model, batch):
        raise RuntimeError("CUDA error: device-side assert triggered")

    with pytest.raises(RuntimeError, match=r"^CUDA error: device-side assert triggered$"):
        Problem(move(model), loss, batches).prepare()


def test_a_device_without_kernels_is_refused_before_any_work(device, monkeypatch):
    model, batches = model_and_data()
    monkeypatch.setattr(kernels, "_engine", SimpleNamespace(build_info=lambda: {"cuda": False}))

    def loss(model, batch):
        raise AssertionError("not to be computed")

    with pytest.raises(EngineError, match=f"the problem is on {TYPE}:0; this build has kernels for the CPU only"):
        hesd.analyze(move(model), loss, batches)


def test_batches_that_a_loss_leaves_on_the_cpu_are_named(device):
    model, batches = model_and_data()

    def loss(model, batch):
        return torch.nn.functional.cross_entropy(model(batch[0]), batch[1])

    problem = Problem(move(model), loss, batches)
    with pytest.raises(ProblemError, match=rf"batch\[0\] of batch 0 of the data is on cpu and .* on {TYPE}:0; give"):
        HessianOperator(problem).matmat(torch.zeros(1, problem.size, device=device))
    problem = Problem(model, loss, [(x.to(device), y.to(device)) for x, y in batches])
    assert hesd.analyze(problem, max_steps=3, progress=False).lambda_max.value > 0


# What the host waits for

KEEP_WHAT_THEY_NEED = ("kept_graph", "kept_graph_batched", "compiled")


def waits_of_a_product(operator):
    panel = probes_for(operator, 2)
    operator.matmat(panel)  # prepares and checks
    with count_waits() as waits:
        operator.matmat(panel)
    return waits()


@pytest.mark.skipif(REAL, reason="waits are counted on the fake CUDA device")
@pytest.mark.parametrize("hvp", [name for name in ALL_STRATEGIES if "differences" not in name])
@pytest.mark.parametrize("on_device", [False, True])
def test_waits_of_a_product_do_not_grow_with_batches_or_parameters(device, hvp, on_device):
    found = []
    for layers, sizes in ((1, (8, 8)), (4, (8, 8, 8, 8, 8, 8, 8))):
        torch.manual_seed(0)
        model = torch.nn.Sequential(
            *(layer for _ in range(layers) for layer in (torch.nn.Linear(8, 8), torch.nn.Tanh()))
        )
        batches = [(torch.randn(rows, 8), torch.randint(8, (rows,))) for rows in sizes]
        if on_device:
            batches = [(x.to(device), y.to(device)) for x, y in batches]
        waits = waits_of_a_product(HessianOperator(Problem(move(model), LOSS, batches), hvp=hvp))
        # the losses and whether the products are finite; inputs and targets on their way from the CPU
        found.append(waits - (0 if on_device or hvp in KEEP_WHAT_THEY_NEED else 2 * len(sizes)))
    assert found[0] == found[1] <= 2


@pytest.mark.skipif(REAL, reason="waits are counted on the fake CUDA device")
@pytest.mark.parametrize("kind", [GaussNewtonOperator, EmpiricalFisherOperator])
@pytest.mark.parametrize("jvp", ["forward", "reverse"])
def test_waits_of_other_matrices_do_not_grow_either(device, kind, jvp):
    found = []
    for sizes in ((8, 8), (8, 8, 8, 8, 8)):
        model, batches = model_and_data(*sizes)
        batches = [(x.to(device), y.to(device)) for x, y in batches]
        found.append(waits_of_a_product(kind(Problem(move(model), LOSS, batches), jvp=jvp)))
    assert found[0] == found[1] <= 2


def test_data_on_a_device_is_read_again_when_it_has_changed(device):
    model, batches = model_and_data()
    batches = [(x.to(device), y.to(device)) for x, y in batches]
    operator = HessianOperator(Problem(move(model), LOSS, batches), hvp="double_backward")
    panel = probes_for(operator, 1)
    operator.matmat(panel)
    batches[0][0].add_(0.0)  # written to, and as it was
    operator.matmat(panel)
    batches[1] = tuple(part.clone() for part in batches[1])  # another tensor of the same numbers
    operator.matmat(panel)
    batches[1][0].add_(1.0)
    with pytest.raises(ProblemError, match="batch 1 differs from that of the first pass"):
        operator.matmat(panel)


def test_the_bench_of_the_kernels_works(device, monkeypatch):
    monkeypatch.setattr(cuda_bench, "run", lambda work: (work(), 1e-3)[1])
    cuda_bench.check(device, 5_003)
    rows = cuda_bench.measure(device, 4_096, 12)
    assert len(rows) == 2 * 3 * len(cuda_bench.KERNELS)
    assert all(row["bytes"] > 0 and row["share_of_copy"] > 0 for row in rows)
