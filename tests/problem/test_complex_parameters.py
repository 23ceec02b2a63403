"""Complex parameters are pairs of reals: products against the same model with its weights kept as such pairs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from dense import dense_hessian
from snapshots import assert_same, snapshot
from torch import Tensor, nn

from hesd_fast import analyze, load_report, losses
from hesd_fast.errors import ProblemError
from hesd_fast.hvp import STRATEGIES
from hesd_fast.operators import EmpiricalFisherOperator, GaussNewtonOperator, HessianOperator
from hesd_fast.operators.hessian_blocks import GroupedHessianOperator
from hesd_fast.problem.problem import Problem

pytestmark = pytest.mark.usefixtures("float64_by_default", "traced_alone")

EPSILON = torch.finfo(torch.float64).eps
ROUNDING = 256 * EPSILON
"""Share of a norm by which two ways to the same derivative may differ: each is a sum of some tens of rounded terms."""


def as_complex(pairs: Tensor) -> Tensor:
    return torch.complex(pairs[..., 0], pairs[..., 1])


class Spectral(nn.Module):
    """A Fourier layer between real ones; its weights are complex, or pairs of reals."""

    def __init__(self, pairs: bool = False) -> None:
        super().__init__()
        self.pairs = pairs
        self.lift, self.head = nn.Linear(1, 3, bias=False), nn.Linear(3, 2)  # 3 elements: what follows begins odd
        self.kernel, self.shift = self.weight(3, 3, 4), self.weight(4)

    def weight(self, *shape: int) -> nn.Parameter:
        drawn = 0.4 * torch.randn(*shape, dtype=torch.cdouble)
        return nn.Parameter(torch.view_as_real(drawn).clone() if self.pairs else drawn)

    def forward(self, x: Tensor) -> Tensor:
        kernel, shift = self.kernel, self.shift
        if self.pairs:
            kernel, shift = as_complex(kernel), as_complex(shift)
        hidden = self.lift(x[..., None])
        modes = torch.fft.rfft(hidden, dim=1)[:, :4]
        mixed = torch.einsum("nkc,cdk->nkd", modes, kernel) + shift[:, None] * modes.conj()
        hidden = torch.tanh(hidden + torch.fft.irfft(mixed, n=x.shape[1], dim=1))
        return self.head(hidden).mean(1)


class Rotated(nn.Module):
    """Complex linear layers with a nonlinearity of the modulus, which is not holomorphic, and real outputs."""

    def __init__(self, pairs: bool = False) -> None:
        super().__init__()
        self.pairs = pairs
        self.bias = nn.Parameter(torch.rand(3))
        for name, shape in (("first", (5, 3)), ("last", (2, 5))):
            drawn = 0.5 * torch.randn(shape, dtype=torch.cdouble)
            setattr(self, name, nn.Parameter(torch.view_as_real(drawn).clone() if pairs else drawn))

    def forward(self, x: Tensor) -> Tensor:
        first, last = self.first, self.last
        if self.pairs:
            first, last = as_complex(first), as_complex(last)
        hidden = (x[:, :3] + self.bias).to(first.dtype) @ first.T
        hidden = hidden * torch.tanh(hidden.abs())
        return (hidden @ last.T.conj()).real + hidden.angle().cos()[:, :2]


MODELS = [Spectral, Rotated]


def both(model: Callable[..., nn.Module]) -> tuple[nn.Module, nn.Module]:
    """Return a model with complex weights, and the same with pairs of reals."""
    models = []
    for pairs in (False, True):
        torch.manual_seed(0)
        models.append(model(pairs))
    return models[0], models[1]


def batches() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(n, 8, generator=generator), torch.arange(n) % 2) for n in (5, 3)]


CROSS_ENTROPY = losses.supervised(nn.CrossEntropyLoss())


def wanted_matrix(pairs: nn.Module) -> Tensor:
    inputs, labels = (torch.cat(parts) for parts in zip(*batches(), strict=True))

    def total(model: nn.Module) -> Tensor:
        return -model(inputs).log_softmax(1)[range(8), labels].mean()

    return dense_hessian(pairs, total, dict(pairs.named_parameters()))


def relative(found: Tensor, wanted: Tensor) -> float:
    return float(torch.linalg.vector_norm(found.double() - wanted) / torch.linalg.vector_norm(wanted))


def eye(problem: Problem) -> Tensor:
    return torch.eye(problem.size, dtype=problem.dtype)


@pytest.mark.parametrize("hvp", ["auto", *STRATEGIES])
@pytest.mark.parametrize("model", MODELS)
def test_hessian_is_that_of_pairs_of_reals(model: type, hvp: str) -> None:
    own, pairs = both(model)
    problem = Problem(own, CROSS_ENTROPY, batches())
    before = snapshot(own)
    found = HessianOperator(problem, hvp=hvp).matmat(eye(problem))
    assert relative(found, wanted_matrix(pairs)) <= ROUNDING
    assert_same(before, snapshot(own))


@pytest.mark.parametrize("hvp", ["finite_differences", "forward_differences"])
def test_finite_differences(hvp: str) -> None:
    own, pairs = both(Rotated)
    problem = Problem(own, CROSS_ENTROPY, batches())
    assert relative(HessianOperator(problem, hvp=hvp).matmat(eye(problem)), wanted_matrix(pairs)) <= 0.01


@pytest.mark.parametrize("kind", [GaussNewtonOperator, EmpiricalFisherOperator])
@pytest.mark.parametrize("jvp", ["auto", "forward", "reverse"])
@pytest.mark.parametrize("model", MODELS)
def test_gauss_newton_and_fisher_are_those_of_pairs_of_reals(model: type, jvp: str, kind: type) -> None:
    found, wanted = (
        kind(problem, jvp=jvp).matmat(eye(problem))
        for problem in (Problem(one, CROSS_ENTROPY, batches()) for one in both(model))
    )
    assert relative(found, wanted) <= ROUNDING


def test_blocks_of_groups() -> None:
    own, pairs = both(Spectral)
    problem = Problem(own, CROSS_ENTROPY, batches())
    whole = GroupedHessianOperator(problem, {"kernel": "kernel", "rest": ["shift", "lift.weight"]})
    found = whole.matmats({name: torch.eye(block.size) for name, block in whole.blocks.items()})
    wanted = wanted_matrix(pairs)
    names = [name for name, p in pairs.named_parameters() for _ in range(p.numel())]
    for group, members in (("kernel", {"kernel"}), ("rest", {"shift", "lift.weight"})):
        columns = torch.tensor([name in members for name in names])
        assert relative(found[group], wanted[columns][:, columns]) <= ROUNDING


def test_a_part_of_the_parameters() -> None:
    own, pairs = both(Spectral)
    problem = Problem(own, CROSS_ENTROPY, batches(), parameters="shift")
    columns = torch.tensor([name == "shift" for name, p in pairs.named_parameters() for _ in range(p.numel())])
    found = HessianOperator(problem).matmat(eye(problem))
    assert relative(found, wanted_matrix(pairs)[columns][:, columns]) <= ROUNDING


@pytest.mark.parametrize("hvp", ["double_backward", "forward_over_reverse"])
def test_single_precision(hvp: str) -> None:
    own, pairs = both(Rotated)
    for name, parameter in list(own.named_parameters()):
        single = parameter.detach().to(torch.complex64 if parameter.is_complex() else torch.float32)
        setattr(own, name, nn.Parameter(single))
    data = [(x.float(), y) for x, y in batches()]
    problem = Problem(own, CROSS_ENTROPY, data)
    assert problem.dtype == torch.float32
    assert problem.epsilon == torch.finfo(torch.float32).eps
    found = HessianOperator(problem, hvp=hvp).matmat(eye(problem))
    assert relative(found, wanted_matrix(pairs)) <= 256 * torch.finfo(torch.float32).eps


def test_a_complex_number_has_two_columns_real_part_first() -> None:
    own, pairs = both(Spectral)
    problem, of_pairs = (Problem(one, CROSS_ENTROPY, batches()) for one in (own, pairs))
    assert (problem.size, problem.offsets) == (of_pairs.size, of_pairs.offsets)
    assert problem.dtype == torch.float64
    assert problem.parameter_norm_squared == pytest.approx(of_pairs.parameter_norm_squared, rel=ROUNDING)
    assert [problem.describe(column) for column in range(problem.size)] == [
        name for name, p in pairs.named_parameters() for _ in range(p.numel())
    ]
    flat = problem.flatten(list(own.parameters()))
    assert torch.equal(flat, of_pairs.flatten(list(pairs.parameters())))
    for offset in (0, 1):  # complex numbers begin at even places of memory
        vector = torch.cat([torch.zeros(offset), flat])[offset:]
        back = problem.unflatten(vector)
        assert all(torch.equal(part, p) for part, p in zip(back, own.parameters(), strict=True))
        assert torch.equal(problem.flatten([part.conj().conj() for part in back]), flat)


def test_flatten_wants_complex_tensors_for_complex_parameters() -> None:
    problem = Problem(both(Rotated)[0], CROSS_ENTROPY, batches())
    with pytest.raises(ProblemError, match=r"dtypes \[torch\.float64, .* give complex ones for complex parameters"):
        problem.flatten([torch.zeros(p.shape) for p in problem.parameters.values()])


def test_a_complex_weight_that_is_not_finite_is_named() -> None:
    own, _ = both(Rotated)
    with torch.no_grad():
        own.last[0, 0] = complex(0.0, torch.inf)
    with pytest.raises(ProblemError, match="'last' holds NaN or Inf"):
        Problem(own, CROSS_ENTROPY, batches())


def test_a_report_of_a_model_with_complex_weights() -> None:
    own, pairs = both(Spectral)
    reports: list[Any] = [
        analyze(one, CROSS_ENTROPY, batches(), progress=False, hvp="double_backward") for one in (own, pairs)
    ]
    eigenvalues = torch.linalg.eigvalsh(wanted_matrix(pairs))
    for report in reports:
        assert report.lambda_max.value == pytest.approx(float(eigenvalues[-1]), rel=1e3 * EPSILON)
    assert all(check.passed for check in reports[0].checks)
    assert reports[0].problem.size == reports[1].problem.size


def test_a_report_of_complex_and_replaced_operations_comes_back_from_its_file(tmp_path: Path) -> None:
    class Gated(Rotated):
        def forward(self, x: Tensor) -> Tensor:
            return torch.nn.functional.hardsigmoid(super().forward(x))

    torch.manual_seed(0)
    report = analyze(Gated(), losses.supervised(nn.CrossEntropyLoss()), batches(), max_steps=6, progress=False)
    assert report.problem.shapes == ((3,), (5, 3, 2), (2, 5, 2))
    assert report.problem.replaced_operations == ("hardsigmoid",)
    assert "replaced    hardsigmoid, by ordinary operations" in str(report)
    report.save(tmp_path / "report.json")
    assert str(load_report(tmp_path / "report.json")) == str(report)
