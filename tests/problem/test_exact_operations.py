"""Operations that PyTorch cannot differentiate twice, or gets wrong: products against the same functions by hand."""

from __future__ import annotations

import itertools
import pickle
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import pytest
import torch
from dense import dense_hessian
from snapshots import assert_same, snapshot
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from hesd_fast import losses
from hesd_fast.errors import OperatorError
from hesd_fast.hvp import STRATEGIES
from hesd_fast.operators import EmpiricalFisherOperator, GaussNewtonOperator, HessianOperator
from hesd_fast.problem.exact_operations import OPERATIONS, ExactOperations
from hesd_fast.problem.problem import Problem

pytestmark = pytest.mark.usefixtures("float64_by_default", "traced_alone")

EPSILON = torch.finfo(torch.float64).eps
ROUNDING = 256 * EPSILON
"""Share of a norm by which two ways to the same derivative may differ: each is a sum of some tens of rounded terms."""

Loss = Callable[[nn.Module, Any], Tensor]


class Applied(nn.Module):
    """A function of a linear layer's output, and of a few parameters of its own, between two layers."""

    def __init__(self, function: Callable[..., Tensor], inputs: int, hidden: int, outputs: int, **own: Tensor) -> None:
        super().__init__()
        self.function = function
        self.first, self.last = nn.Linear(inputs, hidden), nn.Linear(outputs, 3)
        self.own = nn.ParameterList(own.values())

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.function(self.first(x), *self.own))


def mean_square(model: nn.Module, batch: Any) -> Tensor:
    return torch.tanh(model(batch)).square().mean()


def gradient_penalty(model: nn.Module, batch: Tensor) -> Tensor:
    """A loss that holds the gradient of the model by its inputs, as critics and force fields have it."""
    x = batch.clone().requires_grad_()
    (slope,) = torch.autograd.grad(torch.tanh(model(x)).sum(), x, create_graph=True)
    return model(x).square().mean() + (slope.flatten(1).norm(dim=1) - 1).square().mean()


# The same functions by hand: loops over bags, samples and pairs where the package has none.


def hardsigmoid(x: Tensor) -> Tensor:
    return torch.where(x <= -3, 0.0, torch.where(x >= 3, 1.0, x / 6 + 0.5))


def bags_by_hand(
    ids: list[list[int]], weight: Tensor, mode: str, factors: list[Tensor] | None = None, padding: int | None = None
) -> Tensor:
    rows = []
    for number, bag in enumerate(ids):
        picked = [
            weight[i] * (1.0 if factors is None else factors[number][place])
            for place, i in enumerate(bag)
            if i != padding
        ]
        if not picked:
            rows.append(torch.zeros_like(weight[0]))
            continue
        stacked = torch.stack(picked)
        if mode == "max":
            rows.append(torch.stack([column[int(column.argmax())] for column in stacked.T]))
        else:
            rows.append(stacked.sum(0) / (len(picked) if mode == "mean" else 1))
    return torch.stack(rows)


def paths(labels: list[int], frames: int, blank: int) -> Iterator[tuple[int, ...]]:
    """Every way to write so many frames that reads as the labels."""
    for path in itertools.product({blank, *labels}, repeat=frames):
        if [c for c, before in zip(path, (None, *path), strict=False) if c not in (blank, before)] == labels:
            yield path


def ctc_by_hand(
    log_probs: Tensor,
    targets: list[list[int]],
    frames: list[int],
    blank: int = 0,
    reduction: str = "mean",
    zero_infinity: bool = False,
) -> Tensor:
    """The sum over all alignments, one by one."""
    found = []
    for n, labels in enumerate(targets):
        logs = [
            sum((log_probs[t, n, c] for t, c in enumerate(path)), torch.zeros(()))
            for path in paths(labels, frames[n], blank)
        ]
        if logs:
            found.append(-torch.logsumexp(torch.stack(logs), 0))
        else:
            found.append(torch.tensor(0.0 if zero_infinity else torch.inf))
    if reduction == "mean":
        found = [one / max(len(labels), 1) for one, labels in zip(found, targets, strict=True)]
    return {"mean": torch.mean, "sum": torch.sum, "none": lambda t: t}[reduction](torch.stack(found))


def normalized(x: Tensor, dims: list[int], weight: Any = 1.0, bias: Any = 0.0) -> Tensor:
    mean = x.mean(dims, keepdim=True)
    return (x - mean) / ((x - mean) ** 2).mean(dims, keepdim=True).add(1e-5).sqrt() * weight + bias


def distances_by_hand(x: Tensor, y: Tensor, p: float) -> Tensor:
    def distance(a: Tensor, b: Tensor) -> Tensor:
        if torch.equal(a, b):
            return torch.zeros(())
        return (a - b).abs().max() if p == torch.inf else ((a - b).abs() ** p).sum() ** (1 / p)

    return torch.stack([torch.stack([distance(a, b) for b in y]) for a in x])


def multi_margin_by_hand(x: Tensor, y: Tensor, p: int, margin: float, weight: Tensor | None) -> Tensor:
    total = torch.zeros(())
    for row, label in zip(x, y.tolist(), strict=True):
        for i in range(len(row)):
            if i != label and margin - row[label] + row[i] > 0:
                total = total + (margin - row[label] + row[i]) ** p * (1.0 if weight is None else weight[label])
    return total / x.numel()


def multilabel_margin_by_hand(x: Tensor, y: Tensor) -> Tensor:
    total = torch.zeros(())
    for row, labels in zip(x, y.tolist(), strict=True):
        chosen = labels[: labels.index(-1)] if -1 in labels else labels
        for label in chosen:
            for i in range(len(row)):
                if i not in chosen and 1 - row[label] + row[i] > 0:
                    total = total + 1 - row[label] + row[i]
    return total / x.numel()


@dataclass(frozen=True)
class Case:
    """A model and loss of PyTorch's operation, and the same by hand; ``build(native)`` draws the same weights."""

    name: str
    build: Callable[[bool], nn.Module]
    data: Callable[[], Any]
    loss: Loss = mean_square
    loss_by_hand: Loss | None = None
    operation: str = ""

    def __str__(self) -> str:
        return self.name


def function_case(
    name: str,
    native: Callable[..., Tensor],
    by_hand: Callable[..., Tensor],
    operation: str,
    *,
    hidden: int = 4,
    outputs: int = 4,
    own: Callable[[], dict[str, Tensor]] = dict,
    **options: Any,
) -> Case:
    def build(is_native: bool) -> nn.Module:
        torch.manual_seed(0)
        tensors = own()
        model = Applied(native if is_native else by_hand, 3, hidden, outputs, **tensors)
        with torch.no_grad():
            model.first.weight.mul_(4.0)  # so that all pieces of a function are met
        return model

    options.setdefault("data", lambda: torch.randn(6, 3, generator=torch.Generator().manual_seed(1)))
    return Case(name, build, operation=operation, **options)


IDS = [[1, 4, 4], [], [7], [0, 2, 7, 1], []]
FLAT = torch.tensor([i for bag in IDS for i in bag])
STARTS = torch.tensor([0, 3, 3, 4, 8])


def bag_case(name: str, native: Callable[..., Tensor], mode: str, padding: int | None = None, **options: Any) -> Case:
    """Bags of rows of a matrix that depends on the weights in a curved way, so that its Hessian is not zero."""

    def build(is_native: bool) -> nn.Module:
        torch.manual_seed(0)
        return Bags(native if is_native else None, mode, padding)

    return Case(name, build, lambda: torch.zeros(5), operation="embedding_bag", **options)


class Bags(nn.Module):
    def __init__(self, native: Callable[..., Tensor] | None, mode: str, padding: int | None) -> None:
        super().__init__()
        self.native, self.mode, self.padding = native, mode, padding
        self.weight, self.factors = nn.Parameter(torch.randn(8, 3)), nn.Parameter(torch.randn(8))

    def forward(self, _: Tensor) -> Tensor:
        if self.native is not None:
            return self.native(self.weight.sinh(), self.factors)
        factors = None
        if self.mode == "weighted":
            factors = list(self.factors.split([len(bag) for bag in IDS]))
        mode = "sum" if self.mode == "weighted" else self.mode
        return bags_by_hand(IDS, self.weight.sinh(), mode, factors, self.padding)


class Speech(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3, 5), nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.first(x))).log_softmax(-1).transpose(0, 1)


LABELS = [[1, 1], [2, 3], [], [3, 3, 3], [2]]
LABEL_LENGTHS = torch.tensor([len(labels) for labels in LABELS])
PADDED_LABELS = torch.tensor([labels + [-7] * (3 - len(labels)) for labels in LABELS])
FLAT_LABELS = torch.tensor([c for labels in LABELS for c in labels])
FRAMES = [5, 3, 4, 5, 2]


def speech(_: bool) -> nn.Module:
    torch.manual_seed(0)
    return Speech()


def utterances() -> Tensor:
    return torch.randn(5, 5, 3, generator=torch.Generator().manual_seed(1))


def ctc_case(name: str, native: Loss, by_hand: Loss) -> Case:
    return Case(name, speech, utterances, native, by_hand, "ctc_loss")


class WeightNormed(nn.Module):
    """A linear map whose weight is g v / |v|, with the norm over rows or columns."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim
        self.v, self.last = nn.Parameter(torch.randn(4, 3)), nn.Linear(4, 2)
        self.g = nn.Parameter(torch.rand((4, 1) if dim == 0 else (1, 3)) + 0.5)


class FusedWeightNorm(WeightNormed):
    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(x @ torch._weight_norm(self.v, self.g, self.dim).T))


class WeightNormByHand(WeightNormed):
    def forward(self, x: Tensor) -> Tensor:
        norm = self.v.square().sum(1 - self.dim, keepdim=True).sqrt()
        return self.last(torch.tanh(x @ (self.g * self.v / norm).T))


def weight_norm_case(dim: int) -> Case:
    def build(native: bool) -> nn.Module:
        torch.manual_seed(0)
        return (FusedWeightNorm if native else WeightNormByHand)(dim)

    return Case(f"weight_norm {dim}", build, vectors, operation="weight_norm")


def rows_of_length(v: Tensor, g: Tensor) -> Tensor:
    return g * v / v.square().sum(1, keepdim=True).sqrt()


def vectors() -> Tensor:
    return torch.randn(6, 3, generator=torch.Generator().manual_seed(1))


def affine() -> dict[str, Tensor]:
    return {"weight": torch.rand(4) + 0.5, "bias": torch.randn(4)}


def norm_case(name: str, native: Callable[..., Tensor], by_hand: Callable[..., Tensor], operation: str) -> Case:
    return function_case(name, native, by_hand, operation, own=affine, loss=gradient_penalty)


def as_images(x: Tensor) -> Tensor:
    return torch.stack([x, x.sin(), x * x.roll(1, 0)], -1)


MEAN, VARIANCE = torch.linspace(-0.5, 0.5, 4, dtype=torch.float64), torch.linspace(0.5, 1.5, 4, dtype=torch.float64)
KINDS_OF_WEIGHTS = {
    nn.utils.parametrizations.weight_norm: ("original0", "original1"),
    nn.utils.weight_norm: ("_g", "_v"),
}
CLASS_WEIGHTS = torch.tensor([0.5, 2.0, 1.0], dtype=torch.float64)
CLASSES = torch.tensor([0, 1, 2, 2, 1, 0])
CLASS_SETS = torch.tensor([[0, -1, 1], [1, 2, -1], [-1, 0, 0], [0, 1, 2], [2, 2, -1], [1, -1, -1]])


CASES = [
    function_case("hardsigmoid", functional.hardsigmoid, hardsigmoid, "hardsigmoid"),
    function_case("hardsigmoid module", nn.Hardsigmoid(), hardsigmoid, "hardsigmoid"),
    function_case(
        "hardsigmoid in place",
        lambda x: functional.hardsigmoid(x * x, inplace=True),
        lambda x: hardsigmoid(x * x),
        "hardsigmoid",
    ),
    function_case("hardsigmoid of C", torch._C._nn.hardsigmoid, hardsigmoid, "hardsigmoid"),
    function_case("hardsigmoid_ of C", lambda x: torch._C._nn.hardsigmoid_(x.clone()), hardsigmoid, "hardsigmoid"),
    function_case("hardsigmoid of aten", torch.ops.aten.hardsigmoid.default, hardsigmoid, "hardsigmoid"),
    *(
        bag_case(
            f"embedding_bag {mode} padding {padding}",
            lambda weight, _, mode=mode, padding=padding: functional.embedding_bag(
                FLAT, weight, STARTS, mode=mode, padding_idx=padding
            ),
            mode,
            padding,
        )
        for mode in ("sum", "mean", "max")
        for padding in (None, 7)
    ),
    bag_case(
        "embedding_bag weighted, padding from the end, last offset",
        lambda weight, factors: functional.embedding_bag(
            FLAT,
            weight,
            torch.cat([STARTS, torch.tensor([8])]),
            mode="sum",
            per_sample_weights=factors,
            include_last_offset=True,
            padding_idx=-1,
        ),
        "weighted",
        7,
    ),
    bag_case(
        "embedding_bag of torch, sparse, int32",
        lambda weight, _: torch.embedding_bag(weight, FLAT.int(), STARTS.int(), mode=1, sparse=True)[0],
        "mean",
    ),
    ctc_case(
        "ctc_loss padded",
        lambda m, b: functional.ctc_loss(m(b), PADDED_LABELS, torch.tensor(FRAMES), LABEL_LENGTHS),
        lambda m, b: ctc_by_hand(m(b), LABELS, FRAMES),
    ),
    ctc_case(
        "ctc_loss module, concatenated, tuples, sum",
        lambda m, b: nn.CTCLoss(reduction="sum")(m(b), FLAT_LABELS, tuple(FRAMES), tuple(LABEL_LENGTHS.tolist())),
        lambda m, b: ctc_by_hand(m(b), LABELS, FRAMES, reduction="sum"),
    ),
    ctc_case(
        "ctc_loss of torch, none, impossible ones are zero",
        lambda m, b: (
            torch.ctc_loss(m(b), PADDED_LABELS, torch.tensor([5, 1, 0, 4, 2]), LABEL_LENGTHS, 0, 0, True)
            * torch.arange(1.0, 6.0)
        ).sum(),
        lambda m, b: (
            ctc_by_hand(m(b), LABELS, [5, 1, 0, 4, 2], reduction="none", zero_infinity=True) * torch.arange(1.0, 6.0)
        ).sum(),
    ),
    ctc_case(
        "ctc_loss blank 3, one sample without a batch",
        lambda m, b: functional.ctc_loss(
            m(b)[:, 0], torch.tensor([0, 0]), torch.tensor(5), torch.tensor(2), blank=3, reduction="none"
        ),
        lambda m, b: ctc_by_hand(m(b)[:, :1], [[0, 0]], [5], blank=3, reduction="sum"),
    ),
    ctc_case(
        "ctc_loss with a class that cannot be",
        lambda m, b: functional.ctc_loss(
            m(b)[:, [0, 2, 4]].masked_fill(torch.arange(4) == 3, -torch.inf).log_softmax(-1),
            PADDED_LABELS[[0, 2, 4], :2],
            (5, 4, 2),
            (2, 0, 1),
        ),
        lambda m, b: ctc_by_hand(m(b)[:, [0, 2, 4], :3].log_softmax(-1), [LABELS[0], [], LABELS[4]], [5, 4, 2]),
    ),
    weight_norm_case(0),
    weight_norm_case(1),
    function_case(
        "weight_norm of rows, and of the whole",
        lambda x, v, g, h: torch.tanh(x @ torch._weight_norm(torch._weight_norm(v, g, 0), h, -1).T),
        lambda x, v, g, h: torch.tanh(x @ (h * rows_of_length(v, g) / rows_of_length(v, g).norm()).T),
        "weight_norm",
        own=lambda: {"v": torch.randn(4, 4), "g": torch.rand(4, 1) + 0.5, "h": torch.tensor(1.7)},
    ),
    norm_case(
        "layer_norm",
        lambda x, w, b: functional.layer_norm(x, (4,), w, b),
        lambda x, w, b: normalized(x, [-1], w, b),
        "layer_norm",
    ),
    norm_case(
        "layer_norm of torch, two dimensions",
        lambda x, w, b: torch.layer_norm(as_images(x), (4, 3), torch.stack([w, b, b], 1)).sum(-1),
        lambda x, w, b: normalized(as_images(x), [-2, -1], torch.stack([w, b, b], 1)).sum(-1),
        "layer_norm",
    ),
    norm_case(
        "batch_norm of the batch",
        lambda x, w, b: functional.batch_norm(x, None, None, w, b, training=True),
        lambda x, w, b: normalized(x, [0], w, b),
        "batch_norm",
    ),
    norm_case(
        "batch_norm of the batch, images, torch",
        lambda x, w, b: torch.batch_norm(as_images(x), w, b, None, None, True, 0.1, 1e-5, False).mean(-1),
        lambda x, w, b: normalized(as_images(x), [0, 2], w[:, None], b[:, None]).mean(-1),
        "batch_norm",
    ),
    norm_case(
        "batch_norm of running statistics",
        lambda x, w, b: functional.batch_norm(x, MEAN, VARIANCE, w, b),
        lambda x, w, b: (x - MEAN) / (VARIANCE + 1e-5).sqrt() * w + b,
        "batch_norm",
    ),
    norm_case(
        "instance_norm",
        lambda x, w, b: functional.instance_norm(as_images(x), weight=w, bias=b).square().mean(-1),
        lambda x, w, b: normalized(as_images(x), [2], w[:, None], b[:, None]).square().mean(-1),
        "batch_norm",
    ),
    norm_case(
        "instance_norm of running statistics, torch",
        lambda x, w, b: torch.instance_norm(as_images(x), w, b, MEAN, VARIANCE, False, 0.1, 1e-5, False).mean(-1),
        lambda x, w, b: ((as_images(x) - MEAN[:, None]) / (VARIANCE + 1e-5).sqrt()[:, None]).mean(-1) * w + b,
        "batch_norm",
    ),
    *(
        function_case(
            f"cdist {p}",
            lambda x, p=p: torch.cdist(x, torch.cat([x[:2], x.roll(1, 1)[1:3]]), p=p),
            lambda x, p=p: distances_by_hand(x, torch.cat([x[:2], x.roll(1, 1)[1:3]]), p),
            "cdist",
        )
        for p in (1.0, 1.5, 2.0, 3.0, torch.inf)
    ),
    function_case(
        "pdist",
        lambda x: functional.pdist(torch.cat([x, x[:1]]), 3.0)[:20].view(5, 4),
        lambda x: distances_by_hand(torch.cat([x, x[:1]]), torch.cat([x, x[:1]]), 3.0)[
            tuple(torch.triu_indices(7, 7, 1))
        ][:20].view(5, 4),
        "pdist",
    ),
    *(
        function_case(
            f"multi_margin_loss {p} {'weighted' if weight is not None else ''}",
            torch.sinh,
            torch.sinh,
            "multi_margin_loss",
            loss=lambda m, b, p=p, w=weight: functional.multi_margin_loss(m(b), CLASSES, p, 0.7, w),
            loss_by_hand=lambda m, b, p=p, w=weight: multi_margin_by_hand(m(b), CLASSES, p, 0.7, w),
        )
        for p in (1, 2)
        for weight in (None, CLASS_WEIGHTS)
    ),
    function_case(
        "multilabel_margin_loss",
        torch.sinh,
        torch.sinh,
        "multilabel_margin_loss",
        loss=lambda m, b: nn.MultiLabelMarginLoss()(m(b), CLASS_SETS),
        loss_by_hand=lambda m, b: multilabel_margin_by_hand(m(b), CLASS_SETS),
    ),
]

if hasattr(nn, "LinearCrossEntropyOptions"):
    CASES += [
        function_case(
            f"linear_cross_entropy {reduction}",
            torch.sinh,
            torch.sinh,
            "linear_cross_entropy",
            loss=lambda m, b, r=reduction: functional.linear_cross_entropy(
                m(b), m.first.weight, CLASSES, reduction=r, options=nn.LinearCrossEntropyOptions()
            ).mean(),
            loss_by_hand=lambda m, b: -(m(b) @ m.first.weight.T).log_softmax(1)[range(6), CLASSES].mean(),
        )
        for reduction in ("mean", "none")
    ]


NORMS = [case for case in CASES if case.loss is gradient_penalty and "running" not in case.name]


def relative(found: Tensor, wanted: Tensor) -> float:
    return float((torch.linalg.vector_norm(found - wanted) / torch.linalg.vector_norm(wanted)).detach())


def matrix(problem: Problem, hvp: str = "double_backward") -> Tensor:
    return HessianOperator(problem, hvp=hvp).matmat(torch.eye(problem.size))


def problem_of(case: Case, **options: Any) -> Problem:
    return Problem(case.build(True), lambda m, b: case.loss(m, b["x"]), {"x": case.data()}, **options)


@cache
def wanted_matrix(case: Case) -> Tensor:
    by_hand = case.build(False)
    loss = case.loss_by_hand or case.loss
    return dense_hessian(by_hand, lambda model: loss(model, case.data()), dict(by_hand.named_parameters()))


def assert_nothing_left() -> None:
    assert torch._C._len_torch_function_stack() == 0
    assert torch.autograd._engine_run_backward is torch.autograd.graph._engine_run_backward


@pytest.mark.parametrize("case", CASES, ids=str)
def test_hessian_is_that_of_the_function_by_hand(case: Case) -> None:
    problem = problem_of(case)
    before = snapshot(problem.model)
    found = matrix(problem)
    assert relative(found, wanted_matrix(case)) <= ROUNDING
    assert problem.replaced_operations == (case.operation,)
    assert torch.equal(matrix(problem), found)
    assert_same(before, snapshot(problem.model))
    assert_nothing_left()


@pytest.mark.parametrize("hvp", [name for name in STRATEGIES if name != "double_backward"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_strategy_multiplies_as_by_hand(case: Case, hvp: str) -> None:
    if case.loss is gradient_penalty and hvp == "forward_over_reverse":
        with pytest.raises(OperatorError, match="use hvp='double_backward'"):
            matrix(problem_of(case), hvp)
    else:
        assert relative(matrix(problem_of(case), hvp), wanted_matrix(case)) <= ROUNDING


@pytest.mark.parametrize("case", CASES, ids=str)
def test_value_and_gradient_are_those_of_pytorch(case: Case) -> None:
    model, operations = case.build(True), ExactOperations()
    own = case.loss(model, case.data())
    with operations.replacing(OPERATIONS):
        replaced = case.loss(model, case.data())
    assert relative(replaced, own) <= ROUNDING
    parameters = list(model.parameters())
    gradients = [
        torch.cat([g.to_dense().flatten() for g in torch.autograd.grad(loss, parameters, materialize_grads=True)])
        for loss in (replaced, own)
    ]
    # PyTorch's derivative of hardsigmoid has 1/6 in float32.
    tolerance = torch.finfo(torch.float32).eps if case.operation == "hardsigmoid" else ROUNDING
    if case.name == "ctc_loss with a class that cannot be":
        assert torch.isfinite(gradients[0]).all()
        assert torch.isnan(gradients[1]).any()
    else:
        assert relative(*gradients) <= tolerance


@pytest.mark.parametrize("case", NORMS, ids=str)
def test_the_hessian_by_pytorch_alone_is_wrong(case: Case) -> None:
    # Once PyTorch has mended these, there is nothing to replace.
    native = case.build(True)
    found = dense_hessian(native, lambda model: case.loss(model, case.data()), dict(native.named_parameters()))
    assert relative(found, wanted_matrix(case)) > 0.01


@pytest.mark.parametrize("name", ["hardsigmoid", "layer_norm", "ctc_loss padded", "embedding_bag max padding 7"])
def test_finite_differences_serve_as_well(name: str) -> None:
    case = next(case for case in CASES if case.name == name)
    assert relative(matrix(problem_of(case), "finite_differences"), wanted_matrix(case)) <= 0.01


def test_at_the_kinks_of_hardsigmoid_the_derivative_is_zero() -> None:
    at = nn.ParameterList([torch.tensor([-3.0, -3.0 + 1e-12, 0.0, 3.0 - 1e-12, 3.0, 4.0]), torch.ones(6)])
    problem = Problem(at, lambda m, b: (functional.hardsigmoid(m[0]) * m[1]).sum() + 0 * b["x"].sum(), {"x": vectors()})
    found = matrix(problem)[:6, 6:]
    assert torch.allclose(found, torch.diag(torch.tensor([0.0, 1.0, 1.0, 1.0, 0.0, 0.0])) / 6, rtol=ROUNDING, atol=0.0)


def labelled() -> tuple[Tensor, Tensor]:
    return vectors(), CLASSES


@pytest.mark.parametrize("kind", [GaussNewtonOperator, EmpiricalFisherOperator])
@pytest.mark.parametrize("mode", ["auto", "forward", "reverse"])
def test_gauss_newton_and_fisher_are_those_of_the_function_by_hand(kind: type, mode: str) -> None:
    case = CASES[0]
    loss = losses.supervised(nn.CrossEntropyLoss())
    native, by_hand = (kind(Problem(case.build(is_native), loss, labelled()), jvp=mode) for is_native in (True, False))
    eye = torch.eye(native.size)
    assert relative(native.matmat(eye), by_hand.matmat(eye)) <= ROUNDING
    assert native.problem.replaced_operations == ("hardsigmoid",)


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("weight_norm", [nn.utils.parametrizations.weight_norm, nn.utils.weight_norm])
def test_both_weight_norms_of_layers_are_right(weight_norm: Callable[[nn.Module], nn.Module]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(weight_norm(nn.Linear(3, 4)), nn.Tanh(), nn.Linear(4, 2))
    parameters = dict(model.named_parameters())
    g, v = (next(p for name, p in parameters.items() if name.endswith(end)) for end in KINDS_OF_WEIGHTS[weight_norm])
    by_hand = WeightNormByHand(0)
    with torch.no_grad():
        by_hand.g.copy_(g), by_hand.v.copy_(v)
        by_hand.last.load_state_dict(model[2].state_dict())
    bias = nn.Parameter(model[0].bias.detach().clone())
    by_hand.register_parameter("bias", bias)

    def total(by_hand: nn.Module) -> Tensor:
        hidden = torch.tanh(vectors() @ rows_of_length(by_hand.v, by_hand.g).T + by_hand.bias)
        return by_hand.last(hidden).square().mean()

    order = {"bias": bias, "g": by_hand.g, "v": by_hand.v, **dict(by_hand.last.named_parameters(prefix="last"))}
    wanted = dense_hessian(by_hand, total, order)
    problem = Problem(model, lambda m, b: m(b["x"]).square().mean(), {"x": vectors()})
    assert [p.shape for p in problem.parameters.values()] == [p.shape for p in order.values()]
    assert relative(matrix(problem), wanted) <= ROUNDING


class Checkpointed(nn.Module):
    """A model whose middle is computed again during backward passes."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.inner, x, use_reentrant=False)


@pytest.mark.parametrize("name", ["hardsigmoid", "hardsigmoid in place", "layer_norm", "batch_norm of the batch"])
def test_what_checkpoints_compute_again_is_replaced_too(name: str) -> None:
    case = next(case for case in CASES if case.name == name)
    model = Checkpointed(case.build(True))
    problem = Problem(model, lambda m, b: case.loss(m, b["x"]), {"x": case.data()})
    assert relative(matrix(problem), wanted_matrix(case)) <= ROUNDING


class Watched(ExactOperations):
    """Counts the functions that come by."""

    seen = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        Watched.seen += 1
        return super().__torch_function__(func, types, args, kwargs)


@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.BatchNorm1d])
def test_models_without_such_operations_are_left_alone(norm: type, monkeypatch: pytest.MonkeyPatch) -> None:
    # Norms have a right second derivative: only a loss with a gradient in it asks for a third.
    monkeypatch.setattr("hesd_fast.problem.evaluation.ExactOperations", Watched)
    model = nn.Sequential(nn.Linear(3, 4), norm(4), nn.Tanh(), nn.Linear(4, 2))
    problem = Problem(model, lambda m, b: m(b["x"]).square().mean(), {"x": vectors()}, mode="train")
    matrix(problem)
    with problem.session():
        assert_nothing_left()
    assert problem.replaced_operations == ()
    assert Watched.seen == 0


def test_modes_and_engine_come_back_after_an_exception_and_inner_sessions() -> None:
    problem = problem_of(CASES[0])
    problem.prepare()
    part = problem.restricted(["first.weight"])
    with problem.session():
        assert torch._C._len_torch_function_stack() == 1
        with part.session(), problem.session():
            pass
        assert torch._C._len_torch_function_stack() == 1
        with pytest.raises(ZeroDivisionError), part.session():
            raise ZeroDivisionError
        assert torch._C._len_torch_function_stack() == 1
    assert_nothing_left()


def test_a_mode_of_the_caller_stays_where_it_is() -> None:
    class Other(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            return func(*args, **(kwargs or {}))

    case, other = CASES[0], Other()
    with other:
        assert relative(matrix(problem_of(case)), wanted_matrix(case)) <= ROUNDING
        assert torch.overrides._get_current_function_mode_stack() == [other]
    problem = problem_of(case)
    with problem.session():
        with Other():
            problem.prepare()
        assert relative(matrix(problem), wanted_matrix(case)) <= ROUNDING
    assert_nothing_left()


class Squashed(nn.Module):
    """Can be pickled, as functions in a test cannot."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(nn.functional.hardsigmoid(self.first(x)))


def test_problems_carry_what_they_replace() -> None:
    problem = Problem(Squashed(), losses.supervised(nn.CrossEntropyLoss()), labelled())
    whole = matrix(problem)
    part = problem.restricted(["first.weight"])
    assert part.replaced_operations == ("hardsigmoid",)
    assert torch.equal(matrix(part), whole[:12, :12])
    other = pickle.loads(pickle.dumps(problem))
    assert other.replaced_operations == ("hardsigmoid",)
    assert torch.equal(matrix(other), whole)


def test_an_operation_in_a_later_batch_only() -> None:
    def loss(model: nn.Module, batch: dict[str, Tensor], squash: Callable[[Tensor], Tensor]) -> Tensor:
        hidden = model[0](batch["x"])
        return model[1](hidden.tanh() if len(hidden) > 3 else squash(hidden)).square().mean()

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    batches = [{"x": vectors()[:4]}, {"x": vectors()[4:]}]
    problem = Problem(model, partial(loss, squash=functional.hardsigmoid), batches)
    by_hand = Problem(model, partial(loss, squash=hardsigmoid), batches)
    assert relative(matrix(problem), matrix(by_hand)) <= ROUNDING
    assert problem.replaced_operations == ("hardsigmoid",)


def test_functions_that_pytorch_calls_back_are_in_the_mode_too() -> None:
    def loss(model: nn.Module, batch: dict[str, Tensor], squash: Callable[[Tensor], Tensor]) -> Tensor:
        hidden = model(batch["x"])
        return functional.triplet_margin_with_distance_loss(
            hidden, hidden.roll(1, 0), hidden.roll(2, 0), distance_function=lambda a, b: (squash(a) - b).square().sum(1)
        )

    torch.manual_seed(0)
    model = nn.Linear(3, 4)
    native, by_hand = (
        Problem(model, partial(loss, squash=squash), {"x": vectors()})
        for squash in (functional.hardsigmoid, hardsigmoid)
    )
    assert relative(matrix(native), matrix(by_hand)) <= ROUNDING


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
@pytest.mark.parametrize("ids", [torch.zeros(0, dtype=torch.int64), torch.zeros(2, 0, dtype=torch.int64), FLAT[:1]])
def test_bags_of_nothing_but_padding_or_nothing_are_zeros(mode: str, ids: Tensor) -> None:
    model = nn.EmbeddingBag(8, 3, mode=mode, padding_idx=1)
    arguments = (ids,) if ids.ndim == 2 else (ids, torch.zeros(2, dtype=torch.int64))
    with ExactOperations().replacing(["embedding_bag"]):
        found = model(*arguments)
    assert torch.equal(found, torch.zeros(2, 3))
    (gradient,) = torch.autograd.grad(found.exp().sum(), model.weight)
    assert torch.equal(gradient, torch.zeros(8, 3))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("function", [functional.batch_norm, functional.instance_norm])
@pytest.mark.parametrize("samples", [1, 5])
def test_running_statistics_move_as_those_of_pytorch(function: Any, training: bool, samples: int) -> None:
    x = torch.randn(samples, 4, 3, generator=torch.Generator().manual_seed(2))
    results = []
    for names in ((), ("batch_norm",)):
        mean, variance = MEAN.clone(), VARIANCE.clone()
        with ExactOperations().replacing(names):
            results.append((function(x, mean, variance, None, None, training, 0.3), mean, variance))
    for found, wanted in zip(*results, strict=True):
        assert relative(found, wanted) <= ROUNDING
    assert torch.equal(results[1][1], MEAN) != training


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_is_that_precision(dtype: torch.dtype) -> None:
    case = CASES[0]
    x = {"x": case.data().to(dtype)}
    problem = Problem(case.build(True).to(dtype), lambda m, b: case.loss(m, b["x"]), x)
    wanted = Problem(case.build(False).to(dtype), lambda m, b: case.loss(m, b["x"]), x)
    eye = torch.eye(problem.size, dtype=torch.float32)
    found, by_hand = (HessianOperator(one).matmat(eye) for one in (problem, wanted))
    assert relative(found, by_hand) <= 16 * torch.finfo(dtype).eps


def test_a_loss_that_is_another_one_with_the_operation_replaced_is_refused() -> None:
    calls: list[int] = []

    def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        calls.append(1)
        return functional.hardsigmoid(model(batch["x"])).square().mean() * len(calls)

    with pytest.raises(OperatorError, match=r"with hardsigmoid in ordinary operations, .* mend that"):
        Problem(nn.Linear(3, 2), loss, {"x": vectors()}).prepare()
    assert_nothing_left()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_wrong_derivative_that_cannot_be_replaced_is_refused_by_name() -> None:
    @torch.jit.script
    def normed(v: Tensor, g: Tensor) -> Tensor:
        return torch._weight_norm(v, g, 0)

    class Scripted(WeightNormed):
        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(x @ normed(self.v, self.g).T)

    model = nn.Sequential(Scripted(0), nn.Linear(4, 2))
    problem = Problem(model, lambda m, b: m(b["x"]).tanh().square().mean(), {"x": vectors()}, parameters="(0.[vg]|1.*)")
    with pytest.raises(OperatorError, match=r"weight_norm \(in module '0'\) .* is wrong, .* write it in Python"):
        matrix(problem)
    part = Problem(problem.model, problem.loss, problem.data, parameters="1.*")
    assert relative(matrix(part), matrix(part).T) <= ROUNDING  # its derivatives do not pass through the operation


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scale_grad_by_freq": True}, r"_embedding_bag_backward .* has no second derivative; replace it"),
        ({"max_norm": 0.1}, r"'weight' was written to in place"),
    ],
)
def test_bags_whose_gradient_is_not_that_of_their_value_are_refused(options: dict[str, Any], message: str) -> None:
    model = nn.EmbeddingBag(8, 3, mode="sum", **options)
    problem = Problem(model, lambda m, b: m(b["ids"]).tanh().square().mean(), {"ids": FLAT.view(2, 4)})
    with pytest.raises(OperatorError, match=message):
        matrix(problem)
    assert_nothing_left()
