"""From the block tridiagonal matrix to the measure: quadrature identities on known spectra."""

from __future__ import annotations

import itertools
import json
import math
import pickle
from dataclasses import replace

import numpy as np
import pytest
import scipy.stats
from numpy_block_lanczos import EPSILON, block_lanczos, rademacher
from spectra import SIZE, SPECTRA, dense, scale_of

from hesd_fast.errors import CheckpointError, ProblemError
from hesd_fast.lanczos.block_tridiagonal import BlockTridiagonal
from hesd_fast.spectrum.spectral_measure import SpectralMeasure

CASES = [(name, b, m) for name in SPECTRA for b, m in ((1, 6), (3, 1), (3, 8), (5, 24))]


@pytest.mark.parametrize(("name", "probes", "steps"), CASES)
def test_recurrence_of_the_test_lanczos(name: str, probes: int, steps: int) -> None:
    # The helper is the root of trust of all tests here: its basis is orthonormal and T has the moments of H.
    t = block_lanczos(dense(name), rademacher(probes, SIZE, 0), steps)
    assert t.orthogonality is not None
    assert t.orthogonality <= 1e3 * EPSILON
    assert t.products == sum(t.block_sizes)
    assert t.breakdown or t.steps == steps


@pytest.mark.parametrize(("name", "probes", "steps"), CASES)
def test_weights_sum_to_one_and_moments_are_exact(name: str, probes: int, steps: int) -> None:
    matrix, z = dense(name), rademacher(probes, SIZE, 0)
    t = block_lanczos(matrix, z, steps)
    measure = SpectralMeasure.from_tridiagonal(t)
    np.testing.assert_allclose(measure.weight_sums, 1.0, atol=50 * EPSILON)
    power = z
    for order in range(2 * t.steps):
        for j in range(probes):
            truth = float(z[j] @ power[j]) / SIZE
            got = float(measure.weights[j] @ measure.nodes[j] ** order)
            # T H^k T^T accumulates k products, each rounded relative to ||H||.
            tolerance = 1e4 * EPSILON * (order + 1) * scale_of(name) ** order
            assert abs(got - truth) <= tolerance
        power = power @ matrix


def test_moment_2m_is_not_exact() -> None:
    # The promise ends at 2m - 1: otherwise the test above could not fail.
    matrix, z = dense("bulk and outliers"), rademacher(1, SIZE, 0)
    measure = SpectralMeasure.from_tridiagonal(block_lanczos(matrix, z, 2))
    truth = float(z[0] @ np.linalg.matrix_power(matrix, 4) @ z[0]) / SIZE
    assert abs(measure.moment(4) - truth) > 1e-3 * truth


@pytest.mark.parametrize("name", ["bulk and outliers", "indefinite", "all negative"])
@pytest.mark.parametrize("probes", [1, 4, 7])
def test_all_eigenvalues_when_the_space_is_exhausted(name: str, probes: int) -> None:
    # 7 does not divide 120: the last block is deflated.
    t = block_lanczos(dense(name), rademacher(probes, SIZE, 2), SIZE)
    assert t.breakdown
    assert sum(t.block_sizes) == SIZE
    values, _, residuals = t.ritz()
    np.testing.assert_allclose(values, np.sort(SPECTRA[name]), atol=1e3 * EPSILON * scale_of(name))
    assert residuals.max() <= t.noise(scale_of(name)) * (1 + 1e-12)
    assert t.noise(1.0) == 8 * EPSILON * SIZE**0.5


@pytest.mark.parametrize(("name", "probes", "steps"), CASES)
def test_ritz_values_within_their_residuals(name: str, probes: int, steps: int) -> None:
    t = block_lanczos(dense(name), rademacher(probes, SIZE, 3), steps)
    values, vectors, residuals = t.ritz()
    np.testing.assert_allclose(
        t.matrix() @ vectors, vectors * values, atol=200 * EPSILON * max(scale_of(name), EPSILON)
    )
    distance = np.abs(values[:, None] - SPECTRA[name][None]).min(axis=1)
    assert (distance <= residuals + 100 * EPSILON * scale_of(name)).all()


@pytest.mark.parametrize("name", list(SPECTRA))
@pytest.mark.parametrize("steps", [6, 12, 24])
def test_extreme_eigenvalues_within_their_intervals(name: str, steps: int) -> None:
    for seed in range(5):
        measure = SpectralMeasure.from_tridiagonal(block_lanczos(SPECTRA[name], rademacher(4, SIZE, seed), steps))
        largest, smallest = measure.lambda_max, measure.lambda_min
        rounding = 100 * EPSILON * scale_of(name)
        assert largest.low - rounding <= SPECTRA[name].max() <= largest.high + rounding
        assert smallest.low - rounding <= SPECTRA[name].min() <= smallest.high + rounding
        # Ritz values are Rayleigh quotients.
        assert largest.value <= SPECTRA[name].max() + rounding
        assert smallest.value >= SPECTRA[name].min() - rounding


@pytest.mark.parametrize("kind", ["rademacher", "gaussian"])
def test_trace_and_its_interval(kind: str) -> None:
    spectrum = SPECTRA["bulk and outliers"]
    matrix = dense("bulk and outliers")
    inside = 0
    for seed in range(100):
        random = np.random.default_rng(seed)
        z = rademacher(2, SIZE, seed) if kind == "rademacher" else random.standard_normal((2, SIZE))
        measure = SpectralMeasure.from_tridiagonal(block_lanczos(matrix, z, 4, probe_kind=kind))
        norms = (z**2).sum(axis=1) / SIZE
        np.testing.assert_allclose(measure.weight_sums, norms, rtol=100 * EPSILON)
        quotient = np.mean(np.einsum("ji,ik,jk->j", z, matrix, z) / norms)
        probes_trace = measure.trace.value - SIZE * measure.converged.correction(np.positive)
        assert abs(probes_trace - SIZE * measure.mean()) <= 1e4 * EPSILON * SIZE * scale_of("bulk and outliers")
        assert abs(SIZE * measure.mean() - quotient) <= 1e4 * EPSILON * SIZE * scale_of("bulk and outliers")
        inside += measure.trace.low <= spectrum.sum() <= measure.trace.high
    assert 93 <= inside <= 100


def test_standard_error_bound_covers_the_spread_of_the_probes() -> None:
    matrix = dense("indefinite")
    means = []
    for seed in range(200):
        measure = SpectralMeasure.from_tridiagonal(block_lanczos(matrix, rademacher(2, SIZE, seed), 3))
        means.append(measure.mean())
    bound = np.sqrt(2.0 * np.sum(SPECTRA["indefinite"] ** 2) / SIZE / (SIZE * 2))
    # A standard deviation of 200 samples errs by 5 %; 15 % are three of those.
    assert np.std(means) <= 1.15 * bound
    assert np.std(means) >= 0.5 * bound
    assert measure.standard_error_bound(lambda x: x) == pytest.approx(bound, rel=0.3)


def test_chosen_probes_have_no_sampling_error() -> None:
    probe = np.eye(SIZE)[:1]
    measure = SpectralMeasure.from_tridiagonal(block_lanczos(dense("indefinite"), probe, 5, probe_kind="given"))
    assert measure.standard_error_bound(lambda x: x) == 0.0
    assert measure.mean() == pytest.approx(dense("indefinite")[0, 0], abs=1e3 * EPSILON * scale_of("indefinite"))
    assert measure.weight_sums[0] == pytest.approx(1.0 / SIZE, rel=10 * EPSILON)


def test_breakdown_at_the_first_step() -> None:
    t = block_lanczos(np.full(SIZE, 2.5), rademacher(3, SIZE, 0), 10)
    assert t.steps == 1
    assert t.breakdown
    measure = SpectralMeasure.from_tridiagonal(t)
    assert measure.mean() == pytest.approx(2.5, rel=100 * EPSILON)
    assert measure.lambda_max.high - measure.lambda_max.low <= 64 * EPSILON * 2.5


def test_dependent_probes_are_deflated_at_the_start() -> None:
    z = rademacher(2, SIZE, 0)
    t = block_lanczos(dense("indefinite"), np.concatenate([z, -z[:1]]), 5)
    assert t.start.shape == (3, 2)
    measure = SpectralMeasure.from_tridiagonal(t)
    np.testing.assert_allclose(measure.weights[0], measure.weights[2], atol=100 * EPSILON)
    np.testing.assert_allclose(measure.weight_sums, 1.0, rtol=100 * EPSILON)


def test_truncation_is_the_shorter_run() -> None:
    matrix, z = dense("bulk and outliers"), rademacher(3, SIZE, 5)
    long, short = block_lanczos(matrix, z, 12), block_lanczos(matrix, z, 5)
    cut = long.truncated(5)
    np.testing.assert_array_equal(cut.matrix(), short.matrix())
    np.testing.assert_array_equal(cut.offdiagonal[-1], short.offdiagonal[-1])
    assert cut.products == short.products
    assert not cut.breakdown
    for steps in (0, 13):
        with pytest.raises(ProblemError, match="between 1 and 12"):
            long.truncated(steps)


def test_json_round_trip_is_exact() -> None:
    for steps in (3, SIZE):  # the second ends in a coupling without columns
        t = block_lanczos(dense("indefinite"), rademacher(7, SIZE, 0), steps)
        back = BlockTridiagonal.from_dict(json.loads(json.dumps(t.to_dict())))
        assert back.to_dict() == t.to_dict()
        assert back.offdiagonal[-1].shape == t.offdiagonal[-1].shape
        np.testing.assert_array_equal(back.matrix(), t.matrix())
    broken = t.to_dict()
    del broken["start"]
    with pytest.raises(CheckpointError, match="start"):
        BlockTridiagonal.from_dict(broken)
    with pytest.raises(CheckpointError, match="surprise"):
        BlockTridiagonal.from_dict({**t.to_dict(), "surprise": 1})
    for changes, words in (
        ({"size": "40"}, "matrix: size is '40'; wanted an integer; save it again"),
        ({"breakdown": 1}, "breakdown is 1; wanted true or false"),
        ({"start": [["1.0"]]}, r"start\[0\]\[0\] is '1.0'; wanted a number"),
        ({"products": -1}, "products must be finite and not negative"),
    ):
        with pytest.raises(CheckpointError, match=words):
            BlockTridiagonal.from_dict({**t.to_dict(), **changes})
    with pytest.raises(CheckpointError, match="the content is a list of 1; wanted an object"):
        BlockTridiagonal.from_dict([1])  # type: ignore[arg-type]


def test_bad_tridiagonals_are_refused() -> None:
    t = block_lanczos(dense("indefinite"), rademacher(2, SIZE, 0), 3)
    lopsided = np.array([[1.0, 2.0], [0.0, 1.0]])
    for changes, words in (
        ({"diagonal": (), "offdiagonal": ()}, "at least one step"),
        ({"diagonal": t.diagonal[:2]}, "2 diagonal and 3 off-diagonal"),
        ({"start": t.start[:, :1]}, "step 0"),
        ({"start": np.zeros((0, 2))}, "b >= p_0 >= 1"),
        ({"diagonal": (lopsided, *t.diagonal[1:])}, "asymmetric"),
        ({"diagonal": (t.diagonal[0] * np.nan, *t.diagonal[1:])}, "not finite"),
        ({"epsilon": 0.0}, "roundoff"),
        ({"size": 3}, "do not fit"),
        ({"breakdown": True}, "contradicts"),
        ({"products": -1}, "products must be finite and not negative, got -1"),
        ({"orthogonality": math.nan}, "orthogonality must be finite and not negative, got nan"),
        ({"recurrence_error": math.inf}, "recurrence_error must be finite and not negative, got inf"),
        ({"basis_vectors_read": -1}, "basis_vectors_read must be finite and not negative, got -1"),
    ):
        with pytest.raises(ProblemError, match=words):
            replace(t, **changes)  # type: ignore[arg-type]
    with pytest.raises(ProblemError, match="probe 1 is the zero vector"):
        SpectralMeasure.from_tridiagonal(replace(t, start=t.start * [[1.0], [0.0]]))


def test_bad_measures_are_refused() -> None:
    for nodes, weights, words in (
        ([], [], "non-empty"),
        ([1.0, 2.0], [1.0], "lengths"),
        ([[1.0], [2.0]], [[1.0]], "lengths"),
        ([1.0, np.inf], [0.5, 0.5], "not finite"),
        ([1.0, 2.0], [0.5, 0.6], "sum of 1"),
        ([1.0, 2.0], [1.5, -0.5], "no negative weight"),
    ):
        with pytest.raises(ProblemError, match=words):
            SpectralMeasure(nodes, weights)
    measure = SpectralMeasure([1.0], [1.0])
    with pytest.raises(ProblemError, match="size=None"):
        _ = measure.trace
    with pytest.raises(ProblemError, match="sigma"):
        measure.density([0.0], sigma=0.0)
    with pytest.raises(ProblemError, match="not finite"):
        measure.cdf([np.nan])
    with pytest.raises(ProblemError, match="order of at least 0"):
        measure.moment(-1)


def test_measures_are_values() -> None:
    run = SpectralMeasure.from_tridiagonal(block_lanczos(dense("indefinite"), rademacher(2, SIZE, 0), 4))
    bare = SpectralMeasure([1.0, 2.0], [0.5, 0.5])
    for measure in (run, bare):
        for name in ("nodes", "weights", "weight_sums", "size", "runs", "tridiagonals", "converged", "jacobi"):
            with pytest.raises(AttributeError):
                setattr(measure, name, None)
        for array in (*measure.nodes, *measure.weights, measure.weight_sums):
            with pytest.raises(ValueError, match="read-only"):
                array[0] = 7.0
    again = pickle.loads(pickle.dumps(run))
    assert (again.lambda_max, again.lambda_min, again.trace) == (run.lambda_max, run.lambda_min, run.trace)


def test_a_measure_keeps_no_ritz_vectors() -> None:
    run = SpectralMeasure.from_tridiagonal(block_lanczos(dense("indefinite"), rademacher(2, SIZE, 0), 30))
    _ = run.lambda_max, run.trace
    held = [array.size for array in vars(run.runs[0].ritz).values() if isinstance(array, np.ndarray)]
    assert max(held) == 2 * 60  # of 60 vectors, what two probes see of each


def test_bare_measure_is_taken_as_it_is() -> None:
    measure = SpectralMeasure([[3.0, -1.0], [1.0, 5.0]], [[0.25, 0.75], [0.5, 0.5]], size=10)
    np.testing.assert_array_equal(measure.nodes[0], [-1.0, 3.0])  # sorted together with the weights
    assert measure.mean() == pytest.approx(1.5)  # (0 + 3) / 2
    assert measure.trace.value == pytest.approx(15.0)
    assert measure.trace.high == pytest.approx(45.0)  # two standard errors: 2 * 10 * (3 / sqrt 2) / sqrt 2
    assert (measure.lambda_max.low, measure.lambda_max.value) == (3.0, 5.0)
    assert (measure.lambda_min.value, measure.lambda_min.high) == (-1.0, 1.0)
    np.testing.assert_allclose(measure.cdf([-1.0, 0.0, 1.0, 5.0]), [0.375, 0.375, 0.625, 1.0])
    low, high = measure.cdf_bounds([-1.0, 0.0])
    np.testing.assert_allclose(low, [0.0, 0.375])
    np.testing.assert_allclose(high, [0.375, 0.375])


def test_density_integrates_to_one_and_is_the_gaussian_of_one_node() -> None:
    measure = SpectralMeasure.from_tridiagonal(block_lanczos(SPECTRA["indefinite"], rademacher(3, SIZE, 0), 10))
    grid = np.linspace(-5.0, 5.0, 4001)
    # The trapezoidal rule on a Gaussian is exact to rounding once the step is below sigma.
    assert np.trapezoid(measure.density(grid), grid) == pytest.approx(1.0, abs=1e-12)
    assert np.trapezoid(measure.density(grid, sigma=0.1) * grid, grid) == pytest.approx(measure.mean(), abs=1e-12)
    single = SpectralMeasure([2.0], [1.0]).density([2.0, 2.3], sigma=0.3)
    np.testing.assert_allclose(single, scipy.stats.norm.pdf([0.0, 1.0]) / 0.3, rtol=10 * EPSILON)
    assert np.isfinite(SpectralMeasure([0.0], [1.0]).density([0.0])).all()
    assert measure.density(grid.reshape(-1, 1)).shape == (4001, 1)


def test_wasserstein_distance() -> None:
    spectrum = SPECTRA["bulk and outliers"]
    exact = SpectralMeasure(spectrum, np.full(SIZE, 1.0 / SIZE))
    assert exact.wasserstein1(spectrum) <= 100 * EPSILON * scale_of("bulk and outliers")
    assert exact.wasserstein1(spectrum + 0.25) == pytest.approx(0.25, rel=100 * EPSILON)
    other = SpectralMeasure([[0.0, 1.0], [-2.0, 2.0]], [[0.3, 0.7], [0.5, 0.5]])
    expected = scipy.stats.wasserstein_distance([0.0, 1.0, -2.0, 2.0], spectrum, [0.15, 0.35, 0.25, 0.25])
    assert other.wasserstein1(spectrum) == pytest.approx(expected, rel=1e3 * EPSILON)
    assert exact.wasserstein1(other) == pytest.approx(expected, rel=1e3 * EPSILON)


def test_wasserstein_distance_to_the_probes_measure_falls_with_steps() -> None:
    spectrum, z = SPECTRA["indefinite"], rademacher(3, SIZE, 4)
    # On a diagonal matrix a Rademacher probe has the weight 1/n on every eigenvalue: no sampling error at all.
    distances = [
        SpectralMeasure.from_tridiagonal(block_lanczos(spectrum, z, steps)).wasserstein1(spectrum)
        for steps in (2, 4, 8, 16, 40)
    ]
    assert all(later < 0.8 * earlier for earlier, later in itertools.pairwise(distances))
    assert distances[-1] <= 1e3 * EPSILON * SIZE  # 40 steps of 3 probes exhaust the space
