"""Trace and Frobenius norm against dense matrices; intervals against how often they hold."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import torch
from dense import dense_hessian
from matrices import DTYPES, matrix_with
from spectra import SPECTRA, dense

import hesd_fast as hesd
from hesd_fast.estimators import sampled_estimate

SIZE = 200
FUNCTIONS = (hesd.trace, hesd.frobenius_norm)


def truth_of(function, eigenvalues) -> float:
    values = np.asarray(eigenvalues, dtype=np.float64)
    return float(values.sum() if function is hesd.trace else np.sqrt((values**2).sum()))


class Diagonal:
    """A diagonal matrix of the user's own; with Gaussian probes it stands for every matrix with its eigenvalues."""

    device = torch.device("cpu")

    def __init__(self, eigenvalues, dtype=torch.float64):
        self.values = torch.as_tensor(eigenvalues, dtype=dtype)
        self.size, self.dtype, self.products = len(self.values), dtype, 0

    def matmat(self, panel, out=None):
        self.products += len(panel)
        return panel * self.values  # a panel of its own


@pytest.fixture(autouse=True)
def _wide_intervals_are_told_of():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", hesd.HESDWarning)
        yield


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SPECTRA)
def test_with_a_product_for_each_unit_vector_only_rounding_is_left(function, name, dtype):
    matrix = torch.from_numpy(dense(name)).to(dtype)
    found, truth = function(matrix, max_products=len(matrix)), truth_of(function, SPECTRA[name])
    scale = float(np.abs(SPECTRA[name]).sum())
    # The matrix itself is rounded to its dtype, up to an epsilon of its largest eigenvalue for each diagonal element.
    assert abs(found.value - truth) <= 4 * torch.finfo(dtype).eps * scale
    assert found.low <= truth <= found.high
    assert found.high - found.low <= 64 * torch.finfo(dtype).eps * len(matrix) * np.abs(SPECTRA[name]).max()
    assert (found.products, found.samples, found.standard_error) == (len(matrix), 0, 0.0)


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize(
    "eigenvalues",
    [
        1.0 / np.arange(1.0, SIZE + 1.0),
        (-0.9) ** np.arange(SIZE),
        np.linspace(1.0, 3.0, SIZE),
        np.where(np.arange(SIZE) < 20, 1.0, 1e-3),
        np.r_[np.random.default_rng(0).normal(0.0, 1e-2, SIZE - 6), [-0.7, -0.2, 1.0, 2.0, 5.0, 10.0]],
        -np.linspace(0.5, 2.0, SIZE),
    ],
    ids=["1/i", "signs in turn", "flat", "step", "network", "negative definite"],
)
def test_intervals_hold_the_truth_as_often_as_they_say(function, eigenvalues):
    truth, operator = truth_of(function, eigenvalues), Diagonal(eigenvalues)
    found = [function(operator, 0.05, max_products=100, seed=seed) for seed in range(40)]
    missed = sum(not one.low <= truth <= one.high for one in found)
    assert missed <= 7  # two of 40 are expected, eight or more are one in 1,000 such tests
    assert operator.products == sum(one.products for one in found)
    errors = [abs(one.value - truth) for one in found]
    widths = [one.high - one.low for one in found]
    assert (
        np.mean(errors) <= np.mean(widths) <= 20 * np.mean(errors) + 1e-9 * truth_of(hesd.frobenius_norm, eigenvalues)
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_has_low_rank_is_known_but_for_rounding(dtype):
    matrix = matrix_with([3.0, 2.0, -1.0] + [0.0] * (SIZE - 3), dtype)
    found = hesd.trace(matrix, 1e-3, max_products=40)
    assert abs(found.value - 4.0) <= 64 * torch.finfo(dtype).eps * 6.0
    assert found.low <= 4.0 <= found.high
    assert found.products <= 40


def test_a_flat_spectrum_is_not_deflated_and_a_few_large_eigenvalues_are():
    assert hesd.trace(Diagonal(np.linspace(1.0, 3.0, 2000)), None, max_products=60).deflated == 0
    # Four random vectors, and of their products the three that are new.
    assert hesd.trace(Diagonal(np.r_[np.ones(3), np.full(1997, 1e-4)]), None, max_products=60).deflated == 7


def test_twenty_equal_eigenvalues_are_all_taken_out():
    """A Krylov space of four vectors has four of them."""
    eigenvalues = np.where(np.arange(1000) < 20, 1.0, 1e-3)
    for seed in range(5):
        found = hesd.trace(Diagonal(eigenvalues), None, max_products=80, seed=seed)
        # What is left of 0.98 is a multiple of the identity, which probes of one length know.
        assert abs(found.value - eigenvalues.sum()) <= 64 * np.finfo(float).eps * eigenvalues.sum()


def test_errors_are_below_those_of_a_report_and_of_plain_probes():
    eigenvalues = 1.0 / np.arange(1.0, 1001.0)
    ours, plain, report = [], [], []
    for seed in range(40):
        ours.append(hesd.trace(Diagonal(eigenvalues), None, max_products=60, seed=seed).value)
        plain.append(((np.random.default_rng(seed).standard_normal((60, 1000)) ** 2) @ eigenvalues).mean())
        run = hesd.block_lanczos(Diagonal(eigenvalues), 15, 4, seed=seed, probe_kind="gaussian")
        report.append(1000 * hesd.SpectralMeasure.from_tridiagonal(run).moment(1))
    error, other, third = (np.abs(np.array(x) - eigenvalues.sum()).mean() for x in (ours, plain, report))
    assert 2.0 * error < other < third


@pytest.mark.parametrize("function", FUNCTIONS)
def test_the_same_seed_gives_the_same_bits_and_another_one_others(function):
    operator = Diagonal(1.0 / np.arange(1.0, 501.0))
    one, again, other = (function(operator, None, max_products=40, seed=seed) for seed in (3, 3, 4))
    assert one == again
    assert one.value != other.value


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("most", [2, 3, 5, 9, 17, 31])
def test_any_number_of_products_is_kept_to(function, most):
    operator = Diagonal(1.0 / np.arange(1.0, 101.0))
    found = function(operator, None, max_products=most)
    assert operator.products == found.products == most
    assert found.samples + found.deflated == most


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [1, 2, 300])
def test_the_zero_matrix(function, dtype, n):
    found = function(torch.zeros(n, n, dtype=dtype))
    assert (found.value, found.low, found.high) == (0.0, 0.0, 0.0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_identity_has_no_sampling_error(dtype):
    found = hesd.trace(Diagonal(np.ones(1000), dtype))
    assert found.products == 16
    assert abs(found.value - 1000.0) <= 8 * torch.finfo(dtype).eps * 1000.0
    assert found.low <= 1000.0 <= found.high


def test_matrices_of_one_and_two_rows():
    assert hesd.trace(torch.tensor([[-3.0]])).value == -3.0
    assert hesd.frobenius_norm(torch.tensor([[-3.0]])).value == 3.0
    assert hesd.trace(torch.tensor([[1.0, 5.0], [5.0, 2.0]])).value == 3.0


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_a_scaled_matrix_has_a_scaled_trace(scale):
    eigenvalues = 1.0 / np.arange(1.0, 501.0)
    one, other = (hesd.trace(Diagonal(eigenvalues * c), None, max_products=40) for c in (1.0, scale))
    assert other.deflated == one.deflated
    assert other.value == pytest.approx(one.value * scale, rel=1024 * np.finfo(float).eps)
    assert other.standard_error == pytest.approx(one.standard_error * scale, rel=1e6 * np.finfo(float).eps)


def test_eigenvectors_on_two_equal_coordinates_are_seen():
    """Rademacher probes are blind to (e1 - e2) or (e1 + e2): half of them would say 0 of one of these pairs."""
    matrix = torch.zeros(300, 300, dtype=torch.float64)
    matrix[0, 1] = matrix[1, 0] = 1.0
    found = hesd.frobenius_norm(matrix, 0.01, max_products=60)
    assert found.low <= math.sqrt(2.0) <= found.high
    assert abs(found.value - math.sqrt(2.0)) <= 64 * np.finfo(float).eps


def test_a_tolerance_ends_the_run_or_a_warning_says_what_it_takes():
    operator = Diagonal(np.random.default_rng(0).normal(0.0, 1.0, 1000) + 0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("error", hesd.HESDWarning)
        found = hesd.trace(operator, 0.2, max_products=200)
    assert found.products < 200
    assert (found.high - found.low) / 2 <= 0.2 * found.value
    with pytest.warns(hesd.HESDWarning, match=r"the trace is known to .* wanted 0.01; about \d+ products would do"):
        hesd.trace(operator, 0.01, max_products=60)
    with warnings.catch_warnings():
        warnings.simplefilter("error", hesd.HESDWarning)
        hesd.trace(operator, None, max_products=60)


class TestOfAProblem:
    """A network with a parameter that the loss does not use, and the dense Hessian."""

    @pytest.fixture
    def problem(self):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(5, 8), torch.nn.Tanh(), torch.nn.Linear(8, 4)).double()
        model.unused = torch.nn.Parameter(torch.ones(3, dtype=torch.float64))
        data = torch.randn(20, 5, dtype=torch.float64), torch.randint(4, (20,))
        return hesd.Problem(model, hesd.losses.supervised(torch.nn.CrossEntropyLoss()), data)

    @pytest.fixture
    def truth(self, problem):
        inputs, labels = problem.data[0] if isinstance(problem.data, list) else next(iter(problem.batches()))[1]
        return dense_hessian(
            problem.model,
            lambda model: torch.nn.functional.cross_entropy(model(inputs), labels),
            dict(problem.parameters),
        )

    def parts(self, problem):
        ends = [*problem.offsets[1:], problem.size]
        return dict(zip(problem.parameters, map(slice, problem.offsets, ends), strict=True))

    @pytest.mark.parametrize("most", [60, 87])
    def test_every_parameter_has_its_part(self, problem, truth, most):
        found, norm = (f(problem, None, max_products=most) for f in FUNCTIONS)
        assert list(found.by_parameter) == list(norm.by_parameter) == list(problem.parameters)
        assert found.low <= float(truth.trace()) <= found.high
        assert norm.low <= float(truth.norm()) <= norm.high
        scale = float(truth.norm())
        rounding = 1024 * np.finfo(float).eps * scale
        for name, part in self.parts(problem).items():
            one, other = found.by_parameter[name], norm.by_parameter[name]
            # Four standard errors and not two: there are ten of them.
            assert abs(one.value - float(truth[part, part].trace())) <= 4 * one.standard_error + rounding
            assert abs(other.value - float(truth[part].norm())) <= 4 * other.standard_error + rounding
        assert sum(one.value for one in found.by_parameter.values()) == pytest.approx(found.value, abs=rounding)
        assert math.hypot(*(one.value for one in norm.by_parameter.values())) == pytest.approx(norm.value, abs=rounding)
        assert found.by_parameter["unused"].value == 0.0

    def test_the_model_comes_back_as_it_was(self, problem):
        before = {name: value.clone() for name, value in problem.model.state_dict().items()}
        hesd.trace(problem, max_products=20)
        assert all(torch.equal(before[name], value) for name, value in problem.model.state_dict().items())
        assert all(parameter.grad is None for parameter in problem.model.parameters())


def test_an_element_of_a_complex_parameter_is_two_columns():
    model = torch.nn.Module()
    model.weight = torch.nn.Parameter(torch.tensor([1.0 + 2.0j, 3.0 - 1.0j]))

    def loss(model, batch):
        return (batch * torch.view_as_real(model.weight) ** 2).sum(), 1

    problem = hesd.Problem(model, loss, torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    assert hesd.trace(problem).value == 20.0
    assert hesd.trace(problem).by_parameter["weight"].value == 20.0


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("most", [60, 200])
def test_a_product_that_is_not_finite_is_named(function, most):
    class Named(Diagonal):
        def describe(self, column):
            return f"column {column} (parameter 'layer.weight')"

    eigenvalues = np.ones(100)
    eigenvalues[7] = math.nan
    with pytest.raises(hesd.OperatorError, match=r"is nan at column 7 \(parameter 'layer.weight'\)"):
        function(Named(eigenvalues), max_products=most)


def test_products_of_no_symmetric_matrix_are_refused():
    class Skew(Diagonal):
        def matmat(self, panel, out=None):
            return panel.roll(1, dims=1) * self.values - panel.roll(-1, dims=1)

    with pytest.raises(hesd.OperatorError, match="not those of one symmetric matrix"):
        hesd.trace(Skew(np.r_[np.full(3, 100.0), np.ones(297)]), None, max_products=60)


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tolerance": 0.0}, "tolerance is 0.0; wanted a number above 0"),
        ({"tolerance": math.nan}, "tolerance is nan"),
        ({"tolerance": "tight"}, "tolerance is 'tight'"),
        ({"max_products": 1}, "max_products is 1; wanted at least 2"),
        ({"max_products": 2.5}, "max_products is 2.5; wanted an integer"),
        ({"seed": -1}, "seed is -1; wanted at least 0"),
        ({"seed": 2**64}, "wanted an integer in"),
    ],
)
def test_options_that_cannot_be_used(function, options, message):
    with pytest.raises(hesd.ProblemError, match=message):
        function(torch.eye(3), **options)


def test_what_is_no_operator():
    with pytest.raises(hesd.OperatorError, match="str is not an operator"):
        hesd.trace("model")


class TestShortMemory:
    def take(self, monkeypatch, vectors):
        size = int(vectors * 1000 * 8 / sampled_estimate.MEMORY_SHARE)
        monkeypatch.setattr(sampled_estimate, "available_memory", lambda device: size)

    def test_nothing_is_kept_and_the_method_says_so(self, monkeypatch):
        eigenvalues = 1.0 / np.arange(1.0, 1001.0)
        self.take(monkeypatch, 21)
        found = hesd.trace(Diagonal(eigenvalues), None, max_products=100)
        assert found.method.endswith("Girard-Hutchinson, nothing deflated (memory for 0)")
        assert (found.products, found.samples, found.deflated) == (100, 100, 0)
        assert abs(found.value - eigenvalues.sum()) <= 4 * found.standard_error

    def test_as_much_is_kept_as_fits(self, monkeypatch):
        self.take(monkeypatch, 33)
        found = hesd.trace(Diagonal(1.0 / np.arange(1.0, 1001.0)), None, max_products=100)
        assert found.deflated == 13
        assert found.method.endswith("13 directions deflated (memory for 13)")

    def test_what_does_not_fit_is_refused(self, monkeypatch):
        self.take(monkeypatch, 5)
        with pytest.raises(hesd.PlanError, match="GiB"):
            hesd.trace(Diagonal(np.ones(1000)), None, max_products=100)
