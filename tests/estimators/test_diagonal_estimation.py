"""The diagonal and the traces of diagonal blocks against dense matrices."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import torch
from dense import dense_hessian
from matrices import DTYPES, matrix_with
from spectra import SPECTRA, dense, hessian_like

import hesd_fast as hesd
from hesd_fast.estimators import sampled_estimate

SIZE = 200
NETWORK = matrix_with(hessian_like(SIZE))


@pytest.fixture(autouse=True)
def _wide_intervals_are_told_of():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", hesd.HESDWarning)
        yield


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SPECTRA)
def test_with_a_product_for_each_unit_vector_only_rounding_is_left(name, dtype):
    matrix = torch.from_numpy(dense(name)).to(dtype)
    found = hesd.diagonal(matrix)
    assert torch.equal(found.values, matrix.double().diagonal())
    assert not found.standard_errors.any()
    assert found.products == len(matrix)
    assert bool(((found.low <= found.values) & (found.values <= found.high)).all())
    assert (found.block_traces, found.by_parameter) == ({}, {})
    assert found.trace.value == pytest.approx(float(matrix.double().trace()), abs=1e-12 * len(matrix))


@pytest.mark.parametrize("dtype", DTYPES)
def test_intervals_hold_the_elements_as_often_as_they_say(dtype):
    matrix = NETWORK.to(dtype)
    truth, held, inside = matrix.double().diagonal(), [], []
    for seed in range(20):
        found = hesd.diagonal(matrix, None, max_products=60, seed=seed)
        held.append(float(((found.low <= truth) & (truth <= found.high)).double().mean()))
        inside.append(found.trace.low <= float(truth.sum()) <= found.trace.high)
    # Elements of one run are not independent; over 20 runs of 200 their share spreads by about 0.01.
    assert 0.92 <= np.mean(held) <= 0.99
    assert sum(inside) >= 15  # 19 are expected, 14 are one in 4,000 such tests


def test_errors_are_as_large_as_they_say_and_smaller_than_those_of_plain_probes():
    truth, ours, said, plain = NETWORK.diagonal(), [], [], []
    for seed in range(10):
        found = hesd.diagonal(NETWORK, None, max_products=60, seed=seed)
        ours.append(float((found.values - truth).norm()))
        said.append(float(found.standard_errors.norm()))
        probes = torch.from_numpy(np.random.default_rng(seed).choice([-1.0, 1.0], (60, SIZE)))
        plain.append(float(((probes * (probes @ NETWORK)).mean(dim=0) - truth).norm()))
    assert np.mean(ours) == pytest.approx(np.mean(said), rel=0.1)
    assert 3.0 * np.mean(ours) < np.mean(plain)


def test_of_a_diagonal_matrix_every_probe_says_all():
    """What is random are the directions taken out, and they are not sampled."""
    values = torch.linspace(-1.0, 3.0, 500, dtype=torch.float64)
    found = hesd.diagonal(torch.diag(values), 1e-6)
    assert found.trace.deflated == 0
    assert float((found.values - values).abs().max()) <= 8 * np.finfo(float).eps * 3.0
    assert float((found.trace.value - values.sum()).abs()) <= 8 * np.finfo(float).eps * float(values.abs().sum())


def test_the_sum_of_the_elements_is_the_trace():
    found = hesd.diagonal(NETWORK, None, max_products=40)
    assert found.trace.value == pytest.approx(float(found.values.sum()), abs=1024 * np.finfo(float).eps * 20.0)


def test_the_same_seed_gives_the_same_bits_and_another_one_others():
    one, again, other = (hesd.diagonal(NETWORK, None, max_products=40, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(one.values, again.values)
    assert torch.equal(one.standard_errors, again.standard_errors)
    assert not torch.equal(one.values, other.values)


@pytest.mark.parametrize("most", [2, 3, 9, 17, 31])
def test_any_number_of_products_is_kept_to(most):
    operator = hesd.MatrixOperator(NETWORK)
    found = hesd.diagonal(operator, None, max_products=most)
    assert operator.products == found.products == most
    assert found.trace.samples + found.trace.deflated == most
    assert bool(torch.isfinite(found.values).all())


@pytest.mark.parametrize("n", [1, 2, 300])
def test_the_zero_matrix(n):
    found = hesd.diagonal(torch.zeros(n, n))
    assert not any(numbers.any() for numbers in (found.values, found.standard_errors, found.half_widths))


def test_a_tolerance_ends_the_run_or_a_warning_says_what_it_takes():
    with warnings.catch_warnings():
        warnings.simplefilter("error", hesd.HESDWarning)
        found = hesd.diagonal(NETWORK, 0.1, max_products=150)
    assert found.products < 150
    assert float(found.standard_errors.norm()) <= 0.1 * float(found.values.norm())
    with pytest.warns(hesd.HESDWarning, match=r"the diagonal is known to .* wanted 0.001; about \d+ products would do"):
        hesd.diagonal(NETWORK, 0.001, max_products=60)


class TestOfAProblem:
    @pytest.fixture
    def data(self):
        generator = torch.Generator().manual_seed(0)
        return torch.randn(20, 5, generator=generator), torch.randint(4, (20,), generator=generator)

    @pytest.fixture
    def problem(self, data):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(5, 8), torch.nn.Tanh(), torch.nn.Linear(8, 4))
        return hesd.Problem(model, hesd.losses.supervised(torch.nn.CrossEntropyLoss()), data)

    @pytest.mark.parametrize("most", [60, 84])
    def test_every_parameter_has_its_elements_and_the_trace_of_its_block(self, problem, data, most):
        inputs, labels = data
        truth = dense_hessian(
            problem.model,
            lambda model: torch.nn.functional.cross_entropy(model(inputs), labels),
            dict(problem.parameters),
        ).double()
        found = hesd.diagonal(problem, None, max_products=most)
        assert list(found.by_parameter) == list(found.block_traces) == list(problem.parameters)
        parts = dict(zip(problem.parameters, problem.unflatten(truth.diagonal()), strict=True))
        rounding = 64 * torch.finfo(torch.float32).eps * float(truth.norm())
        # Four standard errors: there are 84 elements.
        assert bool(((found.values - truth.diagonal()).abs() <= 4 * found.standard_errors + rounding).all())
        for name, part in parts.items():
            assert found.by_parameter[name].shape == part.shape
            one = found.block_traces[name]
            assert abs(one.value - float(part.sum())) <= 4 * one.standard_error + rounding
            assert one.value == pytest.approx(float(found.by_parameter[name].sum()), abs=rounding)
        assert found.trace.low <= float(truth.trace()) <= found.trace.high

    def test_the_model_comes_back_as_it_was(self, problem):
        before = {name: value.clone() for name, value in problem.model.state_dict().items()}
        hesd.diagonal(problem, max_products=20)
        assert all(torch.equal(before[name], value) for name, value in problem.model.state_dict().items())


def test_of_a_complex_parameter_elements_are_complex():
    model = torch.nn.Module()
    model.weight = torch.nn.Parameter(torch.tensor([1.0 + 2.0j, 3.0 - 1.0j]))

    def loss(model, batch):
        return (batch * torch.view_as_real(model.weight) ** 2).sum(), 1

    found = hesd.diagonal(hesd.Problem(model, loss, torch.tensor([[1.0, 2.0], [3.0, 4.0]])))
    assert torch.equal(found.by_parameter["weight"], torch.tensor([2.0 + 4.0j, 6.0 + 8.0j], dtype=torch.complex128))
    assert found.block_traces["weight"].value == 20.0


@pytest.mark.parametrize("most", [60, 300])
def test_a_product_that_is_not_finite_is_named(most):
    class Broken:
        size, dtype, device, products = 300, torch.float64, torch.device("cpu"), 0

        def matmat(self, panel, out=None):
            found = panel.clone()
            found[:, 7] = math.nan
            return found

    with pytest.raises(hesd.OperatorError, match="the product of vector 0 is nan at column 7; wanted finite numbers"):
        hesd.diagonal(Broken(), max_products=most)


def test_short_memory_keeps_no_directions_and_what_does_not_fit_is_refused(monkeypatch):
    long_vectors = 14 * SIZE * 8
    for vectors, width in ((21, 8), (6, 1)):
        size = int((vectors * SIZE * 8 + long_vectors) / sampled_estimate.MEMORY_SHARE)
        monkeypatch.setattr(sampled_estimate, "available_memory", lambda device, size=size: size)
        found = hesd.diagonal(NETWORK, None, max_products=40)
        assert found.method.endswith("Girard-Hutchinson, nothing deflated (memory for 0)"), width
        assert found.trace.samples == 40
    monkeypatch.setattr(sampled_estimate, "available_memory", lambda device: long_vectors)
    with pytest.raises(hesd.PlanError, match="GiB"):
        hesd.diagonal(NETWORK, None, max_products=40)
