"""The whole pipeline on small problems, against their dense Hessians."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from torch import nn

import hesd_fast as hesd
from hesd_fast import HESDType
from hesd_fast.analysis import checks, whole_spectrum
from hesd_fast.engine import memory
from hesd_fast.lanczos.lanczos_run import fill_probes
from hesd_fast.lanczos.options import LanczosSettings
from hesd_fast.report.facts import RunSettings


def trained(dtype=torch.float64, seed=0):
    """A small trained classifier: 6 - 12 - 3, 123 parameters, 60 samples in batches of 25."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(60, 6, dtype=dtype, generator=generator)
    targets = (inputs[:, :3] + 0.8 * torch.randn(60, 3, dtype=dtype, generator=generator)).argmax(1)
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 3)).to(dtype)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(150):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs), targets).backward()
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    batches = list(zip(inputs.split(25), targets.split(25), strict=True))
    return model, hesd.losses.supervised(nn.CrossEntropyLoss()), batches


def dense_eigenvalues(model, batches, criterion=nn.functional.cross_entropy):
    names = [name for name, _ in model.named_parameters()]
    shapes = [p.shape for p in model.parameters()]
    inputs = torch.cat([x for x, _ in batches])
    targets = torch.cat([y for _, y in batches])

    def loss(flat):
        tensors, start = {}, 0
        for name, shape in zip(names, shapes, strict=True):
            tensors[name] = flat[start : start + shape.numel()].view(shape)
            start += shape.numel()
        return criterion(torch.func.functional_call(model, tensors, (inputs,)), targets)

    flat = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
    hessian = torch.autograd.functional.hessian(loss, flat)
    return torch.linalg.eigvalsh(hessian).numpy()


@pytest.fixture(scope="module")
def case():
    model, loss, batches = trained()
    return model, loss, batches, dense_eigenvalues(model, batches)


def test_the_full_space_gives_the_exact_spectrum():
    # a squared error: unlike cross entropy it has no eigenvalue more often than the block is wide
    model, _, batches = trained()
    batches = [(x, torch.sin(x[:, :3])) for x, _ in batches]
    eigenvalues = dense_eigenvalues(model, batches, nn.functional.mse_loss)
    loss = hesd.losses.supervised(nn.MSELoss())
    report = hesd.analyze(model, loss, batches, block_size=3, max_steps=123, tolerance=None, progress=False)
    assert report.cost.hvps == len(eigenvalues) == 123
    tolerance = 64 * 2.0**-52 * np.abs(eigenvalues).max()
    np.testing.assert_allclose(report.measure.nodes[0], eigenvalues, rtol=0, atol=tolerance)
    assert all(check.passed for check in report.checks)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("steps", [5, 15, 30])
def test_intervals_contain_the_truth(case, dtype, steps):
    eigenvalues = case[3]
    model, loss, batches = trained()
    model.to(dtype)
    batches = [(x.to(dtype), y) for x, y in batches]
    report = hesd.analyze(model, loss, batches, max_steps=steps, seed=1, progress=False)
    positive, negative = eigenvalues[eigenvalues > 0].sum(), -eigenvalues[eigenvalues < 0].sum()
    assert report.trace.low <= eigenvalues.sum() <= report.trace.high
    assert report.criteria.balance.low <= (positive - negative) / (positive + negative) <= report.criteria.balance.high
    assert report.criteria.k_mass.low <= negative / positive <= report.criteria.k_mass.high
    if steps >= 15:  # by then the extremes have converged
        assert report.lambda_max.low <= eigenvalues[-1] <= report.lambda_max.high
        assert report.lambda_min.low <= eigenvalues[0] <= report.lambda_min.high
        assert report.criteria.r_e.low <= -eigenvalues[0] / eigenvalues[-1] <= report.criteria.r_e.high
        assert report.hesd_type is HESDType.MP


def test_a_negated_loss_mirrors_everything(case):
    model, loss, batches, eigenvalues = case

    def negated(model, batch):
        total, count = loss(model, batch)
        return -total, count

    report = hesd.analyze(model, negated, batches, max_steps=25, progress=False)
    assert report.hesd_type is HESDType.MN
    assert report.lambda_min.low <= -eigenvalues[-1] <= report.lambda_min.high
    assert report.criteria.balance.high < 0


def test_a_flat_loss_is_quasi_singular():
    model = nn.Linear(4, 1).double()

    def loss(model, batch):
        return 1.0 + 1e-14 * model(batch).square().mean()

    report = hesd.analyze(model, loss, torch.randn(20, 4).double(), progress=False)
    assert report.hesd_type is HESDType.QS
    assert "negligible" in report.type_evidence.reason


def test_a_linear_loss_has_a_zero_spectrum_and_no_error():
    model = nn.Linear(4, 1).double()
    report = hesd.analyze(model, lambda m, b: m(b).mean(), torch.randn(20, 4).double(), progress=False)
    assert report.hesd_type is HESDType.QS
    assert report.lambda_max.value == report.lambda_min.value == 0.0
    assert report.measure.tridiagonals[0].steps == 1
    assert report.cost.hvps <= 4
    assert str(report)


def test_one_parameter_is_enough():
    model = nn.Linear(1, 1, bias=False).double()
    report = hesd.analyze(
        model, lambda m, b: 0.5 * m(b).square().mean(), torch.full((3, 1), 2.0).double(), progress=False
    )
    assert report.lambda_max.value == pytest.approx(4.0, rel=1e-14)
    assert report.cost.hvps == 1


def test_published_protocol_is_what_it_says(case):
    model, loss, batches, _ = case
    report = hesd.analyze(model, loss, batches, protocol="lla", seed=3, progress=False)
    tridiagonal = report.measure.tridiagonals[0]
    assert report.settings == RunSettings(
        operator="hessian",
        block_size=1,
        max_steps=100,
        reorthogonalization="window",
        basis="memory",
        basis_dtype="float64",
        hvp="auto",
        protocol="lla",
        seed=3,
        tolerance=None,
    )
    assert tridiagonal.probes == 1
    assert tridiagonal.steps == 100
    # r_e and K_Hn by the published formulas, from the nodes and weights of the tridiagonal matrix. How copies of a
    # Ritz value share their weight is rounding, which K_Hn shows: two eigensolvers agree on r_e alone.
    values, vectors = np.linalg.eigh(tridiagonal.matrix())
    nodes, (weights,) = tridiagonal.quadrature()
    np.testing.assert_allclose(nodes, values, rtol=0, atol=tridiagonal.noise(np.abs(values).max()))
    for power in (1, 2, 3):
        assert weights @ nodes**power == pytest.approx(vectors[0] ** 2 @ values**power, rel=1e-12)
    terms = np.sqrt(np.abs(nodes) * weights)
    assert report.criteria.k_hn.value == pytest.approx(terms[nodes < 0].sum() / terms[nodes > 0].sum(), rel=1e-9)
    assert report.criteria.r_e.value == pytest.approx(abs(values[0] / values[-1]), rel=1e-12)


def test_seeds_and_reruns(case):
    model, loss, batches, _ = case
    first, second, other = (
        hesd.analyze(model, loss, batches, max_steps=8, seed=seed, progress=False) for seed in (0, 0, 1)
    )
    assert first.measure.tridiagonals[0].to_dict() == second.measure.tridiagonals[0].to_dict()
    assert first.measure.tridiagonals[0].to_dict() != other.measure.tridiagonals[0].to_dict()


def test_numpy_integers_are_integers(case, tmp_path):
    model, loss, batches, _ = case
    steps, block, seed = np.int64(3), np.int32(2), np.int64(1)
    report = hesd.analyze(model, loss, batches, max_steps=steps, block_size=block, seed=seed, progress=False)
    report.save(tmp_path / "run.hesd.json")
    assert hesd.load_report(tmp_path / "run.hesd.json").settings == report.settings


@pytest.mark.parametrize("mode", ["window", "none"])
def test_more_products_than_parameters_in_every_mode(case, mode):
    model, loss, batches, eigenvalues = case
    report = hesd.analyze(model, loss, batches, reorthogonalization=mode, progress=False)
    # Without an orthogonal basis intervals are approximate: 400 vectors in 50 dimensions round copies of one another.
    spare = 0.0 if mode in ("full", "partial") else 64 * 2.0**-52 * eigenvalues[-1]
    assert report.lambda_max.low - spare <= eigenvalues[-1] <= report.lambda_max.high + spare
    assert (
        report.criteria.balance.low <= np.sum(eigenvalues) / np.abs(eigenvalues).sum() <= report.criteria.balance.high
    )


def test_low_precision_parameters_widen_the_intervals(case):
    _, loss, batches, eigenvalues = case
    model, _, _ = trained()
    model.to(torch.bfloat16)
    batches = [(x.to(torch.bfloat16), y) for x, y in batches]
    report = hesd.analyze(model, loss, batches, max_steps=20, progress=False)
    assert report.lambda_max.low <= eigenvalues[-1] <= report.lambda_max.high
    assert report.lambda_min.low <= eigenvalues[0] <= report.lambda_min.high
    assert report.criteria.r_e.low <= -eigenvalues[0] / eigenvalues[-1] <= report.criteria.r_e.high
    assert report.lambda_max.high - report.lambda_max.low >= 2.0**-7 * report.lambda_max.value


def test_parameter_selection_reaches_the_spectrum(case):
    model, loss, batches, _ = case
    report = hesd.analyze(model, loss, batches, parameters=r"2\..*", max_steps=39, block_size=1, progress=False)
    assert report.problem.size == 39
    assert report.problem.parameters == ("2.weight", "2.bias")
    # cross entropy over logits linear in the last layer is convex
    assert report.lambda_min.high >= 0
    assert report.criteria.r_e.value == 0.0


def test_a_problem_and_its_parts_give_the_same(case):
    model, loss, batches, _ = case
    whole = hesd.analyze(hesd.Problem(model, loss, batches), max_steps=5, progress=False)
    parts = hesd.analyze(model, loss, batches, max_steps=5, progress=False)
    assert whole.measure.tridiagonals[0].to_dict() == parts.measure.tridiagonals[0].to_dict()
    assert whole.problem == parts.problem


REFUSED = [
    ({"block_size": 124}, "block_size is 124; wanted 1 to 123"),
    ({"block_size": "large"}, "block_size is 'large'"),
    ({"block_size": 0}, "block_size is 0"),
    ({"protocol": ["lla"]}, r"protocol is \['lla'\]; wanted None or one of 'lla'"),
    ({"reorthogonalization": ["full"]}, r"reorthogonalization is \['full'\]; wanted one of"),
    ({"max_steps": -1}, "steps is -1"),
    ({"max_steps": 0}, "steps is 0"),
    ({"reorthogonalization": "some"}, "'some'"),
    ({"protocol": "pyhessian"}, "'pyhessian'"),
    ({"protocol": "lla", "max_steps": 10}, "leave them out"),
    ({"seed": -1}, "seed is -1"),
]


@pytest.mark.parametrize(("options", "message"), REFUSED)
def test_bad_options_are_refused_before_the_first_product(case, options, message):
    model, loss, batches, _ = case
    with pytest.raises(hesd.ProblemError, match=message):
        hesd.analyze(model, loss, batches, progress=False, **options)


@pytest.mark.parametrize("name", ["operator", "hvp"])
@pytest.mark.parametrize("value", [None, ["auto"], {}, np.array(["hessian", "auto"])])
def test_names_of_every_type_are_refused(case, name, value):
    model, loss, batches, _ = case
    with pytest.raises(hesd.OperatorError, match=f"(?s){name} is .*; wanted"):
        hesd.analyze(model, loss, batches, progress=False, **{name: value})


def test_missing_and_doubled_arguments_are_named(case):
    model, loss, batches, _ = case
    with pytest.raises(hesd.ProblemError, match="no data"):
        hesd.analyze(model, loss)
    with pytest.raises(hesd.ProblemError, match="no loss"):
        hesd.analyze(model, data=batches)
    with pytest.raises(hesd.ProblemError, match="also mode"):
        hesd.analyze(hesd.Problem(model, loss, batches), mode="train")


def test_a_nan_that_appears_in_the_products_is_named_by_parameter():
    model = nn.Linear(3, 1).double()

    class Sqrt(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model

        def forward(self, x):
            return self.inner(x)

    def loss(model, batch):
        # the gradient of |w|**1.5 is finite at zero, its second derivative is not
        return model(batch).square().mean() + model.inner.weight.abs().pow(1.5).sum()

    with torch.no_grad():
        model.weight[0, 1] = 0.0
    with pytest.raises(hesd.OperatorError, match=r"inner\.weight"):
        hesd.analyze(Sqrt(), loss, torch.randn(5, 3).double(), progress=False)


def test_failed_checks_warn(case, monkeypatch):
    monkeypatch.setattr(checks, "ORTHOGONALITY_MULTIPLE", 0.0)
    model, loss, batches, _ = case
    with pytest.warns(hesd.HESDWarning, match="orthogonality"):
        report = hesd.analyze(model, loss, batches, max_steps=5, progress=False)
    assert "FAILED" in str(report)


@pytest.mark.parametrize("name", ["gauss_newton", "empirical_fisher"])
def test_spectra_of_other_operators_are_theirs(case, name, tmp_path):
    problem = hesd.Problem(*case[:3])
    report = hesd.analyze(problem, operator=name, max_steps=problem.size, block_size=2, tolerance=None, progress=False)
    operator = {"gauss_newton": hesd.GaussNewtonOperator, "empirical_fisher": hesd.EmpiricalFisherOperator}[name]
    dense = operator(problem).matmat(torch.eye(problem.size, dtype=torch.float64)).numpy()
    eigenvalues = np.linalg.eigvalsh((dense + dense.T) / 2)
    np.testing.assert_allclose(report.lambda_max.value, eigenvalues[-1], rtol=1e-10)
    for order in (1, 2, 3):
        # the moments that the probes see
        probes = hesd.kernels.empty_panel(2, problem.size, torch.float64)
        fill_probes(probes, LanczosSettings(2, 1))
        z = probes.numpy()
        seen = np.einsum("ij,jk,ik->i", z, np.linalg.matrix_power(dense, order), z).mean() / problem.size
        np.testing.assert_allclose(report.measure.moment(order), seen, rtol=1e-9)
    assert report.lambda_min.low >= -1e-9
    assert report.operator == report.settings.operator == name
    assert report.cost.strategy == "jvp in forward mode, vjp"
    assert all(check.passed for check in report.checks)
    assert "Spectral density of the" in str(report)
    report.save(tmp_path / "r.json")
    assert hesd.load_report(tmp_path / "r.json").operator == name
    hessian = hesd.analyze(problem, max_steps=5, progress=False)
    assert hessian.operator == "hessian"
    with pytest.raises(hesd.ProblemError, match=f"'other' is of the operator '{name}', the reference"):
        hesd.compare({"train": hessian, "other": report})


def test_operators_that_do_not_exist_or_do_not_fit_are_refused(case):
    model, loss, batches, _ = case
    with pytest.raises(hesd.OperatorError, match="operator is 'fisher'; wanted one of 'hessian', 'gauss_newton'"):
        hesd.analyze(model, loss, batches, operator="fisher", progress=False)
    with pytest.raises(hesd.OperatorError, match="leave hvp out"):
        hesd.analyze(model, loss, batches, operator="gauss_newton", hvp="kept_graph", progress=False)
    with pytest.raises(hesd.ProblemError, match="needs a loss that tells"):
        hesd.analyze(model, lambda m, batch: m(batch[0]).square().mean(), batches, operator="gauss_newton")


def test_compare_on_real_reports(case):
    model, loss, batches, _ = case
    report = hesd.analyze(model, loss, batches, max_steps=40, progress=False)
    noisy = [(x + 0.5, (y + 1) % 3) for x, y in batches]
    worse = hesd.analyze(model, loss, noisy, max_steps=40, progress=False)
    assessment = hesd.compare({"train": report, "same": report, "relabelled": worse})
    assert assessment.reference == "train"
    by_name = {entry.name: entry for entry in assessment.entries}
    assert by_name["same"].verdict is not hesd.Verdict.DEGRADES
    assert by_name["relabelled"].verdict is not hesd.Verdict.HOLDS


def test_demo_problem_is_trained_and_small():
    from hesd_fast.cli.demo_problem import demo_problem

    train, test = demo_problem("train"), demo_problem("test")
    train.prepare()
    test.prepare()
    assert train.size == 3466
    assert train.total_count == 1000
    assert test.total_count == 797
    assert train.loss_value < 0.01 < test.loss_value < 0.2
    assert math.isfinite(test.loss_value)


def test_the_system_is_asked_for_its_memory_once_in_a_run(case, monkeypatch):
    looks = []
    plain = memory._look
    monkeypatch.setattr(memory, "_look", lambda device: looks.append(device) or plain(device))
    model, loss, batches, _ = case
    problem = hesd.Problem(model, loss, batches)
    for run in (
        lambda: hesd.analyze(problem, max_steps=3, progress=False),
        lambda: hesd.analyze(model, loss, batches, max_steps=3, hvp="double_backward", progress=False),
        lambda: hesd.analyze_groups(model, loss, batches, groups="modules", max_steps=3, progress=False),
        lambda: hesd.plan(hesd.Problem(model, loss, batches), max_steps=3),
        lambda: hesd.block_lanczos(hesd.HessianOperator(problem), 3),
    ):
        looks.clear()
        run()
        assert looks == [None]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"block_size": 3, "max_steps": 7, "reorthogonalization": "window"},
        {"protocol": "lla"},
        {"basis": "disk", "basis_dtype": "bfloat16", "max_steps": 5},
    ],
)
def test_a_plan_is_what_the_run_goes_by(case, monkeypatch, options):
    monkeypatch.setattr(memory, "_look", lambda device: 2**33)
    used = []
    plain = whole_spectrum.spectra_of

    def spectra_of(problem, operators, multiply, plan, *rest):
        used.append(plan)
        return plain(problem, operators, multiply, plan, *rest)

    monkeypatch.setattr(whole_spectrum, "spectra_of", spectra_of)
    model, loss, batches, _ = case
    problem = hesd.Problem(model, loss, batches)
    planned = hesd.plan(problem, **options)
    report = hesd.analyze(problem, progress=False, **options)
    assert used == [dataclasses.replace(planned, products=None, peak_bytes=None)]
    assert report.cost.hvps <= planned.hvps
    assert report.measure.tridiagonals[0].basis_place == planned.basis.place
