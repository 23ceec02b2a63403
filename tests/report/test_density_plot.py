"""Pictures show what the measure holds: density, outliers and the band, on every axis and for every spectrum."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from torch import nn

import hesd_fast as hesd
from hesd_fast.report.density_plot import COLORS, LINES, plot_densities
from hesd_fast.report.eigenvalue_axis import SCALES, axes_of
from hesd_fast.spectrum.smoothing import atoms_of

EPSILON = 2.0**-52


@pytest.fixture(scope="module")
def report():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 2))
    inputs = torch.randn(40, 5)
    data = (inputs, (inputs[:, 0] > 0).long())
    return hesd.analyze(model, hesd.losses.supervised(nn.CrossEntropyLoss()), data, max_steps=12, progress=False)


@pytest.fixture(scope="module")
def zero_report():
    model = nn.Linear(4, 1)
    return hesd.analyze(model, lambda m, b: m(b).mean(), torch.randn(20, 4), progress=False)


def measure_of(eigenvalues, steps=8, block=2, **options):
    """A run on a diagonal matrix: the squares of Rademacher probes are 1, so their measure is the spectrum itself."""
    return hesd.SpectralMeasure.from_tridiagonal(
        hesd.block_lanczos(
            np.diag(np.asarray(eigenvalues, dtype=float)), steps, block, probe_kind="rademacher", **options
        )
    )


RANDOM = np.random.default_rng(0)
BULK = np.concatenate((RANDOM.normal(size=150), [8.0, 10.0, -7.0]))


def density_line(panel):
    """The places and heights of the first curve of an upper panel."""
    line = panel.lines[0]
    return np.asarray(line.get_xdata(), dtype=float), np.asarray(line.get_ydata(), dtype=float)


def coordinate_of(measure, scale):
    (*_, axis) = axes_of([atoms_of(measure.nodes, measure.weights, [run.ritz for run in measure.runs])], scale)
    return axis.coordinate


def test_plot_draws_the_density_of_the_measure_and_writes_it(report, tmp_path):
    figure = report.plot(tmp_path / "hesd.png", scale="linear", sigma=0.01)
    assert (tmp_path / "hesd.png").read_bytes().startswith(b"\x89PNG")
    upper, lower = figure.axes
    assert (upper.get_yscale(), lower.get_yscale(), lower.get_xscale()) == ("log", "linear", "linear")
    assert lower.get_xlabel() == "eigenvalue"
    places, heights = density_line(upper)
    np.testing.assert_allclose(heights, report.measure.density(places, 0.01), rtol=1e4 * EPSILON)
    assert places[0] < report.lambda_min.value
    assert places[-1] > report.lambda_max.value


@pytest.mark.parametrize("scale", ["linear", "symlog"])
def test_the_area_under_the_density_is_the_share_of_the_bulk(scale):
    measure = measure_of(BULK, 30)
    assert len(measure.outliers.all) == 3
    figure = plot_densities({"run": measure}, scale=scale)
    places, heights = density_line(figure.axes[0])
    seen = np.trapezoid(heights, coordinate_of(measure, scale)(places))
    assert seen == pytest.approx(150 / 153, abs=1e-3)  # what lies beyond the ends of the axis is not there


def test_a_logarithmic_axis_has_a_panel_for_each_sign_whose_areas_add_up():
    measure = measure_of(BULK, 30)
    figure = plot_densities({"run": measure}, scale="log")
    left, right, below_left, below_right = figure.axes
    assert [panel.get_xlabel() for panel in (below_left, below_right)] == ["negative eigenvalue", "positive eigenvalue"]
    areas = []
    for panel in (left, right):
        places, heights = density_line(panel)
        areas.append(np.trapezoid(heights, np.log10(places)))
        assert panel.get_xscale() == "log"
    nodes, weights = measure.nodes[0], np.mean(measure.weights, axis=0)
    low, high = measure.outliers.bulk
    for area, shown in zip(areas, (nodes < 0, nodes > 0), strict=True):
        share = weights[shown & (nodes >= low) & (nodes <= high)].sum()
        assert area == pytest.approx(share, abs=0.04)  # some is nearer to zero than the axis goes
    assert below_left.get_xlim()[0] > below_left.get_xlim()[1]  # zero is in the middle
    assert len(plot_densities({"run": measure_of(1.0 + abs(BULK), 30)}, scale="log").axes) == 2


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("steps", [3, 12])
def test_the_band_holds_the_distribution_also_between_its_points(scale, steps):
    figure = plot_densities({"run": measure_of(BULK, steps)}, scale=scale)
    lower = figure.axes[len(figure.axes) // 2 :]
    for panel, sign in zip(lower, (1.0,) if scale != "log" else (-1.0, 1.0), strict=True):
        vertices = panel.collections[0].get_paths()[0].vertices
        ends = vertices[:, 0].min(), vertices[:, 0].max()
        points = np.linspace(*ends, 501) if scale != "log" else np.geomspace(*ends, 501)
        points = points[1:-1]
        if scale == "log":
            truth = (sign * BULK[:, None] > points).mean(axis=0)
        else:
            truth = (BULK[:, None] <= points).mean(axis=0)
        count = len(vertices) // 2  # fill_between goes along the lower side and back along the upper one
        sides = sorted((vertices[1:count], vertices[count + 1 : -1][::-1]), key=lambda side: side[:, 1].sum())
        for side, below in zip(sides, (True, False), strict=True):
            last = np.searchsorted(side[:, 0], points, side="right").clip(1, len(side) - 1)
            bound = side[last, 1]
            assert (bound <= truth + 1e-6).all() if below else (bound >= truth - 1e-6).all()


def test_outliers_are_stems_with_their_intervals_and_their_number():
    figure = plot_densities({"run": measure_of(BULK, 30, 3)}, scale="linear")
    (bars,) = figure.axes[0].containers
    places, heights = bars.lines[0].get_data()
    np.testing.assert_allclose(places, [-7.0, 8.0, 10.0], rtol=1e-9)
    assert len(set(heights)) == 1
    assert heights[0] > figure.axes[0].get_ylim()[0]
    (legend,) = figure.legends
    assert legend.get_texts()[0].get_text() == "run: outliers: 2 above, 1 below the bulk"
    assert legend.get_lines()[0].get_marker() == "o"


def test_where_an_eigenvalue_may_hide_is_shaded():
    measure = measure_of(np.linspace(-1.0, 1.0, 200), 4, 1)
    assert measure.lambda_max.high > measure.lambda_max.value + 0.05
    shaded = plot_densities({"run": measure}, scale="linear").axes[0].patches
    assert [round(patch.get_x(), 9) for patch in shaded] == [
        round(x, 9) for x in (max(measure.lambda_min.low, shaded[0].get_x()), measure.lambda_max.value)
    ]


GROUND = np.random.default_rng(1).normal(size=60)
DEGENERATE = {
    "zero": measure_of(np.zeros(20)),
    "one": measure_of([2.5], 1, 1),
    "one negative": measure_of([-2.5], 1, 1),
    "one zero": measure_of([0.0], 1, 1),
    "all equal": measure_of(np.full(20, 3.0)),
    "all negative": measure_of(-1.0 - np.abs(GROUND)),
    "tiny": measure_of(1e-30 * GROUND),
    "huge": measure_of(1e30 * GROUND),
    "low rank": measure_of([0.0] * 50 + [1.0, 2.0, 3.0, -1.0]),
    "one step": measure_of(GROUND, 1, 1),
    "copies": measure_of(GROUND, 40, 2, reorthogonalization="none"),
    "many decades": measure_of(np.concatenate((-np.geomspace(1e-12, 1.0, 40), np.geomspace(1e-14, 10.0, 60))), 20, 4),
    "bare": hesd.SpectralMeasure([-1.0, 0.0, 3.0], [0.25, 0.5, 0.25]),
    "bare zero": hesd.SpectralMeasure([0.0], [1.0]),
    "bare, of unlike probes": hesd.SpectralMeasure([[1.0, 2.0], [1.5, 3.0]], [[0.5, 0.5], [0.1, 0.9]]),
    "bare, far apart": hesd.SpectralMeasure([-1e-30, 1e30], [0.5, 0.5]),
}


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("name", DEGENERATE)
def test_degenerate_spectra_are_drawn_without_a_warning(name, scale):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure = plot_densities({name: DEGENERATE[name]}, scale=scale)
        if scale == "symlog" or name in ("zero", "low rank", "huge"):
            figure.canvas.draw()  # which takes longer than all the rest
    for panel in figure.axes:
        for low, high in (panel.get_xlim(), panel.get_ylim()):
            assert math.isfinite(low)
            assert math.isfinite(high)
            assert low != high
    drawn = [np.asarray(line.get_ydata(), dtype=float) for panel in figure.axes for line in panel.lines]
    assert all(np.isfinite(heights).all() for heights in drawn)


def test_spectra_of_all_kinds_share_a_picture(report, zero_report):
    for scale in SCALES:
        figure = plot_densities({"a": report, "b": zero_report, **DEGENERATE}, scale=scale)
        assert len(figure.legends[0].get_lines()) == 2 + len(DEGENERATE)


def test_reports_are_told_apart_by_color_and_in_grey(report):
    names = [f"run {number}" for number in range(6)]
    (legend,) = plot_densities(dict.fromkeys(names, report)).legends
    colors, lines = zip(*((line.get_color(), line.get_linestyle()) for line in legend.get_lines()), strict=True)
    assert colors == COLORS[:6]
    assert len(set(colors)) == 6
    assert lines[:4] == LINES


def test_a_loaded_report_has_the_same_picture(report, tmp_path):
    report.save(tmp_path / "run.hesd.json")
    pictures = []
    for one in (report, hesd.load_report(tmp_path / "run.hesd.json")):
        canvas = one.plot().canvas
        assert isinstance(canvas, FigureCanvasAgg)
        canvas.draw()
        pictures.append(np.asarray(canvas.buffer_rgba()))
    np.testing.assert_array_equal(*pictures)


def test_what_cannot_be_drawn_is_refused(report):
    with pytest.raises(hesd.ProblemError, match="no report"):
        plot_densities({})
    for sigma in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(hesd.ProblemError, match="sigma must be positive and finite"):
            report.plot(sigma=sigma)
    for scale in ("loglog", None, ["log"]):
        with pytest.raises(hesd.ProblemError, match=r"scale is .*; wanted 'symlog', 'linear' or 'log'"):
            report.plot(scale=scale)


def test_every_name_is_drawn_as_it_is(report):
    names = ["_Net", "a$b$", "$", "_$x_1$", "a\\$b", "plain"]
    figure = plot_densities(dict.fromkeys(names, report))
    figure.canvas.draw()
    (legend,) = figure.legends
    labels = [text.get_text().split(":")[0] for text in legend.get_texts()]
    assert labels == names


def test_names_in_a_legend_cannot_break_lines_or_fail(report):
    names = ["two\nlines", "\x1b[31mred", "\ud800", "$\\frac$"]
    figure = plot_densities(dict.fromkeys(names, report))
    figure.canvas.draw()
    labels = [text.get_text().split(f": {report.hesd_type.name}")[0] for text in figure.legends[0].get_texts()]
    assert labels == [r"two\nlines", r"\x1b[31mred", r"\ud800", r"$\frac$"]


@pytest.mark.parametrize("path", ["nowhere/hesd.png", "hesd.xyz"])
def test_a_picture_that_cannot_be_written_names_the_file(report, tmp_path, path):
    with pytest.raises(hesd.ProblemError, match=rf"{path}' cannot be written: .*; give a path .*\.png, \.pdf or \.svg"):
        report.plot(tmp_path / path)
    assert list(tmp_path.iterdir()) == []


def test_what_is_not_a_mapping_of_reports_is_not_drawn(report):
    with pytest.raises(hesd.ProblemError, match="plot_densities got a Report; give reports by name"):
        plot_densities(report)
    with pytest.raises(hesd.ProblemError, match="plot_densities got a list; give reports by name"):
        plot_densities([report])
    with pytest.raises(hesd.ProblemError, match="plot_densities got a str under 'a'; give a Report"):
        plot_densities({"a": "run.hesd.json"})
