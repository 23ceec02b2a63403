"""Hessian-vector products against dense Hessians."""

from __future__ import annotations

import copy
import gc
import pickle
import sys
from functools import cache

import numpy as np
import pytest
import scipy.sparse
import torch
from catalogue import CASES, Case
from dense import dense_hessian
from models import Convolutional, OnceCube, dropout_mlp, images, mlp, vectors
from scipy.sparse.linalg import LinearOperator, aslinearoperator
from torch import Tensor, nn
from torch.nn import functional
from totals import classification, per_batch

import hesd_fast as hesd
from hesd_fast import losses
from hesd_fast.errors import OperatorError
from hesd_fast.hvp import STRATEGIES
from hesd_fast.operators import CurvatureOperator, HessianOperator, MatrixOperator, as_operator
from hesd_fast.problem.problem import Problem

CROSS_ENTROPY = losses.supervised(nn.CrossEntropyLoss())
LINEAR = next(case for case in CASES if case.name == "linear")

# A product is a sum over the terms of backpropagation, each rounded: 64 epsilon of its norm.
ROUNDING = 64


@cache
def truth(case: Case) -> Tensor:
    model, loss, data = case.build()
    model.train(case.mode == "train")
    problem = Problem(model, loss, data)
    return dense_hessian(model, lambda model: case.total(model, data), problem.parameters)


def relative(result: Tensor, wanted: Tensor) -> float:
    return float(torch.linalg.vector_norm(result.double() - wanted) / torch.linalg.vector_norm(wanted))


def to_float(batch: object) -> object:
    return tuple(leaf.float() if leaf.is_floating_point() else leaf for leaf in batch)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_product_is_that_of_the_dense_hessian(case: Case, dtype: torch.dtype) -> None:
    hessian = truth(case)
    model, loss, data = case.build()
    if dtype == torch.float32:
        model, data = model.float(), [to_float(batch) for batch in data]
    operator = HessianOperator(Problem(model, loss, data, mode=case.mode))
    panel = torch.randn(3, operator.size, dtype=torch.float64)
    result = operator.matmat(panel.to(dtype))
    assert result.dtype == dtype
    assert operator.size == len(hessian)
    assert relative(result, panel @ hessian) <= ROUNDING * torch.finfo(dtype).eps


@pytest.mark.parametrize("compensated", [False, True])
@pytest.mark.parametrize("kind", ["mean", "sum_and_count"])
def test_batches_of_8_and_2_are_one_batch_of_10(kind: str, compensated: bool) -> None:
    def mean(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return functional.cross_entropy(model(batch[0]), batch[1])

    loss = mean if kind == "mean" else CROSS_ENTROPY
    torch.manual_seed(0)
    model, uneven = mlp(nn.Tanh).double(), vectors(8, 2)
    whole = [tuple(torch.cat(parts) for parts in zip(*uneven, strict=True))]
    panel = torch.randn(2, Problem(model, loss, whole).size, dtype=torch.float64)
    one, two = (HessianOperator(Problem(model, loss, data), compensated).matmat(panel) for data in (whole, uneven))
    assert relative(two, one) <= ROUNDING * torch.finfo(torch.float64).eps
    assert Problem(model, loss, uneven).loss_value == pytest.approx(Problem(model, loss, whole).loss_value, rel=1e-14)


def test_compensation_recovers_what_many_batches_lose() -> None:
    torch.manual_seed(0)
    model, data = mlp(nn.Tanh), [to_float(batch) for batch in vectors(*[1] * 300)]
    operators = [HessianOperator(Problem(model, CROSS_ENTROPY, data), compensated) for compensated in (False, True)]
    panel = torch.randn(1, operators[0].size)
    plain, compensated = (operator.matmat(panel) for operator in operators)
    # The truth of the summation is the same float32 products added up in float64.
    parts = [
        HessianOperator(Problem(model, CROSS_ENTROPY, [batch])).matmat(panel).double() / len(data) for batch in data
    ]
    wanted = torch.stack(parts).sum(0)
    assert relative(compensated, wanted) < relative(plain, wanted) / 2
    assert relative(compensated, wanted) <= 2 * torch.finfo(torch.float32).eps


def test_unused_and_linear_parameters_give_zeros() -> None:
    model, loss, data = LINEAR.build()
    problem = Problem(model, loss, data)
    product = HessianOperator(problem).matvec(torch.randn(problem.size, dtype=torch.float64))
    parts = dict(zip(problem.parameters, problem.unflatten(product), strict=True))
    assert not parts["unused"].any()
    assert not parts["linear"].any()
    assert parts["body.0.weight"].any()


def test_loss_linear_in_everything_has_hessian_zero() -> None:
    problem = Problem(nn.Linear(8, 3).double(), lambda m, b: m(b[0]).mean(), vectors(4))
    out = torch.full((2, problem.size), torch.nan, dtype=torch.float64)
    assert not HessianOperator(problem).matmat(torch.ones_like(out), out=out).any()


def test_products_with_the_same_derivative_everywhere() -> None:
    # The derivatives of a sum are expanded scalars, which have no memory of their own.
    problem = Problem(nn.Linear(8, 3).double(), lambda m, b: m.bias.sum() ** 2 + 0 * m.weight.sum(), vectors(4))
    product = HessianOperator(problem).matvec(torch.ones(problem.size, dtype=torch.float64))
    assert problem.unflatten(product)[1].tolist() == [6.0, 6.0, 6.0]


def test_tied_weights_count_once() -> None:
    case = next(case for case in CASES if case.name == "transformer")
    model, loss, data = case.build()
    problem = Problem(model, loss, data)
    assert "head.weight" not in problem.parameters
    assert problem.size == sum(parameter.numel() for parameter in model.parameters())


def test_selection_is_a_diagonal_block() -> None:
    case = next(case for case in CASES if case.name == "frozen")
    model, loss, data = case.build()
    everything = dict(model.named_parameters())
    hessian = dense_hessian(model, lambda model: case.total(model, data), everything)
    problem = Problem(model, loss, data, parameters=["0.bias", "4.weight"])
    columns = torch.cat([torch.arange(256, 288), torch.arange(288 + 660, 288 + 720)])
    panel = torch.randn(2, problem.size, dtype=torch.float64)
    wanted = panel @ hessian[columns][:, columns]
    assert relative(HessianOperator(problem).matmat(panel), wanted) <= ROUNDING * torch.finfo(torch.float64).eps


@pytest.mark.parametrize("mode", ["eval", "train", "as_is"])
def test_each_mode_gives_its_own_hessian(mode: str) -> None:
    torch.manual_seed(0)
    model, data = Convolutional().double(), images(6, 3)
    hessians = {}
    for training in (False, True):
        reference = copy.deepcopy(model).train(training)
        hessians[training] = dense_hessian(
            reference, lambda model: per_batch(model, data), dict(reference.named_parameters())
        )
    model.train()  # what "as_is" leaves, and "eval" must not
    problem = Problem(model, CROSS_ENTROPY, data, mode=mode)
    panel = torch.randn(1, problem.size, dtype=torch.float64)
    product = HessianOperator(problem).matmat(panel)
    assert relative(product, panel @ hessians[mode != "eval"]) <= ROUNDING * torch.finfo(torch.float64).eps
    assert relative(product, panel @ hessians[mode == "eval"]) > 1e-3


def test_dropout_in_train_mode_is_one_fixed_function() -> None:
    torch.manual_seed(0)
    model, data = dropout_mlp(), vectors(8, 2)
    operators = {mode: HessianOperator(Problem(model, CROSS_ENTROPY, data, mode=mode)) for mode in ("train", "eval")}
    u, v = torch.randn(2, operators["eval"].size, dtype=torch.float64)
    first = operators["train"].matvec(v)
    torch.manual_seed(99)
    assert torch.equal(operators["train"].matvec(v), first)
    symmetric = abs(float(u @ first - v @ operators["train"].matvec(u)))
    scale = float(torch.linalg.vector_norm(u) * torch.linalg.vector_norm(first))
    assert symmetric <= ROUNDING * torch.finfo(torch.float64).eps * scale
    assert relative(operators["eval"].matvec(v), first) > 1e-3


def test_callers_grad_mode_does_not_matter() -> None:
    torch.manual_seed(0)
    model, data = mlp(nn.Tanh).double(), vectors(4)
    vector = torch.randn(sum(p.numel() for p in model.parameters()), dtype=torch.float64)
    wanted = HessianOperator(Problem(model, CROSS_ENTROPY, data)).matvec(vector)
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            operator = HessianOperator(Problem(model, CROSS_ENTROPY, data))
            assert torch.equal(operator.matvec(vector.clone()), wanted)
    with torch.inference_mode():
        out = torch.empty(1, len(vector), dtype=torch.float64)
    with pytest.raises(OperatorError, match="out was made in inference mode"):
        operator.matmat(vector[None], out=out)


def test_low_precision_parameters_have_float32_panels() -> None:
    torch.manual_seed(0)
    model = mlp(nn.Tanh).bfloat16()
    data = [(batch[0].bfloat16(), batch[1]) for batch in vectors(8, 2)]
    problem = Problem(model, CROSS_ENTROPY, data)
    product = HessianOperator(problem).matvec(torch.ones(problem.size))
    exact = HessianOperator(
        Problem(copy.deepcopy(model).double(), CROSS_ENTROPY, [(x.double(), y) for x, y in data])
    ).matvec(torch.ones(problem.size, dtype=torch.float64))
    assert product.dtype == torch.float32
    assert relative(product, exact) <= 16 * torch.finfo(torch.bfloat16).eps


def test_mixed_precision_parameters_have_float64_panels() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(8, 6), nn.Linear(6, 3).double()

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.first(x.float()).double().tanh())

    torch.manual_seed(0)
    model, data = Mixed(), vectors(8)
    problem = Problem(model, CROSS_ENTROPY, data)
    exact = HessianOperator(
        Problem(
            copy.deepcopy(model).double(),
            lambda m, b: functional.cross_entropy(m.last(m.first(b[0]).tanh()), b[1]),
            [(x.float().double(), y) for x, y in data],
        )
    )
    vector = torch.randn(problem.size, dtype=torch.float64)
    assert problem.dtype == torch.float64
    assert (
        relative(HessianOperator(problem).matvec(vector), exact.matvec(vector)) <= 64 * torch.finfo(torch.float32).eps
    )


def test_checkpointed_model() -> None:
    class Checkpointed(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            return torch.utils.checkpoint.checkpoint(self.inner, x, use_reentrant=False)

    torch.manual_seed(0)
    model, data = mlp(nn.Tanh).double(), vectors(8, 2)
    vector = torch.randn(sum(p.numel() for p in model.parameters()), dtype=torch.float64)
    wanted = HessianOperator(Problem(model, CROSS_ENTROPY, data)).matvec(vector)
    result = HessianOperator(Problem(Checkpointed(model), CROSS_ENTROPY, data)).matvec(vector)
    assert relative(result, wanted) <= ROUNDING * torch.finfo(torch.float64).eps


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="resident memory is read from /proc/self/statm")
def test_resident_memory_is_flat_over_200_products() -> None:
    def resident_megabytes() -> float:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * 4096 / 2**20

    torch.manual_seed(0)
    # The graph of one product holds more than a megabyte, so that keeping only one in ten would show.
    problem = Problem(mlp(nn.Tanh), CROSS_ENTROPY, [to_float(batch) for batch in vectors(1024)])
    operator, vector = HessianOperator(problem), torch.ones(1, problem.size)
    gc.collect()
    gc.disable()  # nothing may wait for the garbage collector
    try:
        for _ in range(50):
            operator.matmat(vector)
        before = resident_megabytes()
        for _ in range(150):
            operator.matmat(vector)
        assert resident_megabytes() - before < 15
    finally:
        gc.enable()


def test_out_panel_stride_and_count() -> None:
    torch.manual_seed(0)
    problem = Problem(mlp(nn.Tanh).double(), CROSS_ENTROPY, vectors(4))
    operator = HessianOperator(problem)
    panel = torch.randn(3, problem.size + 5, dtype=torch.float64)[:, : problem.size]
    wide = torch.full((3, problem.size + 9), 7.0, dtype=torch.float64)
    out = wide[:, : problem.size]
    assert operator.matmat(panel, out=out) is out
    assert torch.equal(out, operator.matmat(panel.contiguous()))
    assert (wide[:, problem.size :] == 7).all()
    assert torch.equal(operator.matvec(panel[1]), out[1])
    assert operator.matmat(panel[:0]).shape == (0, problem.size)
    assert operator.products == 7


def test_scipy_operator() -> None:
    torch.manual_seed(0)
    operator = HessianOperator(Problem(mlp(nn.Tanh).double(), CROSS_ENTROPY, vectors(4)))
    columns = np.random.default_rng(0).standard_normal((operator.size, 2))
    wanted = operator.matmat(torch.from_numpy(columns.T.copy())).T.numpy()
    linear = operator.to_scipy()
    np.testing.assert_array_equal(linear @ columns, wanted)
    np.testing.assert_array_equal(linear @ columns[:, 1], wanted[:, 1])
    assert linear.dtype == np.float64


class Cubing(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return OnceCube.apply(x)


class Flash(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        query = x[None, None]
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.FLASH_ATTENTION):
            return functional.scaled_dot_product_attention(query, query, query)[0, 0]


@pytest.mark.parametrize(
    ("model", "loss", "message"),
    [
        (
            nn.Sequential(nn.Linear(8, 4), Cubing(), nn.Linear(4, 3)),
            CROSS_ENTROPY,
            "CubeBackward .in module '1'.*replace",
        ),
        (
            nn.Linear(8, 3),
            lambda m, b: OnceCube.apply(m(b[0])).mean(),
            "CubeBackward .in the loss, batch 0. has no second derivative; .*hvp='finite_differences'",
        ),
        (nn.Sequential(nn.Linear(8, 8), Flash()), CROSS_ENTROPY, "flash_attention.* .in module '1'.* do not force"),
        (
            nn.Linear(8, 3),
            lambda m, b: torch.segment_reduce(m(b[0]), "mean", lengths=torch.tensor([len(b[0])])).mean(),
            "_segment_reduce_backward .in the loss, b",
        ),
        (torch.compile(mlp(nn.Tanh), backend="aot_eager"), CROSS_ENTROPY, r"give the model without torch\.compile"),
    ],
    ids=["once-differentiable", "once-differentiable-loss", "flash", "segment-reduce", "compiled"],
)
def test_missing_second_derivative_is_named(model: nn.Module, loss: object, message: str) -> None:
    operator = HessianOperator(Problem(model, loss, [to_float(batch) for batch in vectors(4, 2)]))
    with pytest.raises(OperatorError, match=message):
        operator.matvec(torch.ones(operator.size))


def test_reentrant_checkpoint_is_named() -> None:
    # Here a backward pass to the last layer alone never reaches the checkpoint, so PyTorch itself would not complain.
    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        hidden = torch.utils.checkpoint.checkpoint(model[0], batch[0].clone().requires_grad_(), use_reentrant=True)
        return model[1](hidden).square().mean()

    problem = Problem(nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 3)).double(), loss, vectors(4))
    with pytest.raises(OperatorError, match=r"reentrant .* hide their parameters .* use_reentrant=False"):
        HessianOperator(problem).matvec(torch.ones(problem.size, dtype=torch.float64))


def test_non_finite_product_names_the_parameter() -> None:
    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return (model.bias * 0).sqrt().sum() + model(batch[0].float()).square().mean()

    problem = Problem(nn.Linear(8, 3), loss, vectors(4))
    with pytest.raises(OperatorError, match=r"product holds nan in vector 0 at column 24 .parameter 'bias'"):
        HessianOperator(problem).matmat(torch.eye(problem.size)[[0, 24]])


@pytest.mark.parametrize(
    ("panel", "message"),
    [
        (torch.ones(2, 26), r"shape \(2, 26\); give \(b, 27\)"),
        (torch.ones(27), "use matvec"),
        (torch.ones(2, 27, dtype=torch.float64), r"dtype torch\.float64; give torch\.float32"),
        (torch.ones(2, 27, device="meta"), "on meta; give it on cpu"),
        (torch.ones(27, 2).T, "stride 2 within its vectors"),
        (np.ones((2, 27)), "of type ndarray; give a tensor"),
        (torch.full((2, 27), torch.inf), "the panel given holds inf in vector 0"),
    ],
)
def test_bad_panels(panel: object, message: str) -> None:
    operator = HessianOperator(Problem(nn.Linear(8, 3), CROSS_ENTROPY, [to_float(batch) for batch in vectors(4)]))
    with pytest.raises(OperatorError, match=message):
        operator.matmat(panel)
    good = torch.ones(2, 27)
    with pytest.raises(OperatorError, match="share memory"):
        operator.matmat(good, out=good)
    with pytest.raises(OperatorError, match=r"out has shape \(1, 27\)"):
        operator.matmat(good, out=torch.ones(1, 27))
    with pytest.raises(OperatorError, match="matvec got a vector of shape"):
        operator.matvec(good)


def symmetric(n: int = 20) -> Tensor:
    matrix = torch.randn(n, n, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return matrix + matrix.T


class OfTorch:
    """What operators of curvlinops have: columns (n, b) in, columns out, tensors of their own precision."""

    def __init__(self, matrix: Tensor) -> None:
        self.matrix, self.shape, self.dtype, self.device = matrix, matrix.shape, matrix.dtype, matrix.device

    def __matmul__(self, columns: Tensor) -> Tensor:
        assert columns.shape[0] == len(self.matrix)
        return self.matrix @ columns


@pytest.mark.parametrize(
    "convert",
    [
        lambda m: m,
        lambda m: m.numpy(),
        lambda m: scipy.sparse.csr_matrix(m.numpy()),
        lambda m: aslinearoperator(m.numpy()),
        lambda m: OfTorch(m),
    ],
    ids=["torch", "numpy", "sparse", "linear-operator", "operator-of-torch"],
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_matrix_operator(convert: object, dtype: torch.dtype) -> None:
    matrix = symmetric().to(dtype)
    operator = as_operator(convert(matrix))
    panel = torch.randn(3, 20, dtype=dtype)
    assert isinstance(operator, CurvatureOperator)
    assert (operator.size, operator.dtype, operator.products) == (20, dtype, 0)
    scale = float(torch.linalg.matrix_norm(matrix) * torch.linalg.matrix_norm(panel))
    wanted = panel.double() @ matrix.double()
    assert float((operator.matmat(panel) - wanted).abs().max()) <= 20 * torch.finfo(dtype).eps * scale
    assert operator.products == 3


def test_finite_products_whose_sum_is_not_are_finite() -> None:
    operator = MatrixOperator(torch.diag(torch.full((4,), 2e38)))
    assert torch.equal(operator.matvec(torch.ones(4)), torch.full((4,), 2e38))


@pytest.mark.parametrize(
    ("matrix", "message"),
    [
        (torch.ones(2, 3), r"shape \(2, 3\); give a square"),
        ([[1.0]], "type list"),
        (symmetric().triu(), r"not symmetric.*\(A \+ A.T\) / 2"),
        (symmetric().triu().numpy(), "not symmetric"),
        (scipy.sparse.csr_matrix(symmetric().triu().numpy()), "not symmetric"),
        (aslinearoperator(symmetric().triu().numpy()), "u.Av and v.Au differ"),
        (OfTorch(symmetric().triu()), "the OfTorch is not symmetric: u.Av and v.Au differ"),
        (torch.full((2, 2), torch.nan), "NaN or Inf"),
        (torch.ones(2, 2, dtype=torch.complex64), "complex"),
    ],
)
def test_bad_matrices(matrix: object, message: str) -> None:
    with pytest.raises(OperatorError, match=message):
        MatrixOperator(matrix)


def test_as_operator_takes_operators_and_nothing_else() -> None:
    operator = MatrixOperator(np.eye(3, dtype=int))
    assert as_operator(operator) is operator
    assert isinstance(operator.to_scipy(), LinearOperator)
    for wrong in ("hessian", [[1.0]], nn.Linear(2, 2)):
        with pytest.raises(OperatorError, match="is not an operator; give"):
            as_operator(wrong)
    with pytest.raises(OperatorError, match="give a Problem"):
        HessianOperator(nn.Linear(2, 2))


def test_dense_helper_on_a_known_hessian() -> None:
    # L = sum of (w x)^2 over one sample: H = 2 x x^T.
    model, x = nn.Linear(4, 1, bias=False).double(), torch.arange(4.0, dtype=torch.float64)
    hessian = dense_hessian(model, lambda model: model(x).square().sum(), dict(model.named_parameters()))
    torch.testing.assert_close(hessian, 2 * torch.outer(x, x), rtol=0, atol=0)
    assert classification(mlp(nn.Tanh).double(), vectors(3, 2)).ndim == 0


class Precise(LinearOperator):
    """A symmetric matrix that says float64 and multiplies in float32, or in float64."""

    def __init__(self, matrix: np.ndarray, narrow: bool) -> None:
        super().__init__(np.float64, matrix.shape)
        self.matrix, self.narrow = matrix.astype(np.float32 if narrow else np.float64), narrow

    def _matmat(self, columns: np.ndarray) -> np.ndarray:
        return (self.matrix @ columns.astype(self.matrix.dtype)).astype(np.float64)

    _matvec = _matmat


@pytest.mark.parametrize("narrow", [True, False])
@pytest.mark.parametrize("kind", ["dense", "diagonal"])
def test_a_linear_operator_is_as_precise_as_its_products(kind: str, narrow: bool) -> None:
    generator = np.random.default_rng(0)
    matrix = generator.normal(size=(40, 40)) if kind == "dense" else np.diag(generator.normal(size=40))
    matrix = (matrix + matrix.T) / 2
    operator = as_operator(Precise(matrix, narrow))
    assert operator.epsilon == 2.0 ** (-23 if narrow else -52)
    measure = hesd.SpectralMeasure.from_tridiagonal(hesd.block_lanczos(operator, 40, 4))
    truth = np.linalg.eigvalsh(matrix)
    for found, wanted in ((measure.lambda_max, truth[-1]), (measure.lambda_min, truth[0])):
        assert found.low <= wanted <= found.high
        assert found.high - found.low <= 4 * measure.rounding * np.abs(truth).max()
    assert measure.rounding <= 64 * operator.epsilon


def test_our_own_operator_in_scipys_clothes_is_itself() -> None:
    problem = Problem(nn.Linear(8, 3), CROSS_ENTROPY, [to_float(batch) for batch in vectors(8)])
    operator = HessianOperator(problem)
    assert as_operator(operator.to_scipy()) is operator
    found = hesd.block_lanczos(operator.to_scipy(), 10, 2)
    assert found.epsilon == 2.0**-23


def test_an_asymmetric_operator_is_refused_in_every_precision() -> None:
    for size, narrow in ((12, True), (12, False), (1500, True), (1500, False)):
        matrix = np.random.default_rng(0).normal(size=(size, size))
        with pytest.raises(OperatorError, match=r"is not symmetric: .* is rounding; give a symmetric one"):
            as_operator(Precise(matrix, narrow))
        skewed = matrix + matrix.T + 0.05 * np.triu(matrix)
        with pytest.raises(OperatorError, match="is not symmetric"):
            as_operator(Precise(skewed, narrow))
        as_operator(Precise(matrix + matrix.T, narrow))


@pytest.mark.parametrize("scale", [1e-145, 1e-160, 1e-165, 1e-200, 1e-300])
@pytest.mark.parametrize("block_size", [1, 2])
def test_matrices_too_small_to_be_squared_are_an_error_with_a_remedy(scale: float, block_size: int) -> None:
    matrix = scale * torch.diag(torch.arange(1.0, 11.0, dtype=torch.float64))
    with pytest.raises(
        OperatorError,
        match="below 1e-140, which squared are lost to underflow; multiply the loss, or the matrix, by a power of two",
    ):
        hesd.block_lanczos(matrix, 10, block_size)


@pytest.mark.parametrize("scale", [1e-139, 1e-100, 1e100, 1e150])
def test_matrices_far_from_one_have_their_spectrum(scale: float) -> None:
    matrix = scale * torch.diag(torch.arange(-3.0, 8.0, dtype=torch.float64))
    measure = hesd.SpectralMeasure.from_tridiagonal(hesd.block_lanczos(matrix, 11, 2))
    assert measure.lambda_max.value == pytest.approx(7 * scale, rel=1e-12)
    assert measure.lambda_min.value == pytest.approx(-3 * scale, rel=1e-12)
    found = hesd.criteria(measure)
    assert found.r_e.value == pytest.approx(3 / 7, rel=1e-12)


def rooted(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return model(batch[0]).square().mean() + model.weight[0].norm()


def sinc(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return (torch.sinc(model.weight[0] * batch[0]) * model(batch[0])[:, :1]).mean()


@pytest.mark.parametrize(("loss", "name"), [(rooted, "linalg_vector_norm"), (sinc, "sinc")])
@pytest.mark.parametrize("hvp", ["auto", "double_backward", "kept_graph"])
def test_a_product_that_is_not_a_number_names_operation_line_and_remedy(loss: object, name: str, hvp: str) -> None:
    model = nn.Linear(8, 3).double()
    with torch.no_grad():
        model.weight[0] = 0.0
    operator = HessianOperator(Problem(model, loss, vectors(4)), hvp=hvp)
    message = (
        rf"'weight'.*second derivative of {name} is not a number there, in `.*` \(test_hessian\.py, line \d+\)"
        r".*if numbers overflow.*hvp='finite_differences'"
    )
    with pytest.raises(OperatorError, match=message):
        operator.matvec(torch.ones(operator.size, dtype=torch.float64))
    with pytest.raises(hesd.OperatorError, match=f"second derivative of {name}"):
        hesd.analyze_groups(operator.problem, groups="parameters", progress=False)


def test_a_vector_that_is_not_finite_is_told_from_a_product_that_is_not() -> None:
    operator = HessianOperator(Problem(nn.Linear(8, 3).double(), CROSS_ENTROPY, vectors(4)))
    with pytest.raises(OperatorError, match=r"the panel given holds nan in vector 0 .*give vectors of finite numbers"):
        operator.matvec(torch.full((operator.size,), torch.nan, dtype=torch.float64))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda value: pickle.loads(pickle.dumps(value))])
@pytest.mark.parametrize("hvp", ["auto", *STRATEGIES])
def test_a_copy_of_an_operator_multiplies_as_it_does(hvp: str, copied) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    operator = HessianOperator(Problem(model, squared_output, vectors(5)), hvp=hvp)
    panel = torch.randn(2, operator.size, dtype=torch.float64)
    wanted = operator.matmat(panel)
    difference = torch.linalg.vector_norm(copied(operator).matmat(panel) - wanted)
    assert difference <= 64 * torch.finfo(torch.float64).eps * torch.linalg.vector_norm(wanted)


def squared_output(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    return model(batch[0]).square().mean()
