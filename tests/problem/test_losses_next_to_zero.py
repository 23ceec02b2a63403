"""Losses next to zero in float32: derivatives against float64, and spectra of networks against dense ones."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache

import pytest
import torch
from dense import dense_hessian
from torch import Tensor, nn
from torch.nn import functional

import hesd_fast as hesd
from hesd_fast.hvp import STRATEGIES
from hesd_fast.operators import GaussNewtonOperator, HessianOperator
from hesd_fast.problem.losses import causal_lm, supervised
from hesd_fast.problem.problem import Problem

pytestmark = pytest.mark.usefixtures("traced_alone")

EPSILON = torch.finfo(torch.float32).eps

MARGINS = torch.tensor([-40.0, -18.0, -3.0, 0.0, 3.0, 14.0, 18.0, 25.0, 40.0])
"""How far the target's logit lies above the largest of the others."""

CLASSES = 4


def logits_and_targets() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    targets = torch.randint(CLASSES, MARGINS.shape, generator=generator)
    others = 2 * torch.randn(len(MARGINS), CLASSES, generator=generator)
    there = others.scatter(1, targets[:, None], -torch.inf).amax(1)
    return others.scatter(1, targets[:, None], (there + MARGINS)[:, None]), targets


LOGITS, TARGETS = logits_and_targets()
WEIGHTS = torch.tensor([0.3, 1.0, 2.0, 5.0])
ONE_HOT = functional.one_hot(TARGETS, CLASSES).float()
NEARLY = torch.where(ONE_HOT > 0, 1 - 3 * 2.0**-30, 2.0**-30).double()  # in float32 they are 1


def of_logits(z: Tensor) -> Tensor:
    return z


def by_rows(z: Tensor) -> Tensor:
    return z.T[None]


CRITERIA: dict[str, tuple[nn.Module, Tensor, Callable[[Tensor], Tensor]]] = {
    "classes": (nn.CrossEntropyLoss(), TARGETS, of_logits),
    "weights": (nn.CrossEntropyLoss(WEIGHTS, reduction="sum"), TARGETS, of_logits),
    "ignored": (nn.CrossEntropyLoss(ignore_index=int(TARGETS[5])), TARGETS, of_logits),
    "more dimensions": (nn.CrossEntropyLoss(), TARGETS[None], by_rows),
    "uint8": (nn.CrossEntropyLoss(), TARGETS.to(torch.uint8), of_logits),
    "probabilities": (nn.CrossEntropyLoss(WEIGHTS), ONE_HOT, of_logits),
    "nearly one": (nn.CrossEntropyLoss(), NEARLY, of_logits),
    "binary": (nn.BCEWithLogitsLoss(), ONE_HOT, of_logits),
    "binary, weights": (nn.BCEWithLogitsLoss(WEIGHTS, pos_weight=3 * WEIGHTS), ONE_HOT, of_logits),
    "multi-label": (nn.MultiLabelSoftMarginLoss(WEIGHTS), ONE_HOT, of_logits),
}


def derivatives(function: Callable[[Tensor], Tensor], z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return value, gradient and the diagonal blocks (rows, C, C) of the Hessian."""
    leaf = z.clone().requires_grad_()
    value = function(leaf)
    (slope,) = torch.autograd.grad(value, leaf, create_graph=True)
    columns = [torch.autograd.grad(slope[:, c].sum(), leaf, retain_graph=True)[0] for c in range(CLASSES)]
    return value.detach(), slope.detach(), torch.stack(columns, 2)


def in_double(criterion: nn.Module) -> nn.Module:
    return copy.deepcopy(criterion).double()


@pytest.mark.parametrize("name", CRITERIA)
def test_derivatives_have_all_their_digits(name: str) -> None:
    criterion, targets, form = CRITERIA[name]
    wide_targets = targets.double() if targets.is_floating_point() else targets
    found = derivatives(lambda z: supervised(criterion).of_outputs(form(z), (None, targets))[0], LOGITS)
    wanted = derivatives(
        lambda z: supervised(in_double(criterion)).of_outputs(form(z), (None, wide_targets))[0], LOGITS.double()
    )
    # The exponential of a difference of logits has the rounding of that difference.
    tolerance = 8 * EPSILON * (1 + float(MARGINS.abs().max()))
    torch.testing.assert_close(found[0].double(), wanted[0], rtol=tolerance, atol=0)
    rows = torch.ones(len(LOGITS), dtype=torch.bool) if name != "ignored" else targets != criterion.ignore_index
    for one, truth in zip(found[1:], wanted[1:], strict=True):
        # Entries of a row are sums of terms of either sign where the target is not the most probable class.
        scale = truth[rows].flatten(1).abs().amax(1)
        off = (one.double() - truth)[rows].flatten(1).abs().amax(1)
        assert (scale > 0).all()
        assert (off <= tolerance * scale).all(), off / scale
        assert not one[~rows].any()
    # The float64 forms against PyTorch's own ones.
    own = derivatives(lambda z: in_double(criterion)(form(z), wide_targets), LOGITS.double())
    ratio = float(own[0] / wanted[0])  # the mean's divisor
    for one, truth in zip(own, wanted, strict=True):
        eps = torch.finfo(torch.float64).eps
        torch.testing.assert_close(one, ratio * truth, rtol=0, atol=64 * eps * float(own[0]))


@pytest.mark.parametrize("name", [name for name in CRITERIA if name != "ignored"])
def test_pytorchs_own_have_none(name: str) -> None:
    # Once PyTorch has mended these, there is nothing to replace.
    criterion, targets, form = CRITERIA[name]
    wide_targets = targets.double() if targets.is_floating_point() else targets
    found = derivatives(lambda z: criterion(form(z), targets), LOGITS)[2]
    wanted = derivatives(lambda z: in_double(criterion)(form(z), wide_targets), LOGITS.double())[2]
    rows = ((MARGINS > 17) & (MARGINS < 30)).nonzero()[:, 0]  # beyond, float64 has none either
    found, wanted = (part[rows, TARGETS[rows], TARGETS[rows]] for part in (found, wanted))
    assert float(((found - wanted).abs() / wanted.abs()).max()) > 0.1


@cache
def network(target: float) -> tuple[nn.Module, Tensor, Tensor]:
    """Return a ReLU network in float32 whose last layer is scaled until the loss of its own classes is ``target``."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, CLASSES))
    inputs = 3 * torch.randn(40, 6)
    classes = model(inputs).argmax(1)
    top = model(inputs).detach().topk(2, 1).values
    kept = (top[:, 0] - top[:, 1]).argsort(descending=True)[:24]
    inputs, classes = inputs[kept], classes[kept]
    weight, bias = model[-1].weight.detach().clone(), model[-1].bias.detach().clone()
    low, high = 1e-2, 1e4
    for _ in range(60):
        middle = (low * high) ** 0.5
        model[-1].weight.data, model[-1].bias.data = middle * weight, middle * bias
        low, high = (
            (middle, high) if loss_by_hand(in_double(model), inputs.double(), classes) > target else (low, middle)
        )
    return model, inputs, classes


def loss_by_hand(model: nn.Module, inputs: Tensor, classes: Tensor) -> Tensor:
    z = model(inputs)
    differences = (z - z.gather(1, classes[:, None])).exp()
    return differences.scatter(1, classes[:, None], 0.0).sum(1).log1p().mean()


@cache
def dense(target: float) -> Tensor:
    model, inputs, classes = network(target)
    wide = in_double(model)
    return dense_hessian(wide, lambda m: loss_by_hand(m, inputs.double(), classes), dict(wide.named_parameters()))


def tolerance(target: float) -> float:
    """How far float32 logits let a product be off: the exponential of a logit has the rounding of the logit."""
    model, inputs, _ = network(target)
    return 16 * EPSILON * float(model(inputs).detach().abs().max())


LOSSES = [1e-6, 2e-8, 9e-12]


@pytest.mark.parametrize("target", LOSSES)
def test_spectra_of_networks(target: float) -> None:
    model, inputs, classes = network(target)
    data = [(inputs[:10], classes[:10]), (inputs[10:], classes[10:])]
    problem = Problem(model, supervised(nn.CrossEntropyLoss()), data)
    assert abs(problem.loss_value - target) <= tolerance(target) * target
    eigenvalues = torch.linalg.eigvalsh(dense(target))
    largest, smallest = float(eigenvalues[-1]), float(eigenvalues[0])
    report = hesd.analyze(problem, max_steps=40, block_size=2, progress=False)
    allowed = tolerance(target) * largest
    assert report.lambda_max.low - allowed <= largest <= report.lambda_max.high + allowed
    assert report.lambda_min.low - allowed <= smallest <= report.lambda_min.high + allowed
    assert report.lambda_max.high - report.lambda_max.low <= 1e-3 * largest
    r_e = report.criteria.r_e
    assert r_e.low - tolerance(target) <= -smallest / largest <= r_e.high + tolerance(target)
    truth = hesd.SpectralMeasure(eigenvalues.numpy(), torch.full_like(eigenvalues, 1 / len(eigenvalues)).numpy())
    squares = sum(float(p.detach().square().sum()) for p in model.parameters())
    wanted, _ = hesd.classify(truth, hesd.criteria(truth), loss_value=target, parameter_norm_squared=squares)
    assert report.hesd_type is wanted


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_strategy_keeps_the_digits(strategy: str) -> None:
    target = 9e-12
    model, inputs, classes = network(target)
    panel = torch.randn(3, len(dense(target)), generator=torch.Generator().manual_seed(0))
    wanted = panel.double() @ dense(target)
    problem = Problem(model, supervised(nn.CrossEntropyLoss()), [(inputs, classes)])
    product = HessianOperator(problem, hvp=strategy).matmat(panel).double()
    assert float((product - wanted).norm() / wanted.norm()) <= tolerance(target)


@pytest.mark.parametrize("margin", [-30.0, 30.0], ids=["sure and wrong", "sure and right"])
def test_gauss_newton_of_sure_networks(margin: float) -> None:
    # The curvature of either is exp(-30), whichever class it is that the network is sure of.
    model = nn.Linear(1, CLASSES, bias=False)
    model.weight.data = torch.tensor([[0.0], [margin if margin > 0 else 1.0], [0.5], [-margin if margin < 0 else 0.2]])
    data = [(torch.ones(2, 1), torch.ones(2, dtype=torch.int64))]
    operator = GaussNewtonOperator(Problem(model, supervised(nn.CrossEntropyLoss()), data))
    p = model.weight.detach().double()[:, 0].softmax(0)
    wanted = torch.diag(p) - torch.outer(p, p)
    top = int(p.argmax())
    wanted[top, top] = p[top] * (p.sum() - p[top])
    found = operator.matmat(torch.eye(CLASSES)).double()
    assert float((found - wanted).norm() / wanted.norm()) <= 64 * EPSILON * 30


def test_tokens_next_to_certainty() -> None:
    torch.manual_seed(0)
    model = nn.Embedding(5, 5)
    model.weight.data = 22 * torch.eye(5).roll(1, 1) + torch.rand(5, 5)
    batch = {"input_ids": torch.tensor([[0, 1, 2, 3, 4, 0], [2, 3, 4, 0, 1, 2]])}
    problem, wide = Problem(model, causal_lm(), batch), Problem(copy.deepcopy(model).double(), causal_lm(), batch)
    panel = torch.randn(2, 25)
    found, wanted = HessianOperator(problem).matmat(panel).double(), HessianOperator(wide).matmat(panel.double())
    assert problem.loss_value < 1e-8
    assert float((found - wanted).norm() / wanted.norm()) <= 16 * EPSILON * 22
