"""Spectra of groups of parameters: each is that of the dense Hessian's diagonal block."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch
from catalogue import CATALOGUE
from models import mlp, vectors
from torch import nn

import hesd_fast as hesd
from hesd_fast import losses
from hesd_fast.analysis import spectra
from hesd_fast.errors import HESDWarning, OperatorError, ProblemError
from hesd_fast.hvp.reverse_over_reverse import KeptGraph
from hesd_fast.operators import GroupedHessianOperator, HessianOperator
from hesd_fast.operators.hessian_blocks import STRATEGIES

CROSS_ENTROPY = losses.supervised(nn.CrossEntropyLoss())
EPSILON = 2.0**-52


def small_problem(*sizes: int) -> hesd.Problem:
    torch.manual_seed(0)
    return hesd.Problem(mlp(nn.Tanh).double(), CROSS_ENTROPY, vectors(*(sizes or (8, 5))))


def dense(problem: hesd.Problem) -> torch.Tensor:
    return HessianOperator(problem).matmat(torch.eye(problem.size, dtype=problem.dtype))


def columns(problem: hesd.Problem, names) -> list[int]:
    """The columns of a problem's vectors that belong to some of its parameters."""
    chosen = []
    for offset, (name, parameter) in zip(problem.offsets, problem.parameters.items(), strict=True):
        if name in names:
            chosen += range(offset, offset + parameter.numel())
    return chosen


@pytest.mark.parametrize("hvp", STRATEGIES)
@pytest.mark.parametrize("compensated", [False, True])
def test_products_are_those_of_the_dense_blocks(hvp, compensated):
    problem = small_problem()
    hessian = dense(problem)
    groups = {"first": r"0\..*", "weights": r".*weight", "last bias": ["4.bias"]}
    operator = GroupedHessianOperator(problem, groups, hvp=hvp, compensated=compensated)
    assert list(operator.blocks) == list(groups)
    panels = {
        name: torch.randn(b, block.size, dtype=torch.float64)
        for b, (name, block) in enumerate(operator.blocks.items(), start=1)
    }
    for _ in range(2):  # the second time with what is kept
        found = operator.matmats(panels)
        for name, panel in panels.items():
            own = columns(problem, operator.blocks[name].problem.parameters)
            wanted = panel @ hessian[own][:, own]
            assert float((found[name] - wanted).abs().max()) <= 64 * EPSILON * float(wanted.abs().max())
    assert [block.products for block in operator.blocks.values()] == [2, 4, 6]
    assert operator.strategy.name == ("kept_graph" if hvp == "auto" else hvp)


@pytest.mark.parametrize("case", CATALOGUE, ids=lambda case: case.name)
def test_blocks_of_every_model_are_those_of_its_hessian(case):
    problem = hesd.Problem(*case.build(), mode=case.mode)
    operator = GroupedHessianOperator(problem, "modules")
    whole = HessianOperator(problem)
    generator = torch.Generator().manual_seed(0)
    panels = {
        name: torch.randn(2, block.size, dtype=block.dtype, generator=generator)
        for name, block in operator.blocks.items()
    }
    covered = []
    try:
        found = operator.matmats(panels)
    except OperatorError as error:
        with pytest.raises(OperatorError) as raised:
            whole.matvec(torch.ones(problem.size, dtype=problem.dtype))
        assert str(raised.value) == str(error)  # noqa: PT017
        return
    for name, block in operator.blocks.items():
        own = columns(problem, block.problem.parameters)
        covered += own
        embedded = torch.zeros(2, problem.size, dtype=problem.dtype)
        embedded[:, own] = panels[name]
        products = whole.matmat(embedded)  # compared with the dense Hessian elsewhere
        difference = float(torch.linalg.vector_norm(found[name] - products[:, own]))
        assert difference <= case.tolerance * float(torch.linalg.vector_norm(products))
    assert sorted(covered) == list(range(problem.size))


def test_reports_are_those_of_separate_runs():
    problem = small_problem()
    groups = {"first": r"0\..*", "middle": r"2\..*", "all": r".*"}
    together = hesd.analyze_groups(problem, groups=groups, max_steps=6, block_size=3, seed=5, progress=False)
    assert list(together) == list(groups)
    for name, selection in groups.items():
        part = hesd.Problem(problem.model, CROSS_ENTROPY, problem.data, parameters=selection)
        alone = hesd.analyze(part, max_steps=6, block_size=3, seed=5, progress=False)
        report = together[name]
        assert report.problem.parameters == alone.problem.parameters
        assert report.problem.fingerprint == alone.problem.fingerprint
        assert report.cost.hvps == alone.cost.hvps
        assert report.group == name
        assert report.hesd_type == alone.hesd_type
        np.testing.assert_allclose(report.lambda_max.value, alone.lambda_max.value, rtol=1e-10)
        np.testing.assert_allclose(report.trace.value, alone.trace.value, rtol=1e-10)
        assert [check.name for check in report.checks] == [check.name for check in alone.checks]
        assert all(check.passed for check in report.checks)
        assert f"group '{name}'" in str(report)


def test_whole_spectra_of_small_groups_are_exact():
    problem = small_problem()
    hessian = dense(problem)
    reports = hesd.analyze_groups(problem, groups="parameters", max_steps=400, tolerance=None, progress=False)
    assert list(reports) == list(problem.parameters)
    for name, report in reports.items():
        own = columns(problem, [name])
        eigenvalues = torch.linalg.eigvalsh(hessian[own][:, own])
        allowed = 64 * EPSILON * float(eigenvalues.abs().max())
        assert abs(report.lambda_max.value - float(eigenvalues[-1])) <= allowed
        assert abs(report.lambda_min.value - float(eigenvalues[0])) <= allowed
        assert report.trace.low <= float(eigenvalues.sum()) <= report.trace.high


def test_a_pass_over_the_data_serves_all_groups():
    passes = []

    class Counted:
        def __init__(self, batches):
            self.batches = batches

        def __iter__(self):
            passes.append(1)
            return iter(self.batches)

    model = small_problem().model
    data = Counted(vectors(8, 5))

    def count(groups) -> int:
        passes.clear()
        hesd.analyze_groups(model, CROSS_ENTROPY, data, groups=groups, max_steps=4, progress=False)
        return len(passes)

    assert count("parameters") == count({"all": ".*"})


def test_groups_are_given_back_with_the_model_as_it_was(tmp_path):
    problem = small_problem()
    before = {name: parameter.detach().clone() for name, parameter in problem.parameters.items()}
    report = hesd.analyze_groups(problem, groups="modules", max_steps=3, progress=False)["0"]
    assert all(torch.equal(parameter, before[name]) for name, parameter in problem.parameters.items())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in problem.parameters.values())
    report.save(tmp_path / "report.json")
    assert hesd.load_report(tmp_path / "report.json").group == "0"


def test_frozen_parameters_can_be_a_group():
    problem = small_problem()
    model = problem.model
    model[0].requires_grad_(False)
    reports = hesd.analyze_groups(
        model, CROSS_ENTROPY, problem.data, groups={"frozen": r"0\..*", "free": r"4\..*"}, max_steps=2, progress=False
    )
    assert reports["frozen"].problem.parameters == ("0.weight", "0.bias")
    assert not model[0].weight.requires_grad
    with pytest.raises(ProblemError, match=r"group 'frozen' selects '0.weight', '0.bias', none of which"):
        hesd.analyze_groups(hesd.Problem(model, CROSS_ENTROPY, problem.data), groups={"frozen": r"0\..*"})


def test_models_whose_graphs_cannot_be_kept_are_served():
    case = next(case for case in CATALOGUE if case.name == "checkpoint")
    problem = hesd.Problem(*case.build())
    operator = GroupedHessianOperator(problem, "modules")
    name, block = next(iter(operator.blocks.items()))
    hessian = dense(problem)
    own = columns(problem, block.problem.parameters)
    found = block.matmat(torch.eye(block.size, dtype=problem.dtype))
    assert float((found - hessian[own][:, own]).abs().max()) <= 64 * problem.epsilon * float(hessian.abs().max())
    assert block.method == "double_backward"
    assert name in operator.blocks


def test_graphs_beyond_the_memory_limit_are_made_anew():
    problem = small_problem(8, 8, 8)
    whole = GroupedHessianOperator(problem, "modules")
    panels = {name: torch.randn(2, block.size, dtype=torch.float64) for name, block in whole.blocks.items()}
    wanted = whole.matmats(panels)
    part = GroupedHessianOperator(problem, "modules", memory_limit=whole.strategy.kept_bytes // 2)
    for _ in range(2):
        found = part.matmats(panels)
        assert all(torch.equal(found[name], wanted[name]) for name in panels)
    assert set(part.strategy._kept) == {0}
    none = GroupedHessianOperator(problem, "modules", memory_limit=10)
    assert all(torch.equal(product, wanted[name]) for name, product in none.matmats(panels).items())
    assert none.strategy.name == "double_backward"


def test_graphs_that_run_out_of_memory_are_made_anew(monkeypatch):
    torch.manual_seed(0)
    problem = hesd.Problem(mlp(nn.Tanh).double(), CROSS_ENTROPY, vectors(6, 3))
    operator = GroupedHessianOperator(problem, "modules")
    panels = {name: torch.eye(block.size, dtype=torch.float64)[:2] for name, block in operator.blocks.items()}
    wanted = operator.matmats(panels)

    operator = GroupedHessianOperator(problem, "modules")
    strategy = operator.strategy
    check = strategy.check

    def too_much():
        check()
        assert strategy._kept
        raise torch.cuda.OutOfMemoryError("too much")

    monkeypatch.setattr(strategy, "check", too_much)
    found = operator.matmats(panels)
    assert operator.strategy.name == "double_backward"
    assert not strategy._kept
    assert all(torch.equal(found[name], wanted[name]) for name in panels)


def test_a_later_batch_that_cannot_be_kept_falls_back():
    class Sometimes(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.outer = nn.Linear(8, 6), nn.Linear(6, 3)

        def forward(self, x):
            if len(x) >= 5:
                return self.outer(self.inner(x).tanh())
            return self.outer(torch.utils.checkpoint.checkpoint(lambda x: self.inner(x).tanh(), x, use_reentrant=False))

    torch.manual_seed(0)
    problem = hesd.Problem(Sometimes().double(), CROSS_ENTROPY, vectors(6, 3))
    operator = GroupedHessianOperator(problem, "modules")
    panels = {name: torch.eye(block.size, dtype=torch.float64) for name, block in operator.blocks.items()}
    with pytest.warns(HESDWarning, match="'double_backward' from here on: .*checkpoints"):
        found = operator.matmats(panels)
    hessian = dense(problem)
    for name, block in operator.blocks.items():
        own = columns(problem, block.problem.parameters)
        wanted = hessian[own][:, own]
        assert float((found[name] - wanted).abs().max()) <= 64 * EPSILON * float(wanted.abs().max())


def test_disk_holds_the_bases_of_large_groups_only(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(260, 260), nn.Tanh(), nn.Linear(260, 3))
    data = [(torch.randn(4, 260), torch.randint(3, (4,)))]
    reports = hesd.analyze_groups(
        model, CROSS_ENTROPY, data, groups="modules", max_steps=5, basis=tmp_path, progress=False
    )
    assert [report.settings.basis for report in reports.values()] == ["disk", "memory"]
    in_memory = hesd.analyze_groups(model, CROSS_ENTROPY, data, groups="modules", max_steps=5, progress=False)
    for name, report in reports.items():
        scale = float(np.abs(report.measure.nodes[0]).max())
        allowed = 64 * 2.0**-23 * scale
        np.testing.assert_allclose(report.measure.nodes[0], in_memory[name].measure.nodes[0], rtol=0, atol=allowed)


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ("layers", "groups is 'layers'; wanted a mapping"),
        ({}, "groups is empty"),
        (["0.weight"], "groups is of type list"),
        ({"": ".*"}, "a group is called ''"),
        ({"a": "nothing"}, "matches no parameter name in full"),
        ({"a": ["0.weigth"]}, "'0.weigth' does not exist; the closest names are '0.weight'"),
    ],
)
def test_groups_that_cannot_be_used_are_named(groups, message):
    with pytest.raises(ProblemError, match=message):
        hesd.analyze_groups(small_problem(), groups=groups, progress=False)


def test_options_of_groups_that_cannot_be_used_are_named():
    problem = small_problem()
    with pytest.raises(OperatorError, match="hvp is 'compiled'; for groups one of 'auto'"):
        hesd.analyze_groups(problem, groups="modules", hvp="compiled", progress=False)
    with pytest.raises(ProblemError, match="model is of type int"):
        hesd.analyze_groups(3, groups="modules")
    operator = GroupedHessianOperator(problem, "modules")
    with pytest.raises(OperatorError, match="'5' is no group; the groups are '0', '2', '4'"):
        operator.matmats({"5": torch.zeros(1, 3)})
    with pytest.raises(OperatorError, match="outs has '2'; give one for each panel, 0"):
        operator.matmats({"0": torch.zeros(1, 3)}, {"2": torch.zeros(1, 3)})
    with pytest.raises(OperatorError, match=r"panel has shape \(1, 3\)"):
        operator.matmats({"0": torch.zeros(1, 3, dtype=torch.float64)})


def test_a_product_that_is_not_finite_names_its_parameter():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1)).double()

    nn.init.zeros_(model[1].weight)

    def loss(model, batch):
        return model(batch).square().mean() + model[1].weight.pow(1.5).sum()  # whose second derivative at 0 is infinite

    problem = hesd.Problem(model, loss, torch.randn(4, 2).double())
    operator = GroupedHessianOperator(problem, "modules")
    with pytest.raises(OperatorError, match=r"parameter '1.weight'"):
        operator.matmats({name: torch.ones(1, block.size).double() for name, block in operator.blocks.items()})


def test_a_part_of_a_problem_shares_what_was_found():
    problem = small_problem()
    problem.prepare()
    part = problem.restricted(["2.bias"])
    assert part.loss_value == problem.loss_value
    assert part.size == problem.parameters["2.bias"].numel()
    assert part.fingerprint != problem.fingerprint
    with pytest.raises(ProblemError, match=r"'7\.bias' is none of the problem's"):
        problem.restricted(["7.bias"])
    with pytest.raises(ProblemError, match="no parameter is left"):
        problem.restricted([])


def test_groups_of_few_parameters_are_exact_whatever_the_seed():
    torch.manual_seed(0)
    model, data = nn.Linear(4, 2), (torch.randn(30, 4), torch.randn(30, 2))
    for seed in range(4):
        report = hesd.analyze_groups(
            model, losses.supervised(nn.MSELoss()), data, groups={"bias": "bias"}, seed=seed, progress=False
        )["bias"]
        assert report.cost.hvps == 2
        assert all(check.passed for check in report.checks)
        for estimate in (report.lambda_max, report.lambda_min):  # the mean over two outputs of 2 r^2 / 2
            assert estimate.low <= 1.0 <= estimate.high
            assert estimate.high - estimate.low <= 64 * 2.0**-23
        assert report.trace.value == pytest.approx(2.0, rel=64 * 2.0**-23)
        assert report.hesd_type is hesd.HESDType.MP
        assert report.criteria.k_mass.high <= 1e-4


@pytest.mark.parametrize("groups", [{"alone": r"0\.weight"}, {"weights": r".*weight", "biases": r".*bias"}])
def test_small_groups_stay_in_memory_whatever_is_asked_for(tmp_path, groups):
    reports = hesd.analyze_groups(small_problem(), groups=groups, basis=tmp_path, max_steps=5, progress=False)
    assert {report.settings.basis for report in reports.values()} == {"memory"}


@pytest.mark.parametrize("analyze", [hesd.analyze, lambda *a, **o: hesd.analyze_groups(*a, groups="modules", **o)])
def test_kept_graphs_are_gone_when_reports_are_made(analyze, monkeypatch):
    kept, plain, release = [], spectra.criteria, KeptGraph.release
    released = []
    monkeypatch.setattr(KeptGraph, "release", lambda self: released.append(self) or release(self))

    def criteria(measure):
        kept.extend(len(strategy._kept) for strategy in released)
        return plain(measure)

    monkeypatch.setattr(spectra, "criteria", criteria)
    analyze(small_problem(), max_steps=3, hvp="kept_graph", progress=False)
    assert kept
    assert set(kept) == {0}


def test_seconds_of_a_run_have_the_reading_of_the_data_in_them():
    class Slow(list):
        def __iter__(self):
            if not started:
                started.append(time.sleep(0.3))
            return super().__iter__()

    for analyze in (hesd.analyze, lambda *a, **o: hesd.analyze_groups(*a, groups="modules", **o)):
        started = []
        torch.manual_seed(0)
        problem = hesd.Problem(mlp(nn.Tanh).double(), CROSS_ENTROPY, Slow(vectors(8, 5)))
        started.clear()
        found = analyze(problem, max_steps=2, progress=False)
        for report in found.values() if isinstance(found, dict) else [found]:
            assert report.cost.seconds > 0.3
