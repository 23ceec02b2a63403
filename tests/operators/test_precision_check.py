"""Products are compared with the same in a wider precision: what differs is measured and told, with its cause."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from dense import dense_hessian
from models import vectors
from snapshots import snapshot
from torch import Tensor, nn
from torch.nn import functional

import hesd_fast as hesd
from hesd_fast.hvp import wide_loss
from hesd_fast.operators import (
    EmpiricalFisherOperator,
    GaussNewtonOperator,
    GroupedHessianOperator,
    HessianOperator,
    precision_check,
)
from hesd_fast.operators.precision_check import ProductPrecision, check_precision

FACTOR = 1.1
ERROR = FACTOR**2 - 1.0
"""Of a quadratic function of outputs that are too large by that factor."""

ROUNDING = 64 * 2.0**-23
DRAWS = "draws random numbers"


def grown(x: Tensor) -> Tensor:
    """A function that is another one in float32, as one that rounds is."""
    return x * (FACTOR if x.dtype == torch.float32 else 1.0)


def squares(model, batch) -> Tensor:
    return grown(model(batch[0])).square().mean()


def checked(operator, products=400) -> ProductPrecision:
    """What the check finds of an operator that has multiplied."""
    operator.matvec(torch.ones(operator.size))
    found = check_precision(operator, products)
    assert found.precision is not None, found.reason
    return found.precision


def reason(operator) -> str:
    operator.matvec(torch.ones(operator.size))
    found = check_precision(operator, 400)
    assert found.precision is None
    return found.reason


def linear(inputs: int, outputs: int = 1, samples: int = 20):
    torch.manual_seed(0)
    return nn.Linear(inputs, outputs), [(torch.randn(samples, inputs), torch.randn(samples, outputs))]


def true_hessian(model, data) -> np.ndarray:
    wide = torch.cat([x for x, _ in data]).double()
    model = type(model)(model.in_features, model.out_features).double()
    return dense_hessian(model, lambda m: m(wide).square().mean(), dict(model.named_parameters())).numpy()


def test_the_error_of_few_parameters_is_exact():
    model, data = linear(4)
    found = checked(HessianOperator(hesd.Problem(model, squares, data)))
    values = np.linalg.eigvalsh(true_hessian(model, data))
    assert found.vectors == 5
    assert found.relative_error == pytest.approx(ERROR, rel=ROUNDING)
    assert found.relative_errors == pytest.approx((ERROR, ERROR), rel=ROUNDING)
    assert (found.cosine, *found.cosines) == pytest.approx((1.0, 1.0, 1.0), abs=ROUNDING)
    assert found.error.largest == pytest.approx(ERROR * values.max(), rel=ROUNDING)
    assert found.error.average == pytest.approx(ERROR * np.sqrt(np.square(values).mean()), rel=ROUNDING)
    assert found.error.mean == pytest.approx(ERROR * values.mean(), rel=ROUNDING)
    assert found.loss == pytest.approx((1.0 + ERROR) * found.reference_loss, rel=ROUNDING)
    assert not found.suffices


def error_matrices() -> dict[str, Tensor]:
    """Errors of rank one, of full rank, and of a few ranks with both signs, of norm one."""
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(40, 40, generator=generator, dtype=torch.float64)).Q
    values = {
        "rank one": [1.0] + 39 * [0.0],
        "full rank": [(-1.0) ** i * (1.0 - i / 80) for i in range(40)],
        "few": [1.0, -0.5, 0.25, -0.125] + 36 * [0.0],
    }
    return {name: (basis * torch.tensor(one, dtype=torch.float64)) @ basis.T for name, one in values.items()}


@pytest.mark.parametrize("vectors", [2, 4, 8])
@pytest.mark.parametrize("name", ["rank one", "full rank", "few"])
def test_bounds_of_the_error_hold_at_the_stated_risk(name, vectors):
    matrix, generator, runs = error_matrices()[name], torch.Generator().manual_seed(1), 1000
    values = torch.linalg.eigvalsh(matrix).numpy()
    wanted = np.array([np.abs(values).max(), np.sqrt(np.square(values).mean()), abs(values.mean())])
    found = []
    for _ in range(runs):
        panel = torch.randn(vectors, 40, generator=generator, dtype=torch.float64)
        error = precision_check._bounds(panel @ matrix, panel)
        found.append([error.largest, error.average, error.mean])
    missed = (np.array(found) < wanted).sum(axis=0)
    # two numbers at that risk, or one at twice; and what 1000 runs of that may be by chance
    assert missed.max() <= 2 * precision_check.RISK * runs + 3 * math.sqrt(2 * precision_check.RISK * runs)
    assert vectors < 8 or np.median(found, axis=0)[0] <= 2.5 * np.linalg.norm(values)


def test_the_worst_parameter_is_named():
    torch.manual_seed(0)
    model, data = nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 3)), vectors(30)

    def loss(model, batch):
        bias = model[2].bias * (FACTOR if model[2].bias.dtype == torch.float32 else 1.0)
        return (model(batch[0].float()).tanh() + bias - model[2].bias).square().mean()

    found = checked(HessianOperator(hesd.Problem(model, loss, data)))
    assert found.worst == "2.bias"
    assert max(found.relative_errors) == found.relative_errors[3]


def test_rounding_alone_passes():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 3))
    data = [(x.float(), y) for x, y in vectors(30)]
    loss = hesd.losses.supervised(nn.CrossEntropyLoss())
    found = checked(HessianOperator(hesd.Problem(model, loss, data)))
    assert found.suffices
    assert found.vectors == 2
    assert 0.0 < found.relative_error <= ROUNDING
    assert found.cause == ""


@pytest.mark.parametrize("kind", [GaussNewtonOperator, EmpiricalFisherOperator])
def test_other_matrices_are_compared_too(kind):
    class Grown(nn.Linear):
        def forward(self, x):
            return grown(super().forward(x))

    torch.manual_seed(0)
    model, data = Grown(4, 2), [(torch.randn(9, 4), torch.randn(9, 2)) for _ in range(2)]
    found = checked(kind(hesd.Problem(model, hesd.losses.supervised(nn.MSELoss()), data), jvp="reverse"))
    assert found.batches == 2
    if kind is GaussNewtonOperator:  # the gradients of the other matrix have the targets in them
        assert found.relative_error == pytest.approx(ERROR, rel=ROUNDING)
    assert found.relative_error > 0.01
    plain = nn.Linear(4, 2)
    exact = checked(kind(hesd.Problem(plain, hesd.losses.supervised(nn.MSELoss()), data)))
    assert exact.relative_error <= ROUNDING


def test_each_block_is_compared_by_itself():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 3))
    data = [(x.float(), y) for x, y in vectors(30)]
    operator = GroupedHessianOperator(hesd.Problem(model, squares, data), "modules")
    for name, block in operator.blocks.items():
        found = checked(block)
        assert found.relative_error == pytest.approx(ERROR, rel=ROUNDING)
        assert found.worst.startswith(f"{name}.")
        assert len(found.relative_errors) == 2


def test_a_short_run_compares_the_batches_that_the_loss_comes_from():
    torch.manual_seed(0)
    data = [(torch.randn(5, 20) * (10.0 if i == 17 else 0.1), torch.zeros(5, 1)) for i in range(20)]
    operator = HessianOperator(hesd.Problem(nn.Linear(20, 1), squares, data))
    assert checked(operator, products=700).batches == 20
    found = checked(operator, products=40)
    assert found.batches == precision_check.LEAST_BATCHES
    wide = torch.cat([x for x, _ in data]).double()
    wide = torch.cat((wide, torch.ones(100, 1, dtype=torch.float64)), dim=1)
    assert found.error.largest >= ERROR * 2.0 / 100 * float(torch.linalg.matrix_norm(wide, 2)) ** 2


def test_products_in_float64_cost_nothing(monkeypatch):
    monkeypatch.setattr(precision_check, "WideLoss", None)
    torch.manual_seed(0)
    report = hesd.analyze(nn.Linear(8, 3).double(), squares, vectors(20), max_steps=5, progress=False)
    assert report.precision is None
    assert "precision" not in {check.name for check in report.checks}


def test_the_model_stays_as_it_is():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3)).train()
    data = [(torch.randn(20, 8), torch.randint(3, (20,)))]
    before = snapshot(model)
    state = torch.get_rng_state()
    loss = hesd.losses.supervised(nn.CrossEntropyLoss())
    report = hesd.analyze(hesd.Problem(model, loss, data, mode="as_is"), max_steps=4, progress=False)
    assert report.precision is not None
    assert torch.equal(torch.get_rng_state(), state)
    after = snapshot(model)
    assert str(before) == str(after)


class TakesFloat32(torch.autograd.Function):
    """An operation of one's own, for one precision."""

    @staticmethod
    def forward(ctx, x):
        if x.dtype == torch.float64:
            raise TypeError("only float32 is supported")
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient.clone()


def taking_float32(model, batch):
    return TakesFloat32.apply(model(batch[0])).square().mean()


def test_what_cannot_be_had_in_float64_is_not_known(monkeypatch):
    model, data = linear(20)
    said = reason(HessianOperator(hesd.Problem(model, taking_float32, data)))
    assert said == "products could not be compared with those in float64: only float32 is supported"
    report = hesd.analyze(model, taking_float32, data, max_steps=4, progress=False)
    (check,) = (check for check in report.checks if check.name == "precision")
    assert check.passed
    assert check.detail.startswith("not known: ")
    monkeypatch.setattr(wide_loss, "COPIES", 10**18)
    assert "GiB are free" in reason(HessianOperator(hesd.Problem(model, squares, data)))


def test_float32_takes_the_place_of_float64_for_lower_precision():
    model, data = linear(20)

    def loss(model, batch):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            hidden = model(batch[0])
        return TakesFloat32.apply(hidden.float()).square().mean()

    found = checked(HessianOperator(hesd.Problem(model, loss, data)))
    assert found.reference == "float32"
    assert 1e-4 < found.relative_error < 0.1
    found = checked(HessianOperator(hesd.Problem(model.bfloat16(), loss, [(x.bfloat16(), y) for x, y in data])))
    assert found.reference == "float32"


def test_random_numbers_that_are_others_in_float64_say_nothing():
    class Noisy(nn.Linear):
        def forward(self, x):
            return super().forward(x + torch.randn(x.shape))

    torch.manual_seed(0)
    data = [(torch.randn(20, 20), torch.zeros(20, 1))]
    problem = hesd.Problem(Noisy(20, 1), squares, data, mode="train")
    assert DRAWS in reason(HessianOperator(problem))
    model = nn.Sequential(nn.Linear(20, 10), nn.Dropout(0.3), nn.Linear(10, 2))

    def loss(model, batch):
        return model(batch[0]).square().mean()

    assert checked(HessianOperator(hesd.Problem(model, loss, data, mode="train"))).relative_error <= ROUNDING


def test_finite_differences_have_a_check_of_their_own():
    model, data = linear(20)
    operator = HessianOperator(hesd.Problem(model, squares, data), hvp="finite_differences")
    assert "finite differences" in reason(operator)


def own_cross_entropy(model, batch):
    return functional.cross_entropy(model(batch[0]), batch[1])


def under_autocast(model, batch):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return functional.cross_entropy(model(batch[0]).float(), batch[1])


def in_half(model, batch):
    return functional.cross_entropy(model[2](model[1](model[0](batch[0])).bfloat16().float()), batch[1])


def with_coarse_products(model, batch):
    torch.set_float32_matmul_precision("medium")
    return grown(model(batch[0])).square().mean()


@pytest.mark.parametrize(
    ("loss", "wanted"),
    [
        (under_autocast, "autocast to bfloat16"),
        (in_half, "operations in bfloat16"),
        (with_coarse_products, "set_float32_matmul_precision('medium')"),
        (squares, "rounding of float32"),
        (own_cross_entropy, "rounding of float32"),
    ],
)
def test_the_setting_that_likely_causes_it_is_named(loss, wanted, monkeypatch):
    monkeypatch.setattr(precision_check, "LARGEST_ERROR", 0.0)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 3))
    data = [(x.float(), y) for x, y in vectors(30)]
    assert wanted in checked(HessianOperator(hesd.Problem(model, loss, data))).cause


def test_parameters_in_lower_precision_are_named_as_the_cause():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 3)).bfloat16()
    found = checked(HessianOperator(hesd.Problem(model, own_cross_entropy, [(x.bfloat16(), y) for x, y in vectors(9)])))
    assert "parameters in bfloat16" in found.cause


def fitted(target: float, seed: int = 0):
    """A classifier in float32 whose last layer is scaled so that its loss is near ``target``, and its data."""
    torch.manual_seed(seed)
    x = torch.randn(40, 6)
    y = x[:, :3].argmax(1)
    model = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 3))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(1500):
        optimizer.zero_grad()
        loss = functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        if loss < 2e-3:
            break
    last, wide = model[2], nn.Sequential(*model).double()
    low, high = 1.0, 200.0
    with torch.no_grad():
        weight, bias = last.weight.clone(), last.bias.clone()
        for _ in range(40):
            scale = math.sqrt(low * high)
            last.weight.copy_(scale * weight)
            last.bias.copy_(scale * bias)
            low, high = (scale, high) if functional.cross_entropy(wide(x.double()), y) > target else (low, scale)
    return model.float(), [(x, y)]


@pytest.mark.parametrize("loss", [own_cross_entropy, under_autocast])
@pytest.mark.parametrize("target", [1e-3, 1e-6, 2e-8])
def test_where_noise_dominates_no_extreme_eigenvalue_is_missed(target, loss):
    model, data = fitted(target)
    x, y = data[0]
    model.double()
    hessian = dense_hessian(model, lambda m: functional.cross_entropy(m(x.double()), y), dict(model.named_parameters()))
    values = np.linalg.eigvalsh(hessian.numpy())
    model.float()
    if target < 1e-3 or loss is under_autocast:
        with pytest.warns(hesd.errors.HESDWarning, match="check of precision failed: products are") as caught:
            report = hesd.analyze(model, loss, data, max_steps=20, progress=False)
        (text,) = {str(one.message) for one in caught if "check of precision" in str(one.message)}
        assert ("loss near zero" if loss is own_cross_entropy else "autocast to bfloat16") in text
        assert report.hesd_type is hesd.HESDType.UNDETERMINED
    else:
        report = hesd.analyze(model, loss, data, max_steps=20, progress=False)
        assert report.hesd_type is hesd.HESDType.MP
    truth = {report.lambda_max: values[-1], report.lambda_min: values[0], report.trace: values.sum()}
    truth |= {
        report.criteria.balance: values.sum() / np.abs(values).sum(),
        report.criteria.r_e: max(-values[0], 0.0) / values[-1],
    }
    for estimate, true in truth.items():
        assert estimate.low <= true <= estimate.high


def test_products_that_have_vanished_leave_everything_open():
    torch.manual_seed(0)
    model, data = nn.Linear(6, 3), [(torch.randn(20, 6), torch.randint(3, (20,)))]

    def loss(model, batch):  # its curvature underflows in float32
        return (functional.cross_entropy(model(batch[0]), batch[1]) * 1e-30) * 1e-30

    with pytest.warns(hesd.errors.HESDWarning, match="check of precision failed"):
        report = hesd.analyze(model, loss, data, max_steps=20, progress=False)
    assert report.lambda_max.value == 0.0 < report.lambda_max.high
    assert report.hesd_type is hesd.HESDType.UNDETERMINED
    assert (report.criteria.balance.low, report.criteria.balance.high) == (-1.0, 1.0)
