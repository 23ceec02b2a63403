"""The band of the distribution function holds everywhere, and tightens."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
from numpy_block_lanczos import EPSILON, Array, block_lanczos, rademacher, rotation
from scipy.optimize import linprog
from spectra import SIZE, SPECTRA, dense, scale_of

from hesd_fast.spectrum.jacobi_matrix import Jacobi
from hesd_fast.spectrum.moment_bounds import CDFBand, HingeFamily, cdf_band, greatest_square_beyond, hinge_bounds
from hesd_fast.spectrum.spectral_measure import SpectralMeasure


def probe_weights(z: Array) -> Array:
    """The exact weights of the probes' measure, on the eigenvalues of a rotated matrix."""
    return (z @ rotation(SIZE, 1)) ** 2 / SIZE


def run(name: str, z: Array, steps: int) -> SpectralMeasure:
    return SpectralMeasure.from_tridiagonal(block_lanczos(dense(name), z, steps))


def points_for(name: str, measure: SpectralMeasure, seed: int) -> Array:
    """Points everywhere: random ones, close to eigenvalues and nodes, on nodes, far outside."""
    random = np.random.default_rng(seed)
    spectrum, scale = SPECTRA[name], max(scale_of(name), 1.0)
    near = np.concatenate([spectrum, measure.nodes[0]])
    shifted = [near + sign * distance * scale for distance in (1e-12, 1e-6, 1e-3) for sign in (-1.0, 1.0)]
    return np.concatenate([random.uniform(-1.5, 1.5, 200) * scale, near, *shifted, [-1e3 * scale, 1e3 * scale]])


@pytest.mark.parametrize("name", list(SPECTRA))
@pytest.mark.parametrize(("probes", "steps"), [(1, 1), (2, 3), (3, 8), (2, 25), (4, 30)])
def test_the_band_contains_the_probes_distribution(name: str, probes: int, steps: int) -> None:
    for seed in range(2):
        z = rademacher(probes, SIZE, seed)
        measure = run(name, z, steps)
        weights = probe_weights(z).mean(axis=0)
        points = points_for(name, measure, seed)
        low, high = measure.cdf_bounds(points)
        # An eigenvalue known to rounding may lie on either side of a point this close to it.
        slack = 100 * EPSILON * scale_of(name)
        at_most = (weights * (SPECTRA[name] <= points[:, None] + slack)).sum(axis=1)
        at_least = (weights * (SPECTRA[name] < points[:, None] - slack)).sum(axis=1)
        tolerance = 100 * EPSILON
        # There the rule has the point for its node and puts what the tiny distance asks for beyond it: rounding over a
        # distance to a neighbour, as a share of the mass in question.
        at_point = tolerance + EPSILON**0.5 * (at_most - at_least)
        assert (low <= at_least + at_point).all()
        assert (at_most <= high + at_point).all()
        assert low[-2] <= tolerance  # left of everything
        assert high[-1] >= 1.0 - tolerance


def test_the_band_tightens_with_steps() -> None:
    z = rademacher(2, SIZE, 0)
    points = np.linspace(-3.0, 3.0, 301)
    widths = []
    for steps in (2, 5, 10, 20, 40):
        low, high = run("indefinite", z, steps).cdf_bounds(points)
        widths.append(float((high - low).mean()))
    assert all(later < 0.8 * earlier for earlier, later in itertools.pairwise(widths))


@pytest.mark.parametrize("name", ["repeated", "low rank"])
def test_the_band_closes_when_the_measure_has_few_points(name: str) -> None:
    z = rademacher(2, SIZE, 0)
    measure = run(name, z, 10)
    points = np.linspace(-4.0, 4.0, 57) + 1e-3
    low, high = measure.cdf_bounds(points)
    weights = probe_weights(z).mean(axis=0)
    truth = (weights * (SPECTRA[name] <= points[:, None])).sum(axis=1)
    # The probe vectors are known to 8 * 2^-26, which moves a mass M by 2 sqrt(M) times that.
    np.testing.assert_allclose(low, truth, atol=2 * 8 * 2.0**-26)
    np.testing.assert_allclose(high, truth, atol=2 * 8 * 2.0**-26)


def test_the_band_is_the_classical_one_at_the_gauss_nodes() -> None:
    # Chebyshev-Markov-Stieltjes at a Gauss node is attained by the Gauss rule itself.
    z = rademacher(1, SIZE, 0)
    measure = run("indefinite", z, 6)
    nodes, weights = measure.nodes[0], measure.weights[0]
    low, high = measure.cdf_bounds(nodes)
    sums = np.cumsum(weights)
    np.testing.assert_allclose(low, sums - weights, atol=1e-6)
    np.testing.assert_allclose(high, sums, atol=1e-6)


@pytest.mark.parametrize("name", list(SPECTRA))
def test_jacobi_matrix_of_a_probe_has_its_moments(name: str) -> None:
    z = rademacher(3, SIZE, 1)
    for j, jacobi in enumerate(run(name, z, 6).jacobi):
        weights = probe_weights(z)[j]
        # Moment 2m as well: each rule with a prescribed node has it, and no Gauss rule of m nodes does.
        nodes, masses = jacobi.radau(np.array([0.3, 1.7 * scale_of(name)]))
        for order in range(2 * jacobi.diagonal.size + 1):
            truth = float(weights @ SPECTRA[name] ** order)
            tolerance = 1e5 * EPSILON * max(scale_of(name), 1.0) * float(weights @ np.abs(SPECTRA[name]) ** order)
            got = (masses * nodes**order).sum(axis=1)
            np.testing.assert_allclose(got[1], truth, atol=tolerance + 1e3 * EPSILON * (order == 0), rtol=1e-9)
            if scale_of(name) > 0.0 and scale_of(name) > 0.3:
                np.testing.assert_allclose(got[0], truth, atol=1e-8 * scale_of(name) ** order)
        power, norm = jacobi.power_norm()
        if np.isfinite(power):
            assert norm == pytest.approx(float(weights @ SPECTRA[name] ** power) ** (1.0 / power), rel=1e-10)
        else:
            assert norm == pytest.approx(scale_of(name), abs=1e-6)


@pytest.mark.parametrize("name", list(SPECTRA))
@pytest.mark.parametrize("steps", [1, 2, 5, 20])
@pytest.mark.parametrize("exponent", [0.5, 1.0])
def test_tail_moments_enclose_the_truth(name: str, steps: int, exponent: float) -> None:
    z = rademacher(2, SIZE, 7)
    measure = run(name, z, steps)
    for threshold in (1e-6, 1e-2, 0.6):
        for j, jacobi in enumerate(measure.jacobi):
            band = cdf_band(jacobi, threshold, exponent)
            assert (np.diff(band.low) >= 0.0).all()
            assert (np.diff(band.high) >= 0.0).all()
            for side, sign in ((band, 1.0), (band.reflected(), -1.0)):
                values = np.clip(sign * SPECTRA[name], 0.0, None)
                for power in (exponent, 2.0 * exponent):
                    truth = float(probe_weights(z)[j] @ np.where(values > threshold, values**power, 0.0))
                    low, high = side.tail_moment(threshold, power)
                    assert low <= truth + 100 * EPSILON
                    assert truth <= high + 100 * EPSILON


def test_tail_moment_counts_what_lies_beyond_the_last_point() -> None:
    # Mass 0.5 at 0, 0.4 at 1.5 and 0.1 at 10, of which the band knows only that 0.1 lies beyond 2.
    band = CDFBand(np.array([1.0, 2.0]), np.array([0.5, 0.9]), np.array([0.5, 0.9]), 2.0, (0.4 * 1.5**2 + 10.0) ** 0.5)
    low, high = band.tail_moment(1.0, 1.0)
    assert low == pytest.approx(1.0 * 0.5 + 1.0 * 0.1)
    assert high == pytest.approx(1.0 * 0.5 + 1.0 * 0.5 + (10.9 * 0.1) ** 0.5)
    assert low <= 0.4 * 1.5 + 0.1 * 10.0 <= high


def test_a_coarser_roundoff_widens_the_band() -> None:
    z = rademacher(1, SIZE, 0)
    fine = run("indefinite", z, 10).tridiagonals[0]
    assert fine is not None
    points = np.linspace(-2.0, 2.0, 41)
    widths = []
    for epsilon in (2.0**-52, 2.0**-8):
        low, high = SpectralMeasure.from_tridiagonal(replace(fine, epsilon=epsilon)).cdf_bounds(points)
        widths.append(high - low)
    assert (widths[1] > widths[0]).all()


def moment_programme(jacobi: Jacobi, grid: Array, integrand: Array) -> tuple[float, float]:
    """Least and greatest integral over all measures on a grid with the moments 0 ... 2s: two linear programmes."""
    polynomials, previous, coupling = [np.ones_like(grid)], np.zeros_like(grid), 0.0
    for alpha, beta in zip(jacobi.diagonal, jacobi.offdiagonal, strict=True):
        following = ((grid - alpha) * polynomials[-1] - coupling * previous) / beta
        previous, coupling = polynomials[-1], beta
        polynomials.append(following)
    pairs = [(order // 2, order - order // 2) for order in range(2 * jacobi.diagonal.size + 1)]
    rows = np.array([polynomials[a] * polynomials[b] for a, b in pairs])
    moments = np.array([float(a == b) for a, b in pairs])
    size = np.abs(rows).max(axis=0)
    ends = [linprog(sign * integrand / size, A_eq=rows / size, b_eq=moments) for sign in (1.0, -1.0)]
    assert all(end.success for end in ends)
    return float(ends[0].fun), -float(ends[1].fun)


@pytest.mark.parametrize("steps", [1, 2, 3, 4])
@pytest.mark.parametrize("threshold", [-0.3, 0.0, 0.4, 1.1])
def test_hinge_bounds_are_the_optimum_of_the_moment_problem(steps: int, threshold: float) -> None:
    measure = run("indefinite", rademacher(1, SIZE, 3), steps)
    (jacobi,) = measure.jacobi
    low, high = hinge_bounds(jacobi, threshold)
    spectrum = SPECTRA["indefinite"]
    span = 8.0 * scale_of("indefinite")
    grid = np.union1d(np.linspace(-span, span, 8001), [threshold])
    least, greatest = moment_programme(jacobi, grid, np.clip(grid - threshold, 0.0, None))
    # The grid admits fewer measures than the line, by its spacing squared times a density, and its ends cut some off.
    assert low <= least + 1e-6
    assert greatest <= high + 1e-6
    assert least - low <= 2e-3 * scale_of("indefinite")
    assert high - greatest <= 2e-3 * scale_of("indefinite")
    weights = probe_weights(rademacher(1, SIZE, 3))[0]
    assert low <= float(weights @ np.clip(spectrum - threshold, 0.0, None)) <= high


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_a_kink_at_a_gauss_node_is_bounded_too(steps: int) -> None:
    # the rule with a node there has another one at infinity
    (jacobi,) = run("indefinite", rademacher(1, SIZE, 3), steps).jacobi
    for threshold in jacobi.gauss()[0]:
        nodes, weights = jacobi.radau(threshold + jacobi.scale * np.linspace(-1.5, 1.5, 300))
        most = float((weights * np.clip(nodes - threshold, 0.0, None)).sum(axis=1).max())
        low, high = hinge_bounds(jacobi, float(threshold))
        assert low <= most <= high <= most + 1e-2 * jacobi.scale
        if steps == 1:
            assert high >= jacobi.offdiagonal[0] / 2.0  # Scarf


@pytest.mark.parametrize("name", list(SPECTRA))
@pytest.mark.parametrize("steps", [1, 2, 5, 20, 40])
def test_hinge_bounds_enclose_the_truth_on_both_sides(name: str, steps: int) -> None:
    z = rademacher(3, SIZE, 7)
    measure = run(name, z, steps)
    for threshold in (1e-6, 1e-2, 0.6, 50.0):
        for j, jacobi in enumerate(measure.jacobi):
            for one, sign in ((jacobi, 1.0), (jacobi.reflected(), -1.0)):
                truth = float(probe_weights(z)[j] @ np.clip(sign * SPECTRA[name] - threshold, 0.0, None))
                low, high = hinge_bounds(one, threshold)
                assert low <= truth + 100 * EPSILON
                assert truth <= high + 100 * EPSILON


@pytest.mark.parametrize(("steps", "threshold"), [(1, 0.0), (2, 0.0), (3, 0.0), (3, 0.4)])
def test_the_square_beyond_is_the_optimum_of_the_moment_problem(steps: int, threshold: float) -> None:
    (jacobi,) = run("indefinite", rademacher(1, SIZE, 3), steps).jacobi
    span = 8.0 * scale_of("indefinite")
    grid = np.union1d(np.linspace(-span, span, 2001), [threshold])
    _, most = moment_programme(jacobi, grid, np.where(grid >= threshold, grid**2, 0.0))
    found = greatest_square_beyond(jacobi, threshold)
    assert most <= found + 1e-6
    # its three parts have their own optima each, and the grid less room than the line
    assert found - most <= (5e-3 if threshold == 0.0 else 0.5) * scale_of("indefinite") ** 2


@pytest.mark.parametrize("name", list(SPECTRA))
@pytest.mark.parametrize("steps", [1, 2, 5, 20, 40])
def test_the_square_beyond_encloses_the_truth_on_both_sides(name: str, steps: int) -> None:
    z = rademacher(3, SIZE, 7)
    measure = run(name, z, steps)
    for threshold in (1e-200, 1e-6, 1e-2, 0.6, 50.0):
        for j, jacobi in enumerate(measure.jacobi):
            for one, sign in ((jacobi, 1.0), (jacobi.reflected(), -1.0)):
                values = np.clip(sign * SPECTRA[name], 0.0, None)
                truth = float(probe_weights(z)[j] @ np.where(values > threshold, values**2, 0.0))
                assert truth <= greatest_square_beyond(one, threshold) + 100 * EPSILON


@pytest.mark.parametrize("name", ["bulk and outliers", "indefinite", "all negative"])
@pytest.mark.parametrize("steps", [2, 3, 12])
@pytest.mark.parametrize("threshold", [-2.0, 0.0, 1e-4, 0.4, 30.0])
def test_the_family_of_rules_without_eigenproblems(name: str, steps: int, threshold: float) -> None:
    for jacobi in run(name, rademacher(2, SIZE, 3), steps).jacobi:
        points = np.concatenate([jacobi.gauss()[0] + shift for shift in (-0.3, -1e-3, 1e-3, 0.4)])
        gammas = points + jacobi.offdiagonal[-1] ** 2 / jacobi._last_pivot(points)
        family = HingeFamily(jacobi, threshold)
        found = family.integrals((gammas - threshold) / family.unit)
        nodes, weights = jacobi.radau(points)
        for power in (1, 2):
            truth = (weights * np.clip(nodes - threshold, 0.0, None) ** power).sum(axis=1)
            tolerance = 1e-9 * family.unit**power
            np.testing.assert_allclose(found[power - 1] * family.unit**power, truth, atol=tolerance)
            # and none is greater than the greatest, of many
            everywhere = jacobi.radau(np.linspace(-2.0 * jacobi.scale, 2.0 * jacobi.scale, 400))
            most = (everywhere[1] * np.clip(everywhere[0] - threshold, 0.0, None) ** power).sum(axis=1).max()
            greatest = family.greatest(power)
            assert max(truth.max(), most) <= greatest + tolerance
            assert greatest <= most + 2e-2 * jacobi.scale**power


def test_hinge_bounds_are_much_tighter_than_the_band() -> None:
    measure = run("indefinite", rademacher(1, SIZE, 0), 20)
    (jacobi,) = measure.jacobi
    low, high = hinge_bounds(jacobi, 1e-3)
    least, most = cdf_band(jacobi, 1e-3, 1.0).tail_moment(1e-3, 1.0)
    assert high - low < 0.5 * (most - least)
