"""The checks of a run: each can fail, and says what a failure comes from."""

from __future__ import annotations

import itertools
import warnings

import pytest
import torch
from models import OnContext, mlp, vectors
from torch import nn
from torch.nn import functional

import hesd_fast as hesd
from hesd_fast import losses
from hesd_fast.errors import HESDWarning, OperatorError
from hesd_fast.operators import HessianOperator
from hesd_fast.problem.problem import Problem

CROSS_ENTROPY = losses.supervised(nn.CrossEntropyLoss())


def small_problem(**options) -> Problem:
    torch.manual_seed(0)
    return Problem(mlp(nn.Tanh).double(), CROSS_ENTROPY, vectors(8, 2), **options)


def check_of(report: hesd.Report, name: str):
    return next(check for check in report.checks if check.name == name)


def disturbed(monkeypatch, disturb) -> None:
    """Let every product of a Hessian be changed in place by ``disturb(out, call)``."""
    plain, calls = HessianOperator._multiply, itertools.count()

    def multiply(self, panel, out):
        plain(self, panel, out)
        disturb(out, next(calls))

    monkeypatch.setattr(HessianOperator, "_multiply", multiply)


def test_products_that_are_the_same_each_time_are_not_blamed_on_random_numbers(monkeypatch):
    disturbed(monkeypatch, lambda out, call: out.add_(1e-4 * out.abs().max()))
    with pytest.warns(HESDWarning, match="the check of linearity failed") as caught:
        report = hesd.analyze(small_problem(), max_steps=4, block_size=2, progress=False)
    assert {one.filename for one in caught} == {__file__}
    failed = [check for check in report.checks if not check.passed]
    assert {check.name for check in failed} >= {"linearity"}
    assert all("came out twice" in check.detail and "autocast" in check.detail for check in failed)
    assert not any("random" in str(one.message) for one in caught)


@pytest.mark.parametrize("block_size", [1, 2, 4, 8])
@pytest.mark.parametrize("basis_dtype", ["float32", "bfloat16", "float16"])
def test_a_coarse_basis_is_no_asymmetry(basis_dtype, block_size):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    data = [(torch.randn(8, 3, dtype=torch.float64), torch.arange(8) % 2)]
    with warnings.catch_warnings():
        warnings.simplefilter("error", HESDWarning)
        hesd.analyze(model, CROSS_ENTROPY, data, block_size=block_size, basis_dtype=basis_dtype, progress=False)


def test_products_that_change_are_blamed_on_what_changes(monkeypatch):
    disturbed(monkeypatch, lambda out, call: out.mul_(1 + 1e-6 * call))
    with pytest.warns(HESDWarning, match="the check of determinism failed"):
        report = hesd.analyze(small_problem(), max_steps=4, block_size=2, progress=False)
    assert "random generator of its own" in check_of(report, "determinism").detail


def test_modules_in_train_mode_are_suspects_only_where_the_run_has_them_so(monkeypatch):
    disturbed(monkeypatch, lambda out, call: out.mul_(1 + 1e-6 * call))
    for mode, suspected in (("eval", False), ("train", True), ("as_is", True)):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 6), nn.Dropout(0.1), nn.Linear(6, 3)).double().train()
        with pytest.warns(HESDWarning):
            report = hesd.analyze(Problem(model, CROSS_ENTROPY, vectors(8), mode=mode), max_steps=4, progress=False)
        assert ("or use mode='eval' for 1 (Dropout)" in check_of(report, "determinism").detail) == suspected


def test_a_wrong_second_derivative_is_the_cause_where_it_is_known():
    def loss(model, batch):
        # Two functions of the weights of which the second derivative of one is missing on one side.
        return OnContext.apply(model(batch[0])).mean() + 1e-3 * model.weight.detach().square().mul(model.weight).sum()

    torch.manual_seed(0)
    with pytest.warns(HESDWarning, match="is not the derivative of its first"):
        report = hesd.analyze(Problem(nn.Linear(8, 3).double(), loss, vectors(8)), max_steps=5, progress=False)
    assert not check_of(report, "derivatives").passed


def test_a_loss_under_autocast_is_told_of_rounding():
    torch.manual_seed(0)
    model, data = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 3)), [(x.float(), y) for x, y in vectors(64)]

    def loss(model, batch):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return functional.cross_entropy(model(batch[0]).float(), batch[1])

    with pytest.warns(HESDWarning) as caught:
        hesd.analyze(model, loss, data, max_steps=6, progress=False)
    said = [str(one.message) for one in caught if "check of" in str(one.message)]
    assert said
    assert all("autocast" in text and "random" not in text for text in said)


def test_checks_of_a_run_in_bfloat16_can_fail(monkeypatch):
    torch.manual_seed(0)
    model, data = mlp(nn.Tanh).bfloat16(), [(x.bfloat16(), y) for x, y in vectors(16)]
    report = hesd.analyze(model, CROSS_ENTROPY, data, max_steps=5, progress=False)
    allowed = float(check_of(report, "orthogonality").detail.rpartition("allowed ")[2].rstrip(")"))
    assert allowed <= 1e-3  # the vectors are in float32
    assert check_of(report, "orthogonality").passed
    assert "allowed 7.6e-06" in check_of(report, "determinism").detail
    disturbed(monkeypatch, lambda out, call: out.mul_(1 + 1e-3 * call))
    with pytest.warns(HESDWarning, match="the check of determinism failed"):
        hesd.analyze(model, CROSS_ENTROPY, data, max_steps=5, progress=False)


def test_finite_differences_that_are_too_coarse_are_named_as_the_cause(monkeypatch):
    disturbed(monkeypatch, lambda out, call: out.add_(1e-4 * out.abs().max()))
    with pytest.warns(HESDWarning, match="the check of linearity failed") as caught:
        hesd.analyze(small_problem(), max_steps=4, block_size=2, hvp="finite_differences", progress=False)
    assert all("are finite differences" in str(one.message) and "kinks" in str(one.message) for one in caught)


def test_products_near_underflow_are_told_to_be_scaled():
    def tiny(model, batch):
        return 1e-38 * functional.cross_entropy(model(batch[0]), batch[1])

    torch.manual_seed(0)
    data = [(x.float(), y) for x, y in vectors(20)]
    with pytest.warns(
        HESDWarning, match=r"check of orthogonality failed: .*near underflow \(multiply the loss by a power"
    ):
        hesd.analyze(mlp(nn.Tanh), tiny, data, tolerance=None, progress=False)


def test_finite_differences_across_kinks_are_told_what_their_asymmetry_comes_from():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 3))
    data = [(torch.randn(20, 8), torch.randint(3, (20,))) for _ in range(2)]
    with pytest.raises(OperatorError, match=r"not those of one symmetric.*kinks \(use hvp='double_backward'\)"):
        hesd.analyze(model, CROSS_ENTROPY, data, hvp="finite_differences", max_steps=3, progress=False)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_probes_in_the_kernel_raise_no_alarm(dtype):
    torch.manual_seed(0)
    x = torch.randn(20, 4).to(dtype)
    data, model = [(x, (x[:, 0] > 0).long())], nn.Linear(4, 2).to(dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("error", HESDWarning)
        for seed in range(8):  # some are nearly (1, 1), which changes no probability
            options = {"block_size": 1, "max_steps": 5, "seed": seed, "reorthogonalization": "window"}
            hesd.analyze(model, CROSS_ENTROPY, data, parameters="bias", progress=False, **options)
