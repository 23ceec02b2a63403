"""Every strategy for Hessian products on every kind of model: the product of the dense Hessian, or a named refusal."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import pytest
import torch
from catalogue import CATALOGUE, LOW_PRECISION, WITHOUT_SECOND_DERIVATIVE, Case
from dense import dense_hessian, differenced_product, reverse_over_reverse
from snapshots import assert_same, snapshot
from torch import Tensor, nn

from hesd_fast.errors import OperatorError
from hesd_fast.hvp import STRATEGIES
from hesd_fast.operators import HessianOperator
from hesd_fast.problem.problem import Problem

pytestmark = pytest.mark.usefixtures("traced_alone")

EXACT = list(STRATEGIES)
REVERSE_BATCHED = ["double_backward_batched", "kept_graph_batched"]
KEPT_GRAPH = ["kept_graph", "kept_graph_batched"]
FORWARD = ["forward_over_reverse"]


@dataclass(frozen=True)
class Refusal:
    """Strategies that may not serve some cases, why, and what their error says."""

    cases: tuple[str, ...]
    strategies: list[str]
    reason: str
    message: str


CHECKPOINTS = ("checkpoint", "checkpoint-dropout-train", "checkpoint-norm-train", "checkpoint-buffer")

REFUSALS = [
    Refusal(
        ("once-differentiable", "once-differentiable-split"),
        EXACT,
        "there is no second derivative",
        r"Once\w*CubeBackward .*has no second derivative; replace it",
    ),
    Refusal(
        ("once-differentiable-later",),
        EXACT,
        "there is no second derivative in the second batch, and a first batch that has one must not hide that",
        r"no second derivative|setup_context",
    ),
    Refusal(
        ("padding", "bert-train"),
        FORWARD,
        "forward derivatives pass through the row of the padding, which the gradient takes for a constant",
        "gets the product of batch 0 wrong",
    ),
    Refusal(
        ("encoder-layer-train",),
        FORWARD,
        "under vmap, dropout of a transposed tensor draws its mask in another order of the elements",
        "batch 0",
    ),
    Refusal(
        ("sparse-gradient",),
        [*REVERSE_BATCHED, *FORWARD, "compiled"],
        "transforms and traces do not know sparse tensors",
        "(?i)sparse",
    ),
    Refusal(
        ("depthwise",),
        REVERSE_BATCHED,
        "PyTorch cannot batch the second derivative of a grouped convolution",
        "hvp='.*_batched' .*size of tensor",
    ),
    Refusal(
        CHECKPOINTS, [*KEPT_GRAPH, "compiled"], "a checkpoint would run again after its batch is over", "checkpoints"
    ),
    Refusal(CHECKPOINTS, FORWARD, "transforms do not know the hooks that checkpoints set", "saved tensor hooks"),
    Refusal(
        ("checkpoint-dropout-train",),
        ["double_backward_batched"],
        "the checkpoint draws its mask again, under vmap",
        "random operations inside of vmap",
    ),
    Refusal(
        ("kept-reference", "kept-reference-later"),
        FORWARD,
        "other weights cannot be put where the model looks for its own",
        "another way than its module's attribute",
    ),
    Refusal(("lstm-packed",), FORWARD, "transforms do not know packed sequences", "data pointer"),
    Refusal(
        ("slopes",),
        FORWARD,
        "torch.autograd.grad in the loss does not work within transforms",
        "requires_grad|does not require grad",
    ),
    Refusal(
        ("function-old", "function-nested"),
        FORWARD,
        "transforms want a function with setup_context",
        "setup_context",
    ),
    Refusal(
        ("function-split", "function-vmap", "function-split-later"),
        FORWARD,
        "a forward derivative wants the jvp of the function",
        "jvp|vmap support",
    ),
    Refusal(
        ("function-jvp",),
        FORWARD,
        "all vectors at once want the vmap rule of the function",
        "vmap support",
    ),
]

COMPARED = [case for case in CATALOGUE if case not in WITHOUT_SECOND_DERIVATIVE]
PAIRS = [pytest.param(case, name, id=f"{case}-{name}") for case in CATALOGUE for name in EXACT]


def refusal(case: Case, name: str) -> Refusal | None:
    return next((entry for entry in REFUSALS if case.name in entry.cases and name in entry.strategies), None)


def relative(result: Tensor, wanted: Tensor) -> float:
    return float(torch.linalg.vector_norm(result.double() - wanted) / torch.linalg.vector_norm(wanted))


def panel_of(operator: HessianOperator) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(3, operator.size, dtype=torch.float64, generator=generator).to(operator.dtype)


def in_float64(case: Case) -> tuple[nn.Module, object, dict[str, nn.Parameter]]:
    """Return model, data and parameters of a case for its hand-written total."""
    model, _, data = case.build()
    model = model.double().train(case.mode == "train")
    return model, data, {name: p for name, p in model.named_parameters() if p.requires_grad}


@cache
def truth(case: Case) -> Tensor:
    model, data, parameters = in_float64(case)
    return dense_hessian(model, lambda model: case.total(model, data), parameters)


@dataclass(frozen=True)
class Products:
    """What one strategy made of one case: products of 3, 3 and 1 vectors, or its error, and the model's states."""

    panel: Tensor
    before: dict[str, object]
    results: list[Tensor]
    error: Exception | None
    after: dict[str, object]


@cache
def products(case: Case, name: str) -> Products:
    model, loss, data = case.build()
    first = next(parameter for parameter in model.parameters() if parameter.requires_grad)
    first.grad = torch.ones_like(first)
    operator = HessianOperator(Problem(model, loss, data, mode=case.mode), hvp=name)
    panel, results, error = panel_of(operator), [], None
    before = snapshot(model)
    try:
        for part in (panel, panel, panel[1:2]):
            results.append(operator.matmat(part))
    except Exception as raised:
        error = raised
    return Products(panel, before, results, error, snapshot(model))


@pytest.mark.parametrize(("case", "name"), PAIRS)
def test_product_is_that_of_the_dense_hessian_or_refused(case: Case, name: str) -> None:
    found, refused = products(case, name), refusal(case, name)
    if refused is not None:
        assert not found.results, f"{name} serves {case}; take it out of REFUSALS"
        with pytest.raises(OperatorError, match=refused.message):
            raise found.error
        return
    if found.error is not None:
        raise found.error  # its traceback says more than a comparison would
    wanted = found.panel.double() @ truth(case)
    assert relative(found.results[0], wanted) <= case.tolerance
    assert relative(found.results[2], wanted[1:2]) <= case.tolerance


@pytest.mark.parametrize(("case", "name"), PAIRS)
def test_the_same_product_is_the_same_bits(case: Case, name: str) -> None:
    found = products(case, name)
    if refusal(case, name) is None:
        assert torch.equal(found.results[0], found.results[1])


@pytest.mark.parametrize(("case", "name"), PAIRS)
def test_model_is_unchanged_after_products_and_refusals(case: Case, name: str) -> None:
    found = products(case, name)
    assert_same(found.before, found.after)


@pytest.mark.parametrize("case", COMPARED, ids=str)
def test_dense_hessian_is_that_of_differenced_gradients(case: Case) -> None:
    # The truth comes from PyTorch's second derivatives too, so these could be wrong in the same way.
    model, data, parameters = in_float64(case)
    panel = torch.randn(2, sum(p.numel() for p in parameters.values()), dtype=torch.float64)
    for name, part in zip(parameters, panel.split([p.numel() for p in parameters.values()], dim=1), strict=True):
        module = model.get_submodule(name.rpartition(".")[0])
        if isinstance(module, nn.Embedding) and module.padding_idx is not None:
            # The row of the padding is a constant to PyTorch: its gradient is zero although the loss depends on it.
            part.view(len(part), *module.weight.shape)[:, module.padding_idx] = 0
    epsilon = torch.finfo(torch.float32 if case.name == "llama" else torch.float64).eps
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        found = [differenced_product(lambda: case.total(model, data), parameters, vector, epsilon) for vector in panel]
    # The formula keeps 4/5 of the digits at best, and higher derivatives cost it some.
    assert relative(torch.stack(found), panel @ truth(case)) <= epsilon**0.5
    assert relative(truth(case).T, truth(case)) <= case.tolerance


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("case", LOW_PRECISION, ids=str)
def test_low_precision_is_reverse_over_reverse_by_hand(case: Case, name: str) -> None:
    if refusal(case, name) is not None:
        pytest.skip("refused")
    model, _, data = case.build()
    parameters = dict(model.named_parameters())
    panel = products(case, name).panel
    wanted = [reverse_over_reverse(lambda: case.total(model, data), parameters, vector) for vector in panel]
    # All batches at once, so other sums; and forward over reverse rounds other intermediate results.
    assert relative(products(case, name).results[0], torch.stack(wanted).double()) <= case.tolerance


def test_table_of_refusals_is_about_what_exists() -> None:
    names = {case.name for case in CATALOGUE}
    assert len(names) == len(CATALOGUE)
    for entry in REFUSALS:
        assert set(entry.cases) <= names
        assert set(entry.strategies) <= set(EXACT)
