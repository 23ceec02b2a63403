"""A run stops when its intervals are as narrow as was asked for, says what is missing, and can be continued."""

from __future__ import annotations

import math
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

import hesd_fast as hesd
from hesd_fast.analysis.progress import ProductProgress
from hesd_fast.analysis.stopping import DEFAULT_NUMBERS, NUMBERS, Findings, StoppingRule, tolerances, widths
from hesd_fast.lanczos.drive import drive, multiply_by, start_run
from hesd_fast.lanczos.options import LanczosSettings


@pytest.fixture(scope="module")
def problem():
    """A trained classifier of 317 parameters in float64."""
    torch.manual_seed(0)
    x = torch.randn(64, 8, dtype=torch.float64)
    y = (x[:, 0] > 0).long() + (x[:, 1] > 0.5).long()
    net = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    optimizer = torch.optim.Adam(net.parameters(), 1e-2)
    for _ in range(80):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x), y).backward()
        optimizer.step()
    return hesd.Problem(net, hesd.losses.supervised(nn.CrossEntropyLoss()), (x, y))


@pytest.fixture(scope="module")
def eigenvalues(problem):
    matrix = hesd.HessianOperator(problem).matmat(torch.eye(problem.size, dtype=torch.float64))
    return np.linalg.eigvalsh(matrix.numpy())


class Diagonal(nn.Module):
    """Parameters whose loss has a Hessian of known eigenvalues."""

    def __init__(self, size):
        super().__init__()
        self.parameter = nn.Parameter(torch.zeros(size, dtype=torch.float64))

    def forward(self, eigenvalues):
        return 0.5 * (eigenvalues * self.parameter**2).sum()


@pytest.fixture(scope="module")
def wide():
    """A spectrum of one wide bulk, of which a probe sees everything but exactly."""
    return hesd.Problem(Diagonal(2000), lambda model, batch: model(batch), torch.linspace(0.5, 1.5, 2000).double())


def analyze(problem, **options):
    return hesd.analyze(problem, progress=False, **options)


def test_a_run_stops_when_its_intervals_are_narrow_enough(problem, eigenvalues):
    report = analyze(problem, tolerance={"lambda_max": 1e-3, "r_e": 0.01})
    (tridiagonal,) = report.measure.tridiagonals
    assert 8 <= tridiagonal.steps < 60
    assert report.cost.hvps == 4 * tridiagonal.steps
    assert report.cost.unmet == ()
    assert report.lambda_max.high - report.lambda_max.low <= 2e-3 * report.measure.largest_magnitude
    r_e = report.criteria.r_e
    assert max(r_e.high - r_e.value, r_e.value - r_e.low) <= 0.01 * max(r_e.value, 0.05)
    assert report.lambda_max.low <= eigenvalues[-1] <= report.lambda_max.high
    assert r_e.low <= -eigenvalues[0] / eigenvalues[-1] <= r_e.high
    # it could not have been seen before, but for the steps between two looks
    before = hesd.SpectralMeasure.from_tridiagonal(tridiagonal.truncated(int(tridiagonal.steps / 1.25) - 1))
    assert any(not one.is_met for one in widths(Findings(before), {"lambda_max": 1e-3, "r_e": 0.01}))


def test_without_a_tolerance_all_steps_are_taken(problem):
    report = analyze(problem, tolerance=None, max_steps=30)
    assert [one.steps for one in report.measure.tridiagonals] == [30]
    assert report.settings.tolerance is None
    assert report.cost.unmet == ()


def test_a_looser_tolerance_takes_fewer_steps(problem):
    hvps = [analyze(problem, tolerance=tolerance).cost.hvps for tolerance in (0.2, "auto", 0.002)]
    assert hvps == sorted(hvps)
    assert hvps[0] < hvps[2]


def test_fresh_probes_follow_where_they_are_what_is_missing(wide):
    report = analyze(wide, tolerance={"trace": 0.01}, max_steps=400)
    runs = report.measure.tridiagonals
    assert len(runs) > 1
    assert len({run.steps for run in runs}) == 1
    assert report.cost.unmet == ()
    assert report.trace.high - report.trace.low <= 2 * 0.01 * report.trace.value
    assert report.trace.low <= 2000.0 <= report.trace.high
    assert report.cost.hvps == sum(run.products for run in runs) <= 1600
    shorter = hesd.SpectralMeasure.from_tridiagonal(*runs[:-1])
    assert shorter.trace.high - shorter.trace.low > 2 * 0.01 * shorter.trace.value
    # the probes that are missing come in few runs: a wide block knows more
    assert [run.probes for run in runs[:2]] == [4, 16]
    assert report.run_length.startswith(f"4 probes x {runs[0].steps} steps and ")
    # and they are those that follow the first run's
    second = LanczosSettings(16, runs[0].steps, first_probe=4)
    operator = hesd.HessianOperator(wide)
    run = start_run(operator, second)
    drive({"": run}, multiply_by(operator))
    assert run.so_far().to_dict()["diagonal"] == runs[1].to_dict()["diagonal"]


def test_later_runs_are_no_wider_where_the_basis_is_not_kept_in_memory(wide):
    report = analyze(wide, tolerance={"trace": 0.01}, max_steps=400, reorthogonalization="none")
    assert max(run.probes for run in report.measure.tridiagonals) == 4
    assert report.cost.unmet == ()


def test_no_run_has_more_vectors_than_were_planned_for(wide):
    report = analyze(wide, tolerance={"trace": 0.01}, max_steps=60)
    assert sum(sum(run.block_sizes) for run in report.measure.tridiagonals) <= 240


def test_what_is_not_met_is_named_with_what_it_would_take(problem):
    with pytest.warns(hesd.ToleranceWarning) as caught:
        report = analyze(problem, tolerance={"k_mass": 1e-3, "lambda_max": 0.1}, max_steps=40)
    (text,) = [str(one.message) for one in caught]
    assert "the tolerance is not met after 4 probes x 40 steps: k_mass is " in text
    assert "wide on one side where 0.001 was asked for" in text
    assert len(report.cost.unmet) == 1
    assert f"not yet     {report.cost.unmet[0]}" in str(report)
    with pytest.warns(hesd.ToleranceWarning, match="lambda_max is .*; it takes more steps"):
        analyze(problem, tolerance={"lambda_max": 1e-12}, max_steps=9)


def test_the_number_of_probes_that_are_missing_is_stated(wide):
    with pytest.warns(hesd.ToleranceWarning, match="sampling error of 4 probes is what is left, about [0-9]+ would do"):
        analyze(wide, tolerance={"trace": 1e-2}, max_steps=12)


def test_noise_is_named_where_it_is_what_is_wide():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 3))
    data = torch.randn(32, 6), torch.randint(3, (32,))
    with pytest.warns(hesd.ToleranceWarning, match="the noise of the products is .*: use float64"):
        analyze(hesd.Problem(net, hesd.losses.supervised(nn.CrossEntropyLoss()), data), tolerance={"lambda_max": 1e-9})


def test_the_default_does_not_warn(problem):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = analyze(problem, max_steps=4)
    assert report.cost.unmet
    assert report.settings.tolerance == dict.fromkeys(DEFAULT_NUMBERS, 0.02)


def test_a_protocol_takes_its_steps(problem):
    report = analyze(problem, protocol="lla")
    assert report.measure.tridiagonals[0].steps == 100
    assert report.measure.tridiagonals[0].probe_kind == "rademacher"
    with pytest.raises(hesd.ProblemError, match=r"tolerance is 0\.1, and protocol='lla' takes all its steps"):
        analyze(problem, protocol="lla", tolerance=0.1)


@pytest.mark.parametrize(
    "wrong", [0.0, -1.0, float("nan"), float("inf"), True, "fine", [0.1], np.ones(2), {}, {"r_e": 0.0}]
)
def test_a_tolerance_that_none_can_have_is_refused(problem, wrong):
    with pytest.raises(hesd.ProblemError, match="tolerance"):
        analyze(problem, tolerance=wrong)


def test_numbers_are_named_where_one_is_unknown():
    with pytest.raises(hesd.ProblemError, match=r"tolerance names 'k_hn'; wanted numbers among lambda_max, .*balance"):
        tolerances({"k_hn": 0.1})
    assert list(tolerances({"balance": 1, "r_e": 0.5})) == ["r_e", "balance"]  # what takes least work is first
    assert tolerances(None) == {}


@pytest.mark.parametrize("name", list(NUMBERS))
def test_every_number_can_be_asked_for(problem, name):
    report = analyze(problem, tolerance={name: 0.5}, max_steps=200)
    assert report.cost.unmet == ()
    assert report.settings.tolerance == {name: 0.5}


def test_a_run_goes_on_without_doing_a_product_again(problem):
    first = analyze(problem, tolerance={"lambda_max": 0.5}, max_steps=40, keep_run=True)
    assert first.measure.tridiagonals[0].steps == 8
    whole = analyze(problem, tolerance=None, max_steps=40)
    counted = Counting(problem)
    second = analyze(problem, tolerance=None, max_steps=40, continue_from=first)
    assert counted.restored() == 32 + 2  # each step a panel of four; two products check the operator
    found, wanted = (one.measure.tridiagonals[0].to_dict() for one in (second, whole))
    assert found.pop("basis_vectors_read") > wanted.pop("basis_vectors_read")  # its orthogonality was measured twice
    assert found == wanted
    assert second.criteria == whole.criteria
    assert second.cost.hvps == 160
    assert first.measure.tridiagonals[0].steps == 8
    again = analyze(problem, tolerance={"lambda_max": 1e-6}, max_steps=40, continue_from=first)  # knows all 40 steps
    assert again.measure.tridiagonals[0].steps == 40


class Counting:
    """Counts the panels that Hessians are multiplied with."""

    def __init__(self, problem):
        self.calls = 0
        self.matmat = hesd.HessianOperator.matmat

        def matmat(operator, panel, out=None):
            self.calls += 1
            return self.matmat(operator, panel, out=out)

        hesd.HessianOperator.matmat = matmat

    def restored(self):
        hesd.HessianOperator.matmat = self.matmat
        return self.calls


def test_fresh_probes_join_a_report_that_was_saved(wide, tmp_path):
    first = analyze(wide, tolerance={"trace": 0.3}, max_steps=40)
    first.save(tmp_path / "first.hesd.json")
    loaded = hesd.load_report(tmp_path / "first.hesd.json")
    second = analyze(wide, tolerance={"trace": 0.015}, max_steps=400, continue_from=loaded)
    runs = second.measure.tridiagonals
    assert runs[0].to_dict() == first.measure.tridiagonals[0].to_dict()
    assert len(runs) > 1
    assert second.cost.hvps == sum(run.products for run in runs)
    assert second.cost.seconds > loaded.cost.seconds
    assert second.trace.low <= 2000.0 <= second.trace.high
    firsts = [tuple(run.diagonal[0].ravel()) for run in runs]
    assert len(set(firsts)) == len(firsts)  # every run has probes of its own
    second.save(tmp_path / "second.hesd.json")
    assert hesd.load_report(tmp_path / "second.hesd.json").criteria == second.criteria
    # what was known is enough: nothing is multiplied
    third = analyze(wide, tolerance={"trace": 0.015}, max_steps=400, continue_from=second)
    assert third.cost.hvps == second.cost.hvps
    assert third.criteria == second.criteria
    assert third.checks == second.checks


def test_what_cannot_be_continued_is_refused(problem):
    report = analyze(problem, tolerance={"lambda_max": 0.5}, block_size=2)
    for options, message in (
        ({"operator": "gauss_newton"}, "operator is 'gauss_newton', and continue_from needs 'hessian'"),
        ({"block_size": 4}, "block_size is 4, and continue_from needs 2"),
        ({"reorthogonalization": "none"}, "reorthogonalization is 'none', and continue_from needs 'full'"),
        ({"protocol": "lla"}, "protocol is 'lla', and continue_from needs None"),
    ):
        with pytest.raises(hesd.ProblemError, match=message):
            analyze(problem, continue_from=report, **options)
    with pytest.raises(hesd.ProblemError, match="continue_from is of type str; give the report of an earlier run"):
        analyze(problem, continue_from="report.hesd.json")
    other = hesd.Problem(problem.model, problem.loss, (torch.randn(4, 8).double(), torch.tensor([0, 1, 2, 0])))
    with pytest.raises(hesd.ProblemError, match="continue_from is of other weights, parameters, mode or data"):
        analyze(other, continue_from=report)


def test_each_group_stops_by_itself(problem):
    reports = hesd.analyze_groups(problem, groups="modules", tolerance={"lambda_max": 1e-4}, progress=False)
    steps = {name: report.measure.tridiagonals[0].steps for name, report in reports.items()}
    assert len(set(steps.values())) > 1
    assert all(report.cost.unmet == () for report in reports.values())


@pytest.mark.parametrize(("sampled", "least", "most"), [(0.4, 20, 32), (0.05, 12, 14)])
def test_steps_are_weighed_against_probes(monkeypatch, sampled, least, most):
    # With q(s) = 8 / s^2 and e = 0.4 the steps in all, s (e / (t - q))^2, are least at s = 20; with e = 0.05 one run
    # is enough from q + e <= t on.
    def probes_needed(self, runs):
        left = 0.1 - 8.0 / runs[0].steps ** 2
        return max(1.0, (sampled / left) ** 2) if left > 0.0 else math.inf

    monkeypatch.setattr(StoppingRule, "probes_needed", probes_needed)
    rule = StoppingRule({"trace": 0.1}, LanczosSettings(1, 10_000), 1)
    runs = (SimpleNamespace(steps=steps, block_sizes=(1,) * steps, size=10**6) for steps in range(1, 1000))
    enough = next(run.steps for run in runs if rule.is_due(run.steps) and rule.is_enough([run]))
    assert least <= enough <= most


def test_where_probes_would_cost_as_much_as_the_whole_space_the_run_goes_on(problem):
    report = analyze(problem, tolerance={"trace": 1e-6}, max_steps=400)
    (run,) = report.measure.tridiagonals
    assert run.products > problem.size / 2
    assert report.cost.unmet == ()


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_definite_and_zero_matrices_meet_every_tolerance(sign):
    wanted = dict.fromkeys(NUMBERS, 0.1)
    definite = hesd.Problem(Diagonal(3), lambda m, b: m(b), sign * torch.tensor([1.0, 2.0, 4.0]).double())
    assert analyze(definite, tolerance=wanted, block_size=1).cost.unmet == ()
    zero = hesd.Problem(Diagonal(300), lambda m, b: m(b), 0.0 * torch.ones(300).double())
    report = analyze(zero, tolerance=wanted)
    assert report.cost.hvps == 4
    assert report.cost.unmet == ()


def diagonal_problem(eigenvalues):
    return hesd.Problem(
        Diagonal(len(eigenvalues)), lambda m, b: m(b), torch.as_tensor(eigenvalues, dtype=torch.float64)
    )


@pytest.mark.parametrize("size", [3, 8, 12, 17, 40])
@pytest.mark.parametrize("block_size", [1, 2, "auto"])
def test_two_eigenvalues_of_high_multiplicity_are_found_by_all_unit_vectors(size, block_size):
    # Krylov spaces end after two steps, and probes never agree: only the whole matrix decides.
    eigenvalues = [(-1.0) ** i for i in range(size)]
    report = analyze(diagonal_problem(eigenvalues), block_size=block_size, tolerance={"trace": 0.01, "balance": 0.01})
    assert report.cost.unmet == ()
    assert report.trace.value == pytest.approx(sum(eigenvalues), abs=1e-9)
    assert report.cost.hvps <= 3 * size + 8


def test_fewer_samples_than_inputs_cost_no_more_than_the_whole_matrix(tmp_path):
    torch.manual_seed(0)
    data = torch.randn(6, 30).double(), torch.randn(6, 4).double()
    problem = hesd.Problem(nn.Linear(30, 4).double(), hesd.losses.supervised(nn.MSELoss()), data)
    report = analyze(problem, tolerance={"trace": 0.05})
    assert report.cost.unmet == ()
    assert report.cost.hvps < 2 * 124
    report.save(tmp_path / "report.json")
    assert hesd.load_report(tmp_path / "report.json").trace == report.trace


def test_continued_reports_can_be_saved(problem, tmp_path):
    path = tmp_path / "report.json"
    for first, second in (
        ({"max_steps": 9}, {"max_steps": 10, "tolerance": None}),
        ({"max_steps": 9, "keep_run": True}, {"max_steps": 10, "tolerance": None}),
        ({"max_steps": 20, "tolerance": None}, {"max_steps": 8, "tolerance": None}),
        ({"max_steps": 20}, {"max_steps": 100, "tolerance": {"trace": 0.2}, "basis": "disk"}),
        ({"max_steps": 20}, {"max_steps": 100, "tolerance": {"trace": 0.2}, "basis_dtype": "float32"}),
    ):
        report = analyze(problem, continue_from=analyze(problem, **first), **second)
        report.save(path)
        assert hesd.load_report(path).criteria == report.criteria


def test_another_function_is_not_continued(problem):
    report = analyze(problem, tolerance={"lambda_max": 0.5})
    other = hesd.Problem(problem.model, lambda m, b: 3 * nn.functional.cross_entropy(m(b[0]), b[1]), problem.data)
    with pytest.raises(hesd.ProblemError, match=r"continue_from has a loss of .*: not the same function"):
        analyze(other, continue_from=report)


def test_warnings_name_the_line_of_the_call(problem):
    for call in (hesd.analyze, lambda *args, **options: hesd.analyze_groups(*args, groups="modules", **options)):
        with pytest.warns(hesd.ToleranceWarning) as caught:
            call(problem, tolerance={"k_mass": 1e-9}, max_steps=2, progress=False)
        assert {one.filename for one in caught} == {__file__}


def test_the_norm_after_a_breakdown_is_known():
    report = analyze(diagonal_problem([0.0] * 59 + [3.0]), tolerance={"frobenius_norm": 0.05}, max_steps=30)
    assert report.cost.unmet == ()
    assert report.frobenius_norm.value == pytest.approx(3.0)
    assert report.cost.hvps <= 60


def test_products_are_counted_up(problem, monkeypatch):
    seen = []
    monkeypatch.setattr(ProductProgress, "update", lambda self, products: seen.append(products))
    report = analyze(problem, tolerance={"trace": 0.02}, max_steps=60)
    assert seen == sorted(seen)
    assert seen[-1] == report.cost.hvps
