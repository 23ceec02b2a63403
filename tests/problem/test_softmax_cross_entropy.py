"""The closed forms of softmax cross-entropy against PyTorch's own function, in every mode of differentiation."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from models import SmallTransformer, labelled_tokens, mlp, vectors
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functionalize, grad, grad_and_value, hessian, jacfwd, jacrev, jvp, linearize, vmap
from torch.nn import functional

from hesd_fast import losses
from hesd_fast.errors import ProblemError
from hesd_fast.hvp import STRATEGIES
from hesd_fast.operators import HessianOperator
from hesd_fast.problem import criterion_sums, softmax_cross_entropy
from hesd_fast.problem.problem import Problem

ROWS, CLASSES = 9, 5

Loss = Callable[[Tensor], Tensor]


@pytest.fixture(autouse=True, params=[7, 2 * CLASSES, 10**6], ids=["1-row", "2-rows", "all-rows"])
def chunks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(softmax_cross_entropy, "CHUNK", request.param)


def example(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return logits, targets, row weights and 4 directions."""
    generator = torch.Generator().manual_seed(0)
    logits, weights, u = (
        torch.randn(*shape, dtype=torch.float64, generator=generator)
        for shape in ((ROWS, CLASSES), (ROWS,), (4, ROWS, CLASSES))
    )
    targets = torch.randint(CLASSES, (ROWS,), generator=generator)
    return (3 * logits).to(dtype), targets, weights.to(dtype), u.to(dtype)


def both() -> tuple[Loss, Loss]:
    _, targets, weights, _ = example()
    return (
        lambda logits: (softmax_cross_entropy.softmax_cross_entropy(logits, targets) * weights).sum(),
        lambda logits: (functional.cross_entropy(logits, targets, reduction="none") * weights).sum(),
    )


def second(loss: Loss, logits: Tensor, u: Tensor, batched: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Return loss, gradient and Hessian times u by double backward."""
    leaf = logits.clone().requires_grad_()
    value = loss(leaf)
    (slope,) = torch.autograd.grad(value, leaf, create_graph=True)
    (product,) = torch.autograd.grad(slope, leaf, u, is_grads_batched=batched)
    return value.detach(), slope.detach(), product


def by_seed(loss: Loss, logits: Tensor, u: Tensor) -> Tensor:
    leaf = logits.clone().requires_grad_()
    value = loss(leaf)
    seed = torch.full_like(value, 2.0, requires_grad=True)
    (slope,) = torch.autograd.grad(value, leaf, seed, create_graph=True)
    return torch.cat([part.flatten() for part in torch.autograd.grad(slope, [leaf, seed], u[0])])


def third(loss: Loss, logits: Tensor, u: Tensor) -> Tensor:
    leaf = logits.clone().requires_grad_()
    (slope,) = torch.autograd.grad(loss(leaf), leaf, create_graph=True)
    (product,) = torch.autograd.grad(slope, leaf, u[0], create_graph=True)
    return torch.autograd.grad(product, leaf, u[1])[0]


def forward(loss: Loss, logits: Tensor, u: Tensor) -> Tensor:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(loss(forward_ad.make_dual(logits, u[0]))).tangent


def forward_over_reverse(loss: Loss, logits: Tensor, u: Tensor) -> Tensor:
    with forward_ad.dual_level():
        leaf = forward_ad.make_dual(logits.clone().requires_grad_(), u[0])
        (slope,) = torch.autograd.grad(loss(leaf), leaf, create_graph=True)
        return forward_ad.unpack_dual(slope).tangent


def linearized(loss: Loss, logits: Tensor, u: Tensor) -> Tensor:
    _, product = linearize(grad_and_value(loss), logits)
    one_by_one = [product(row)[0] for row in u]
    return torch.stack([*one_by_one, *vmap(product)(u)[0], product(u[0])[0]])


MODES: dict[str, Callable[[Loss, Tensor, Tensor], Any]] = {
    "double-backward": lambda loss, logits, u: second(loss, logits, u[0])[2],
    "double-backward-batched": lambda loss, logits, u: second(loss, logits, u, batched=True)[2],
    "seed": by_seed,
    "third": third,
    "forward": forward,
    "forward-over-reverse": forward_over_reverse,
    "linearize": linearized,
    "hessian": lambda loss, logits, u: hessian(loss)(logits),
    "reverse-over-reverse": lambda loss, logits, u: jacrev(jacrev(loss))(logits),
    "reverse-over-forward": lambda loss, logits, u: jacrev(jacfwd(loss))(logits),
    "forward-over-forward": lambda loss, logits, u: jacfwd(jacfwd(loss))(logits),
    "third-forward": lambda loss, logits, u: jacfwd(hessian(loss))(logits),
    "third-reverse": lambda loss, logits, u: jacrev(jacrev(jacrev(loss)))(logits),
    "vmap-of-product": lambda loss, logits, u: vmap(lambda v: jvp(grad(loss), (logits,), (v,))[1])(u),
    "vmap-of-gradient": lambda loss, logits, u: vmap(grad(loss))(logits + u),
    "vmap-of-hessian": lambda loss, logits, u: vmap(hessian(loss))(logits + u),
    "functionalize": lambda loss, logits, u: functionalize(grad(loss))(logits),
    "compiled": lambda loss, logits, u: torch.compile(
        lambda v: jvp(grad(loss), (logits,), (v,))[1], backend="aot_eager"
    )(u[0]),
}


@pytest.mark.filterwarnings("ignore:.*performance drop.*:UserWarning")
@pytest.mark.filterwarnings("ignore:.*get_attr Node.*:UserWarning")
@pytest.mark.parametrize("mode", MODES)
def test_every_mode_of_differentiation(mode: str) -> None:
    logits, _, _, u = example()
    found, wanted = (MODES[mode](loss, logits, u) for loss in both())
    assert found.shape == wanted.shape
    assert float(wanted.abs().max()) > 1e-3
    torch.testing.assert_close(found, wanted, rtol=0, atol=64 * torch.finfo(torch.float64).eps)


@pytest.mark.parametrize("graph", [False, True])
def test_jacobian_of_the_rows(graph: bool) -> None:
    # Cotangents as a batch, and J times vectors by differentiating J^T w.
    logits, targets, _, u = example()
    cotangents = torch.randn(4, ROWS, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    results = []
    for loss in (
        lambda z: softmax_cross_entropy.softmax_cross_entropy(z, targets),
        lambda z: functional.cross_entropy(z, targets, reduction="none"),
    ):
        leaf = logits.clone().requires_grad_()
        rows = loss(leaf)
        (parts,) = torch.autograd.grad(rows, leaf, cotangents, is_grads_batched=True, create_graph=graph)
        if graph:
            (parts,) = torch.autograd.grad(parts, leaf, u)
        dummy = torch.zeros_like(rows, requires_grad=True)
        (transposed,) = torch.autograd.grad(loss(leaf), leaf, dummy, create_graph=True)
        (products,) = torch.autograd.grad(transposed, dummy, u, is_grads_batched=True)
        results.append(torch.cat([parts.flatten(), products.flatten(), jacfwd(loss)(logits).flatten()]))
    torch.testing.assert_close(*results, rtol=0, atol=64 * torch.finfo(torch.float64).eps)


EXTREME = {
    "ordinary": example()[0],
    "huge": example()[0] * 1e30,
    "shifted": example()[0] + 1e4,
    "tiny-loss": torch.tensor([[1000.0, 980.0]], dtype=torch.float64),
    "masked-classes": torch.tensor([[0.0, 1.0, -torch.inf], [2.0, 3.0, -torch.inf]], dtype=torch.float64),
    "one-class": torch.zeros(3, 1, dtype=torch.float64),
    "no-rows": torch.zeros(0, 4, dtype=torch.float64),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", EXTREME)
def test_derivatives_are_those_of_pytorch(name: str, dtype: torch.dtype) -> None:
    logits = EXTREME[name].to(dtype)
    if name == "huge" and dtype == torch.float16:
        logits = EXTREME["ordinary"].to(dtype) * 1e3
    targets = torch.zeros(len(logits), dtype=torch.int64)
    u = torch.randn(logits.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).to(dtype)
    wide = torch.promote_types(dtype, torch.float32)
    found = second(lambda z: softmax_cross_entropy.softmax_cross_entropy(z, targets).sum(), logits, u)
    wanted = second(lambda z: functional.cross_entropy(z.to(wide), targets, reduction="sum"), logits, u)
    for one, other, precision in zip(found, wanted, (wide, dtype, dtype), strict=True):
        assert one.dtype == other.dtype == precision
        # Half precision is rounded once, and 1 ulp of the float32 result may turn that.
        eps = torch.finfo(precision).eps
        torch.testing.assert_close(one, other, rtol=64 * torch.finfo(wide).eps + eps, atol=64 * torch.finfo(wide).eps)


def test_only_logits_and_two_numbers_a_row_are_kept() -> None:
    logits, targets = torch.randn(64, 500, requires_grad=True), torch.randint(500, (64,))
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    for function, copies in (
        (lambda: softmax_cross_entropy.softmax_cross_entropy(logits, targets).sum(), 1),
        (lambda: functional.cross_entropy(logits, targets, reduction="sum"), 2),
    ):
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            torch.autograd.grad(function(), logits, create_graph=True)
        assert copies <= sum(kept.values()) / (64 * 500 * 4) < copies + 0.05


@pytest.mark.parametrize(
    "options",
    [{}, {"ignore_index": 1}, {"weight": torch.tensor([0.2, 1.5, 3.0], dtype=torch.float64), "ignore_index": 0}],
    ids=["plain", "ignore", "weight"],
)
@pytest.mark.parametrize("shape", [(7,), (5, 2, 2), (0,)], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_supervised_losses_use_them(reduction: str, shape: tuple[int, ...], options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    logits, targets = torch.randn((shape[0], 3, *shape[1:]), dtype=torch.float64), torch.randint(3, shape)
    loss = losses.supervised(nn.CrossEntropyLoss(reduction=reduction, **options))
    used = loss.of_outputs(logits.clone().requires_grad_(), (None, targets))[0]
    assert "NllLoss" not in str([used.grad_fn, used.grad_fn.next_functions])
    u = torch.randn_like(logits)
    found = second(lambda z: loss.of_outputs(z, (None, targets))[0], logits, u)
    wanted = second(lambda z: functional.cross_entropy(z, targets, reduction="sum", **options), logits, u)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=64 * torch.finfo(torch.float64).eps)


def test_ignored_rows_contribute_nothing() -> None:
    logits, _, _, u = example()
    ignored = torch.full((ROWS,), -100)
    loss = losses.supervised(nn.CrossEntropyLoss())
    for part in second(lambda z: loss.of_outputs(z, (None, ignored))[0], logits, u[0]):
        assert not part.any()
    logits[0] = torch.inf  # PyTorch's sum, too, leaves it out
    assert float(loss.of_outputs(logits, (None, ignored))[0]) == 0


@pytest.mark.parametrize(
    ("targets", "weight", "label_smoothing"),
    [
        (torch.rand(4, 3, dtype=torch.float64), None, 0.0),
        (torch.tensor([0, 1, 2, 0]), None, 0.1),
        (torch.tensor([0, 1, 2, 0], dtype=torch.uint8), None, 0.0),
    ],
    ids=["probabilities", "smoothing", "uint8"],
)
def test_other_targets_are_left_to_pytorch(targets: Tensor, weight: Tensor | None, label_smoothing: float) -> None:
    logits = torch.randn(4, 3, dtype=torch.float64)
    criterion = nn.CrossEntropyLoss(weight, label_smoothing=label_smoothing)
    total, count = losses.supervised(criterion).of_outputs(logits, (None, targets))
    torch.testing.assert_close(total / float(count), criterion(logits, targets), rtol=1e-14, atol=0)


@pytest.mark.parametrize(
    ("logits", "targets", "weight", "error"),
    [
        (torch.randn(4, 3), torch.tensor([0, 1, 2, 3]), None, "out of bounds"),
        (torch.randn(4, 3), torch.tensor([0, 1, 2]), None, "batch_size"),
        (torch.randn(4, 3), torch.tensor([0, 1, 2, 0]), torch.ones(2), "weight tensor should be defined"),
        (torch.randn(4, 3), torch.tensor([0, 1, 2, 0]), torch.ones(3).double(), "scalar type"),
    ],
)
def test_bad_targets_and_weights_raise(logits: Tensor, targets: Tensor, weight: Tensor | None, error: str) -> None:
    loss = losses.supervised(nn.CrossEntropyLoss(weight))
    with pytest.raises(
        ProblemError, match=f"CrossEntropyLoss cannot be computed of .*; give .*PyTorch says: .*{error}"
    ):
        loss.of_outputs(logits, (None, targets))


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("task", ["classes", "tokens"])
def test_every_strategy_takes_them(strategy: str, task: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    if task == "classes":
        problem = Problem(mlp(nn.Tanh).double(), losses.supervised(nn.CrossEntropyLoss()), vectors(8, 2))
    else:
        problem = Problem(SmallTransformer().double(), losses.causal_lm(), labelled_tokens(13, 3, 2))
    panel = torch.randn(3, problem.size, dtype=torch.float64)
    operator = HessianOperator(problem, hvp=strategy)
    products = [operator.matmat(panel) for _ in range(2)]
    monkeypatch.setattr(criterion_sums, "softmax_cross_entropy", partial(functional.cross_entropy, reduction="none"))
    wanted = HessianOperator(problem).matmat(panel)
    for product in products:
        assert float((product - wanted).norm() / wanted.norm()) <= 64 * torch.finfo(torch.float64).eps
