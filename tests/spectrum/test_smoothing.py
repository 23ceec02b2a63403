"""Densities show what the quadrature resolves: near the true one for few steps, and no sharper than the nodes allow."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse
import scipy.stats

import hesd_fast as hesd
from hesd_fast.spectrum.smoothing import BROADEST, ENOUGH, WIDTH, Atoms, atoms_of, smoothed_density

EPSILON = 2.0**-52
SIZE = 20_000  # so that no node stands for few eigenvalues


def semicircle_density(x):
    return 2.0 / np.pi * np.sqrt(np.clip(1.0 - x * x, 0.0, None))


def semicircle():
    grid = np.linspace(-1.0, 1.0, 100_001)
    below = 0.5 + (grid * np.sqrt(1.0 - grid**2) + np.arcsin(grid)) / np.pi
    return np.interp((np.arange(SIZE) + 0.5) / SIZE, below, grid)


TRUE = {
    "semicircle": (semicircle(), semicircle_density),
    "normal": (scipy.stats.norm.ppf((np.arange(SIZE) + 0.5) / SIZE), scipy.stats.norm.pdf),
}


def measure_of(eigenvalues, steps, probes, **options):
    """A run on a diagonal matrix, of which Rademacher probes see each eigenvalue alike."""
    matrix = scipy.sparse.diags_array(eigenvalues).tocsr()
    return hesd.SpectralMeasure.from_tridiagonal(
        hesd.block_lanczos(matrix, steps, probes, seed=1, probe_kind="rademacher", **options)
    )


def atoms(places, neighbours=1, errors=0.0, noise=0.0, enough=0.0):
    places = np.asarray(places, dtype=float)
    weights = np.full(places.size, 1.0 / places.size)
    return Atoms(places, weights, np.full(places.size, errors), np.full(places.size, noise), neighbours, enough)


@pytest.mark.parametrize("name", TRUE)
@pytest.mark.parametrize(("steps", "probes"), [(20, 1), (80, 1), (10, 4), (25, 4)])
def test_density_is_near_the_true_one_from_few_steps_on(name, steps, probes):
    eigenvalues, density = TRUE[name]
    measure = measure_of(eigenvalues, steps, probes)
    grid = np.linspace(1.4 * eigenvalues[0], 1.4 * eigenvalues[-1], 4001)
    wrong = np.trapezoid(np.abs(measure.density(grid) - density(grid)), grid)  # 2 where the two have nothing in common
    assert wrong <= 1.6 / steps  # in proportion to the distance of the nodes
    narrow = 0.01 * (eigenvalues[-1] - eigenvalues[0])
    too_narrow = np.trapezoid(np.abs(measure.density(grid, narrow) - density(grid)), grid)
    assert steps > 25 or too_narrow > 2.0 * wrong


def test_width_is_half_the_distance_to_the_next_node_of_a_probes_rule():
    places = np.arange(0.0, 200.0)
    for neighbours in (1, 2, 3):
        np.testing.assert_array_equal(atoms(places, neighbours).widths(), np.full(200, WIDTH * min(neighbours, 3)))
    uneven = np.concatenate((np.arange(0.0, 100.0, 0.5), np.arange(100.0, 400.0)))
    widths = atoms(uneven).widths()
    assert set(widths[:200]) == {0.25}  # at a change of the distance the smaller one counts
    assert widths[201:].min() == 0.5


def test_equal_gaussians_of_that_width_add_up_to_a_constant():
    many = atoms(np.arange(0.0, 200.0))
    density = smoothed_density(np.linspace(50.0, 150.0, 1001), many, many.widths())
    # the first Fourier coefficient of a comb of Gaussians: 2 exp(-2 pi^2 sigma^2)
    np.testing.assert_allclose(density, 1.0 / 200, rtol=1.01 * 2.0 * np.exp(-2.0 * np.pi**2 * WIDTH**2))


def test_a_known_eigenvalue_far_from_others_stays_a_peak_and_an_unknown_one_does_not():
    places = np.concatenate((np.linspace(0.0, 1.0, 101), [10.0]))
    assert atoms(places).widths()[-1] == BROADEST * 10.0
    assert atoms(places, errors=2.0).widths()[-1] == 2.0
    assert atoms(places, errors=100.0).widths()[-1] == WIDTH * 9.0


def test_random_weights_are_averaged_over_enough_of_them():
    places = np.linspace(0.0, 1.0, 1001)
    widths = atoms(places, enough=20.0 / places.size).widths()  # as many eigenvalues as 20 random numbers see
    np.testing.assert_allclose(widths[40:-40], WIDTH * 20.0 * 0.001, rtol=0.06)  # the 20th or, after rounding, the 21st
    measure = measure_of(TRUE["normal"][0], 12, 4)
    assert atoms_of(measure.nodes, measure.weights, [run.ritz for run in measure.runs]).enough == ENOUGH / (4 * SIZE)


def test_nothing_is_sharper_than_its_noise():
    assert atoms([0.0, 1e-9, 2e-9, 1.0], noise=1e-4).widths().min() == 1e-4


def test_copies_of_an_eigenvalue_are_one_place():
    eigenvalues = np.concatenate((np.linspace(-0.1, 0.1, 300), [1.0, 2.0]))
    measure = measure_of(eigenvalues, 60, 1, reorthogonalization="none")
    copies = np.flatnonzero(np.abs(measure.nodes[0] - 2.0) < 1e-12)
    assert copies.size > 1
    found = atoms_of(measure.nodes, measure.weights, [run.ritz for run in measure.runs])
    (last,) = np.flatnonzero(np.abs(found.places - 2.0) < 1e-12)
    assert found.weights[last] == pytest.approx(measure.weights[0][copies].sum(), rel=100 * EPSILON)
    assert found.widths()[last] == pytest.approx(BROADEST * np.ptp(measure.nodes[0]), rel=1e-6)
    assert found.weights.sum() == pytest.approx(1.0, rel=100 * EPSILON)


def test_probes_that_share_nodes_or_do_not_are_smoothed_alike():
    one, other = np.arange(0.0, 400.0, 2.0), np.arange(1.0, 400.0, 2.0)
    weights = np.full(200, 0.005)
    apart, shared = (hesd.SpectralMeasure([one, x], [weights, weights]) for x in (other, one))
    assert set(atoms_of(apart.nodes, apart.weights, []).widths()[2:-2]) == {1.0}
    assert set(atoms_of(shared.nodes, shared.weights, []).widths()) == {1.0}


@pytest.mark.parametrize("scale", [2.0**-100, 2.0**100])
@pytest.mark.parametrize("places", [[0.0], [3.0], [-2.0, -2.0], [0.0, 0.0], [-1.0, 1.0], [1.0, 1.5, 4.0]])
def test_every_place_has_a_width_in_its_own_units(places, scale):
    widths = atoms(places).widths()
    assert (widths > 0.0).all()
    if any(places):
        np.testing.assert_array_equal(atoms(np.array(places) * scale).widths(), widths * scale)
    mirrored = atoms(places).reflected()
    np.testing.assert_array_equal(mirrored.widths()[::-1], widths)


def test_two_runs_are_smoothed_as_finely_as_their_nodes_together_allow():
    eigenvalues, density = TRUE["normal"]
    matrix = scipy.sparse.diags_array(eigenvalues).tocsr()
    runs = [hesd.block_lanczos(matrix, 25, 2, seed=seed, probe_kind="rademacher") for seed in (1, 2)]
    measure = hesd.SpectralMeasure.from_tridiagonal(*runs)
    found = atoms_of(measure.nodes, measure.weights, [run.ritz for run in measure.runs])
    assert (found.places.size, found.neighbours) == (100, 4)
    assert (np.diff(found.places) >= 0.0).all()
    assert found.weights.sum() == pytest.approx(1.0, rel=100 * EPSILON)
    grid = np.linspace(-6.0, 6.0, 4001)
    assert np.trapezoid(np.abs(measure.density(grid) - density(grid)), grid) <= 1.6 / 25
