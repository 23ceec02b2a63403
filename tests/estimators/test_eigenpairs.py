"""Eigenpairs against known spectra, dense eigensolvers, SciPy and the Hessian of a network."""

from __future__ import annotations

import json
import re
import warnings

import numpy as np
import pytest
import scipy.sparse
import torch
from dense import dense_hessian
from matrices import DTYPES, matrix_with
from safetensors import safe_open
from safetensors.torch import save_file
from scipy.sparse.linalg import eigsh as scipy_eigsh

import hesd_fast as hesd
from hesd_fast.engine import kernels
from hesd_fast.estimators.eigenpairs_search import MOST_PROBES
from hesd_fast.estimators.thick_restart import combine_in_place

WHICH = ["LA", "SA", "LM", "BE"]
ROUNDING = 64.0
"""Errors that are rounding, in machine epsilons of the largest eigenvalue: a product sums n terms."""


def laplacian(n):
    return scipy.sparse.diags_array([-np.ones(n - 1), 2 * np.ones(n), -np.ones(n - 1)], offsets=[-1, 0, 1]).tocsr()


def laplacian_of_square(n):
    """Double eigenvalues, but for those of the diagonal."""
    one, unit = laplacian(n), scipy.sparse.eye_array(n)
    return (scipy.sparse.kron(one, unit) + scipy.sparse.kron(unit, one)).tocsr()


_RANDOM = np.random.default_rng(0)
SPECTRA = {
    "outliers": np.concatenate([_RANDOM.normal(0.0, 0.05, 115), [-0.7, 1.0, 2.0, 4.0, 9.0]]),
    "indefinite": _RANDOM.normal(0.0, 1.0, 120),
    "geometric": 0.95 ** np.arange(80.0),
    "harmonic": 1.0 / np.arange(1.0, 81.0),
    "clustered": np.concatenate([_RANDOM.uniform(0.0, 1.0, 110), 2.0 + 1e-4 * np.arange(10)]),
    "pairs": np.concatenate([np.arange(1.0, 61.0), -np.arange(1.0, 61.0)]),
    "three values": np.repeat([-1.0, 0.0, 2.0, 3.0], 30),
    "two values": np.repeat([1.0, 50.0], [90, 30]),
    "low rank": np.concatenate([np.zeros(117), [-1.0, 0.5, 2.0]]),
    "rank one": np.concatenate([np.zeros(119), [3.0]]),
    "zero": np.zeros(120),
    "negative definite": -_RANDOM.uniform(0.5, 3.0, 120),
}


def wanted(eigenvalues, k, which):
    """The eigenvalues that are asked for, in the order of a result."""
    up = np.sort(eigenvalues)
    if which == "BE":
        return np.concatenate([up[::-1][: (k + 1) // 2], up[: k // 2][::-1]])
    order = {"LA": -up, "SA": up, "LM": -np.abs(up)}[which]
    return up[np.argsort(order, kind="stable")][:k]


def rounding(dtype, eigenvalues):
    return ROUNDING * torch.finfo(dtype).eps * max(float(np.abs(eigenvalues).max()), 1e-300)


def check(result, matrix, eigenvalues, k, which):
    """Values, vectors, residuals, intervals and limits against the truth."""
    dtype, n = result.panel.dtype, len(eigenvalues)
    allowed = rounding(dtype, eigenvalues)
    truth = wanted(eigenvalues, k, which)
    compared = np.abs if which == "LM" else np.asarray  # which of +x and -x comes first is not determined
    assert np.abs(compared(result.values) - compared(truth)).max() <= allowed + result.tolerance
    assert result.converged.all()
    assert result.complete
    vectors = result.panel.double()
    assert float((vectors @ vectors.T - torch.eye(k)).abs().max()) <= ROUNDING * torch.finfo(dtype).eps * 4
    left = vectors @ matrix.double() - torch.from_numpy(result.values)[:, None] * vectors
    assert np.abs(left.norm(dim=1).numpy() - result.residuals).max() <= allowed
    assert (result.residuals <= result.tolerance + allowed).all()
    for bound in result.bounds:
        nearest = eigenvalues[np.abs(eigenvalues - bound.value).argmin()]
        assert bound.low - n * 1e-16 <= nearest <= bound.high + n * 1e-16
    low, high = result.limits
    slack = rounding(torch.float32 if dtype == torch.float32 else torch.float64, eigenvalues)
    assert (eigenvalues > high + slack).sum() <= (result.values > high - slack).sum()
    assert (eigenvalues < low - slack).sum() <= (result.values < low + slack).sum()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("which", WHICH)
@pytest.mark.parametrize("name", SPECTRA)
def test_known_spectra(name, which, dtype):
    matrix = matrix_with(SPECTRA[name], dtype)
    eigenvalues = np.linalg.eigvalsh(matrix.double().numpy())
    check(hesd.eigsh(matrix, 7, which, basis_size=40), matrix, eigenvalues, 7, which)


@pytest.mark.parametrize("which", WHICH)
@pytest.mark.parametrize("n", [1, 2, 3, 9])
def test_every_eigenvalue_of_a_small_matrix(n, which):
    matrix = matrix_with(np.linspace(-1.0, 2.0, n))
    for k in {1, n}:
        check(hesd.eigsh(matrix, k, which), matrix, np.linalg.eigvalsh(matrix.numpy()), k, which)


@pytest.mark.parametrize("block_size", [1, 2, 4])
def test_double_eigenvalues_of_a_square(block_size):
    matrix = laplacian_of_square(15)
    result = hesd.eigsh(matrix, 8, "LA", block_size=block_size, basis_size=50)
    dense = torch.from_numpy(matrix.toarray())
    check(result, dense, np.linalg.eigvalsh(dense.numpy()), 8, "LA")


def test_the_end_of_a_laplacian_where_eigenvalues_crowd():
    n = 300
    result = hesd.eigsh(laplacian(n), 5, "SA")
    truth = 2.0 - 2.0 * np.cos(np.arange(1, 6) * np.pi / (n + 1))
    assert np.abs(result.values - truth).max() <= rounding(torch.float64, np.array([4.0]))
    assert result.complete


@pytest.mark.parametrize("which", WHICH)
def test_as_scipy_finds_them(which):
    matrix = matrix_with(SPECTRA["indefinite"])
    result = hesd.eigsh(matrix, 6, which)
    values = scipy_eigsh(matrix.numpy(), 6, which=which, return_eigenvectors=False, v0=np.ones(120))
    assert np.abs(np.sort(result.values) - np.sort(values)).max() <= rounding(torch.float64, values)


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_seed_misses_or_repeats_an_eigenvalue(dtype):
    """128 seeds, a geometric spectrum and a basis of k + 10: a restart that goes wrong is wrong for some seeds only."""
    eigenvalues = 0.8 ** np.arange(40.0)
    operator = scipy.sparse.diags_array(torch.from_numpy(eigenvalues).to(dtype).numpy())
    truth = wanted(eigenvalues, 5, "LA")
    for seed in range(128):
        result = hesd.eigsh(operator, 5, basis_size=15, seed=seed)
        assert np.abs(result.values - truth).max() <= rounding(dtype, eigenvalues), seed
        assert result.complete, seed


def test_copies_that_one_start_vector_cannot_see_are_found():
    eigenvalues = np.concatenate([np.linspace(0.0, 1.0, 80), np.repeat([2.0, 3.0], 10)])
    matrix = matrix_with(eigenvalues)
    unchecked = hesd.eigsh(matrix, 6, check_missed=False)
    assert (np.abs(unchecked.values - 3.0) > 0.1).any()  # one of each is all that it sees
    assert not unchecked.complete
    assert unchecked.limits == (-np.inf, np.inf)
    found = hesd.eigsh(matrix, 14)
    assert np.abs(found.values - np.repeat([3.0, 2.0], [10, 4])).max() <= rounding(torch.float64, eigenvalues)


def test_an_eigenvalue_hides_no_more_often_than_stated():
    """The limit is a statement about random vectors: with one probe, 2.5 % of the runs at most may break it."""
    eigenvalues = np.concatenate([np.linspace(0.0, 1.0, 99), [1.2]])
    operator = scipy.sparse.diags_array(eigenvalues)
    wrong = 0
    for seed in range(100):
        result = hesd.eigsh(operator, 1, tol=1e-3, seed=seed, basis_size=12)
        wrong += int((eigenvalues > result.limits[1]).sum() > 1 or abs(result.values[0] - 1.2) > 1e-3)
    assert wrong <= 7  # the 99 % point of a binomial of 100 and 2.5 %


def test_intervals_hold_an_eigenvalue_where_the_tolerance_is_loose():
    eigenvalues = SPECTRA["indefinite"]
    matrix = matrix_with(eigenvalues)
    quadratic = 0
    for seed in range(20):
        result = hesd.eigsh(matrix, 5, tol=3e-3, seed=seed)
        for bound, residual in zip(result.bounds, result.residuals, strict=True):
            assert np.abs(eigenvalues - bound.value).min() <= bound.high - bound.value
            quadratic += bound.high - bound.value < 0.5 * residual
    assert quadratic >= 30  # of 100: many are known by the square of their residual norm


def test_the_same_seed_gives_the_same_bits():
    matrix = matrix_with(SPECTRA["outliers"], torch.float32)
    one, same, other = (hesd.eigsh(matrix, 4, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(one.panel, same.panel)
    assert one.values.tolist() == same.values.tolist()
    assert not torch.equal(one.panel, other.panel)


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer1 = torch.nn.Linear(4, 6)
        self.layer2 = torch.nn.Linear(6, 3)

    def forward(self, x):
        return self.layer2(torch.tanh(self.layer1(x)))


def network():
    torch.manual_seed(0)
    model = Model().double()
    batch = torch.randn(30, 4, dtype=torch.float64), torch.randint(3, (30,))
    criterion = torch.nn.CrossEntropyLoss()
    matrix = dense_hessian(model, lambda m: criterion(m(batch[0]), batch[1]), dict(model.named_parameters()))
    return hesd.Problem(model, hesd.losses.supervised(criterion), batch), matrix


@pytest.mark.parametrize("which", WHICH)
def test_the_hessian_of_a_network(which):
    problem, matrix = network()
    before = {name: tensor.clone() for name, tensor in problem.model.state_dict().items()}
    result = hesd.eigsh(problem, 5, which)
    eigenvalues, eigenvectors = torch.linalg.eigh(matrix)
    check(result, matrix, eigenvalues.numpy(), 5, which)
    assert all(torch.equal(tensor, before[name]) for name, tensor in problem.model.state_dict().items())
    assert all(parameter.grad is None for parameter in problem.model.parameters())
    for value, vector in zip(result.values, result.vectors, strict=True):
        column = int((eigenvalues - value).abs().argmin())
        expected = dict(zip(before, problem.unflatten(eigenvectors[:, column]), strict=True))
        gap = float((eigenvalues - value).abs().sort().values[1])
        sign = torch.sign((vector["layer2.bias"] * expected["layer2.bias"]).sum())
        for name, part in vector.items():
            assert part.shape == problem.parameters[name].shape
            assert float((sign * part - expected[name]).abs().max()) <= 2 * result.tolerance / gap


def test_saved_and_read(tmp_path):
    path = tmp_path / "top.safetensors"
    for result in (hesd.eigsh(network()[0], 3), hesd.eigsh(matrix_with([1.0, 2.0, 5.0], torch.float32), 2, "BE")):
        result.save(path)
        again = hesd.load_eigenpairs(path)
        assert [entry.name for entry in tmp_path.iterdir()] == [path.name]
        assert torch.equal(again.panel, result.panel)
        assert str(again) == str(result)
        for name in ("which", "bounds", "tolerance", "limits", "complete", "products"):
            assert getattr(again, name) == getattr(result, name)
        for name in ("values", "residuals", "converged"):
            assert (getattr(again, name) == getattr(result, name)).all()
        for one, other in zip(again.vectors, result.vectors, strict=True):
            if isinstance(other, dict):
                assert list(one) == list(other)
                assert all(torch.equal(one[name], other[name]) for name in other)
    with safe_open(path, framework="pt") as file:
        assert file.get_tensor("vectors").shape == (2, 3)


def test_a_complex_parameter(tmp_path):
    model = torch.nn.Module()
    model.weight = torch.nn.Parameter(torch.tensor([1.0 + 2.0j, 0.5j]))
    problem = hesd.Problem(
        model, lambda m, batch: (torch.view_as_real(m.weight) ** 2 * batch).sum(), torch.arange(1.0, 3)
    )
    result = hesd.eigsh(problem, 2)
    assert result.vectors[0]["weight"].dtype == torch.complex64
    result.save(tmp_path / "complex")
    again = hesd.load_eigenpairs(tmp_path / "complex")
    assert torch.equal(again.vectors[1]["weight"], result.vectors[1]["weight"])


def test_files_that_hold_something_else(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"nothing")
    with pytest.raises(hesd.CheckpointError, match="cannot be read as eigenpairs"):
        hesd.load_eigenpairs(path)
    save_file({"vectors": torch.ones(1, 2)}, path)
    with pytest.raises(hesd.CheckpointError, match="wanted 'hesd-fast eigenpairs'"):
        hesd.load_eigenpairs(path)
    hesd.eigsh(torch.eye(3), 2).save(path)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    save_file({"vectors": torch.ones(1, 3)}, path, metadata)
    with pytest.raises(hesd.CheckpointError, match="not those of 2 vectors"):
        hesd.load_eigenpairs(path)
    numbers = json.loads(metadata["result"])
    save_file({"vectors": torch.ones(2, 3)}, path, metadata | {"result": json.dumps(numbers | {"bounds": []})})
    with pytest.raises(hesd.CheckpointError, match="holds no eigenpairs"):
        hesd.load_eigenpairs(path)
    with pytest.raises(hesd.CheckpointError, match="cannot be written"):
        hesd.eigsh(torch.eye(3), 2).save(tmp_path / "none" / "file")


def test_what_has_not_converged_is_said_and_returned():
    matrix = matrix_with(SPECTRA["indefinite"])
    with pytest.warns(hesd.HESDWarning, match=r"5 of 5 eigenpairs have not converged.*max_products"):
        result = hesd.eigsh(matrix, 5, max_products=12)
    assert result.products == 12 + 5
    assert not result.converged.any()
    assert not result.complete
    left = result.panel @ matrix - torch.from_numpy(result.values)[:, None] * result.panel
    assert np.abs(left.norm(dim=1).numpy() - result.residuals).max() <= rounding(torch.float64, result.values)


@pytest.mark.parametrize(("name", "which"), [("indefinite", "LA"), ("three values", "BE"), ("harmonic", "SA")])
def test_wherever_products_are_spent_there_is_a_result(name, which):
    matrix = matrix_with(SPECTRA[name])
    for most in range(4, 130, 9):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", hesd.HESDWarning)
            result = hesd.eigsh(matrix, 4, which, basis_size=14, max_products=most)
        assert result.products <= most + MOST_PROBES + 4
        left = result.panel @ matrix - torch.from_numpy(result.values)[:, None] * result.panel
        assert np.abs(left.norm(dim=1).numpy() - result.residuals).max() <= rounding(torch.float64, SPECTRA[name])
        if result.complete:
            assert np.abs(result.values - wanted(SPECTRA[name], 4, which)).max() <= 1e-9


def test_all_of_a_small_matrix_takes_a_product_for_each_dimension():
    result = hesd.eigsh(matrix_with(np.arange(20.0)), 3)
    assert result.products <= 20 + 3
    assert result.complete


def test_a_tolerance_below_rounding_is_said():
    matrix = matrix_with(SPECTRA["indefinite"], torch.float32)
    with pytest.warns(hesd.HESDWarning, match="rounding and noise of the products allow no more"):
        result = hesd.eigsh(matrix, 3, tol=1e-12)
    assert (result.residuals <= rounding(torch.float32, result.values)).all()


def test_the_default_tolerance_is_reached_without_a_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for dtype in DTYPES:
            hesd.eigsh(matrix_with(SPECTRA["outliers"], dtype), 4)


@pytest.mark.parametrize("dtype", DTYPES)
def test_never_more_memory_than_the_limit(dtype, monkeypatch):
    n, k = 5000, 4
    taken = []
    allocate = kernels.empty_panel

    def counted(*arguments, **options):
        panel = allocate(*arguments, **options)
        taken.append(panel.untyped_storage().nbytes())
        return panel

    monkeypatch.setattr(kernels, "empty_panel", counted)
    diagonal = scipy.sparse.diags_array(np.linspace(0.0, 1.0, n).astype(torch.empty(0, dtype=dtype).numpy().dtype))
    row = n * dtype.itemsize
    limit = 40 * (row + 4608)
    result = hesd.eigsh(diagonal, k, tol=1e-3, memory_limit=limit)
    basis, *tiles, vectors = taken
    assert basis + max(tiles) + vectors <= limit
    assert basis >= 0.5 * limit
    assert result.converged.all()


@pytest.mark.parametrize(("rows", "option"), [(16, "k"), (40, "basis_size")])
def test_what_does_not_fit_is_refused_with_what_would(rows, option):
    diagonal = scipy.sparse.diags_array(0.5 ** np.arange(1000.0))
    limit = rows * (8 * 1000 + 4608)
    asked = {"k": 6, "basis_size": None if option == "k" else 100}
    with pytest.raises(hesd.PlanError, match=rf"{option}=\d+ would fit") as refusal:
        hesd.eigsh(diagonal, **asked, memory_limit=limit)
    fits = int(re.search(rf"{option}=(\d+)", str(refusal.value))[1])
    assert hesd.eigsh(diagonal, **{**asked, option: fits}, memory_limit=limit).converged.all()
    with pytest.raises(hesd.PlanError):
        hesd.eigsh(diagonal, **{**asked, option: fits + 1}, memory_limit=limit)
    with pytest.raises(hesd.PlanError, match="no eigenpair fits"):
        hesd.eigsh(diagonal, 6, memory_limit=8 * 1000)


def test_vectors_are_combined_in_place():
    panel = kernels.empty_panel(5, 3 * 2**20 // 8 + 5, torch.float64)
    panel.copy_(torch.randn(panel.shape, dtype=torch.float64))
    before, transform = panel.clone(), np.random.default_rng(0).normal(size=(3, 5))
    combine_in_place(transform, panel)
    expected = torch.from_numpy(transform) @ before
    assert float((panel[:3] - expected).abs().max()) <= 16 * torch.finfo(torch.float64).eps * float(
        expected.abs().max()
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 0}, "k is 0; wanted 1 to 6"),
        ({"k": 7}, "k is 7; wanted 1 to 6"),
        ({"k": 2.0}, "k is 2.0; wanted an integer"),
        ({"which": "SM"}, "which is 'SM'; wanted one of 'LA', 'SA', 'LM', 'BE'"),
        ({"which": None}, "which is None"),
        ({"tol": 0.0}, "tol is 0.0; wanted a number between 0 and 1"),
        ({"tol": float("nan")}, "tol is nan"),
        ({"block_size": 7}, "block_size is 7; wanted 1 to 6"),
        ({"basis_size": 3}, "basis_size is 3; wanted at least 6"),
        ({"max_products": 1}, "max_products is 1; wanted at least 2"),
        ({"seed": -1}, "seed is -1"),
        ({"memory_limit": 0}, "memory_limit is 0"),
    ],
)
def test_arguments_that_cannot_be_used(options, message):
    with pytest.raises(hesd.ProblemError, match=message):
        hesd.eigsh(torch.eye(6), **{"k": 2, **options})


class Given:
    """An operator of the user's own, without a check."""

    dtype, device, products = torch.float64, torch.device("cpu"), 0

    def __init__(self, matrix):
        self.matrix, self.size = matrix, len(matrix)

    def matmat(self, panel, out=None):
        return panel @ self.matrix  # a panel of its own


def test_an_operator_of_the_users_own_and_products_that_are_none():
    matrix = matrix_with(SPECTRA["outliers"])
    assert abs(hesd.eigsh(Given(matrix), 1).values[0] - 9.0) <= rounding(torch.float64, np.array([9.0]))
    with pytest.raises(hesd.OperatorError, match="not those of one symmetric matrix"):
        hesd.eigsh(Given(torch.randn(50, 50, dtype=torch.float64)), 2)
    with pytest.raises(hesd.OperatorError, match="the product of vector 0 is nan at column"):
        hesd.eigsh(Given(torch.full((9, 9), float("nan"), dtype=torch.float64)), 2)
    for factor in (1e-200, 1e200):
        with pytest.raises(hesd.OperatorError, match="too large or too small to be squared"):
            hesd.eigsh(Given(factor * matrix), 2)


def test_scaling_the_matrix_scales_the_result():
    matrix = matrix_with(SPECTRA["outliers"])
    one, scaled = hesd.eigsh(matrix, 4), hesd.eigsh(matrix * 2.0**-60, 4)
    assert (scaled.values == one.values * 2.0**-60).all()
    assert torch.equal(scaled.panel, one.panel)
    assert scaled.products == one.products
