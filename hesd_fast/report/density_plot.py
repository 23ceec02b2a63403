"""Pictures of spectra: the density of the bulk, outliers, and the distribution function with its band."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias, runtime_checkable

import numpy as np

from hesd_fast.choices import is_one_of
from hesd_fast.errors import ProblemError
from hesd_fast.lanczos.block_tridiagonal import Array
from hesd_fast.methodology.assessment import TypedReport
from hesd_fast.methodology.comparability import check_reports
from hesd_fast.report.eigenvalue_axis import SCALES, EigenvalueAxis, axes_of
from hesd_fast.spectrum.outliers import Outliers
from hesd_fast.spectrum.smoothing import BROADEST, Atoms, atoms_of, smoothed_density
from hesd_fast.spectrum.spectral_measure import SpectralMeasure
from hesd_fast.terminal import printable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Scale: TypeAlias = Literal["symlog", "linear", "log"]

GRID_POINTS = 2001
PIXELS = 400
"""Widths of the narrowest Gaussian in the length of an axis: less could not be seen."""

BAND_POINTS = 128
"""Places where the distribution function is bounded."""

STEEPEST, BESIDE = 12, 10.0
"""Nodes of largest magnitude and of largest weight that have a bound on either side, so many residual norms away."""

DECADES = 8.0
"""How far below its peak a density is drawn at most."""

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Okabe and Ito's colours, which colour-blind readers can tell apart."""

MARKED: dict[str, Any] = {"linewidth": 1.3, "markersize": 4.5, "markerfacecolor": "white"}

LineStyle: TypeAlias = Literal["-", "--", "-.", ":"]
LINES: tuple[LineStyle, ...] = ("-", "--", "-.", ":")
TINY = 1e-300
"""Where what is filled or stands on a logarithmic axis begins."""

MARKERS = ("o", "s", "^", "D", "v")
"""Lines and markers tell reports apart in grey."""


@runtime_checkable
class DensityReport(TypedReport, Protocol):
    """What `plot_densities` needs of a report."""

    @property
    def measure(self) -> SpectralMeasure:
        """The measure that is drawn."""


def plot_densities(
    reports: Mapping[str, DensityReport | SpectralMeasure],
    path: str | os.PathLike[str] | None = None,
    *,
    scale: Scale = "symlog",
    sigma: float | None = None,
) -> Figure:
    r"""Draw the spectra of one or several reports over each other: density and outliers above, distribution below.

    The upper panel has the smoothed density of the bulk, and a stem for each outlier (see `SpectralMeasure.outliers`
    for which these are) with a bar for its interval, as high as the peak that one eigenvalue's share would have. The
    lower one has the distribution function: the line is that of the quadrature, the band around it holds that of the
    run's probes for certain, also between the points where it was computed (`SpectralMeasure.cdf_bounds`).

    Parameters
    ----------
    reports : mapping of str to Report or SpectralMeasure
        What to draw, by the name in the legend.
    path : path, optional
        File to write; its ending chooses the format.
    scale : {"symlog", "linear", "log"}
        The axis of the eigenvalues. "symlog" is logarithmic far from zero on both sides and linear around it, "log" has
        a panel for each sign, against the magnitude, and the share of eigenvalues farther from zero below it. Densities
        are per unit of the axis: per decade but for "linear".
    sigma : float, optional
        Standard deviation of the smoothing Gaussian, in units of the axis: eigenvalues where it is linear, otherwise
        decades. By default each node has a width of its own, tied to the distance of its neighbours on the axis; see
        `smoothing.Atoms.widths`.

    Returns
    -------
    matplotlib.figure.Figure
        The figure. Costs about 180 symmetric eigenproblems of order ``m + 1`` for each probe.

    Raises
    ------
    ProblemError
        If there is no report, something else was given, ``scale`` is none of these, ``sigma`` is not positive, or the
        file cannot be written.

    Examples
    --------
    >>> import hesd_fast as hesd, torch
    >>> problem = hesd.Problem(torch.nn.Linear(2, 1), lambda m, b: m(b).square().mean(), torch.eye(2))
    >>> figure = hesd.plot_densities({"linear": hesd.analyze(problem, progress=False)})
    >>> [axes.get_ylabel() for axes in figure.axes]
    ['share of eigenvalues\nper decade', 'share of eigenvalues\nbelow']
    """
    _check(reports, scale, sigma)
    spectra = [Spectrum.of(name, report, number) for number, (name, report) in enumerate(reports.items())]
    figure = _figure(spectra, scale, sigma)
    if path is not None:
        try:
            figure.savefig(path, dpi=150)
        except (OSError, ValueError) as error:
            raise ProblemError(
                f"the picture {os.fspath(path)!r} cannot be written: {error}; "
                "give a path in a writable folder that ends in .png, .pdf or .svg"
            ) from error
    return figure


def _check(reports: Mapping[str, DensityReport | SpectralMeasure], scale: str, sigma: float | None) -> None:
    """Raise a ProblemError for what cannot be drawn."""
    check_reports(reports, "plot_densities", (DensityReport, SpectralMeasure))
    if not reports:
        raise ProblemError("there is no report to draw; give at least one")
    if not is_one_of(scale, SCALES):
        raise ProblemError(f"scale is {scale!r}; wanted {', '.join(map(repr, SCALES[:-1]))} or {SCALES[-1]!r}")
    if sigma is not None and not (sigma > 0.0 and math.isfinite(sigma)):
        raise ProblemError(f"sigma must be positive and finite, got {sigma!r}; pass a width in units of the axis")


@dataclass(frozen=True, eq=False)
class Spectrum:
    """What is drawn of one report, and how it looks.

    Attributes
    ----------
    label : str
        Its text in the legend.
    measure : SpectralMeasure
        The measure.
    outliers : Outliers
        What is drawn as stems.
    atoms, bulk : Atoms
        All nodes, and those that are no outliers.
    color, line, marker : str
        How it is drawn.
    """

    label: str
    measure: SpectralMeasure
    outliers: Outliers
    atoms: Atoms
    bulk: Atoms
    color: str
    line: LineStyle
    marker: str

    @classmethod
    def of(cls, name: str, report: DensityReport | SpectralMeasure, number: int) -> Spectrum:
        """Return what is drawn of the report of that number."""
        facts = []
        if isinstance(report, SpectralMeasure):
            measure = report
        else:
            measure, found = report.measure, report.criteria
            facts = [report.hesd_type.name, f"r_e = {found.r_e:.3g}", f"k_mass = {found.k_mass:.3g}"]
        outliers = measure.outliers
        if outliers.all:
            facts.append(f"outliers: {outliers}")
        atoms = atoms_of(measure.nodes, measure.weights, [run.ritz for run in measure.runs])
        low, high = outliers.ends_of_bulk
        return cls(
            label=printable(name) + (f": {', '.join(facts)}" if facts else ""),
            measure=measure,
            outliers=outliers,
            atoms=atoms,
            bulk=atoms.where((atoms.places >= low) & (atoms.places <= high)),
            color=COLORS[number % len(COLORS)],
            line=LINES[number % len(LINES)],
            marker=MARKERS[number % len(MARKERS)],
        )


def _figure(spectra: Sequence[Spectrum], scale: Scale, sigma: float | None) -> Figure:
    """Return the figure: a column of two panels for each axis."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    axes = axes_of([spectrum.atoms for spectrum in spectra], scale)
    figure = Figure(figsize=(8.0, 5.6 + 0.2 * len(spectra)), layout="constrained")
    FigureCanvasAgg(figure)
    sizes = {"height_ratios": (3, 2), "width_ratios": [axis.length for axis in axes]}
    panels = figure.subplots(2, len(axes), squeeze=False, sharex="col", sharey="row", gridspec_kw=sizes)
    broad = sigma or BROADEST * max(axis.length for axis in axes)
    heights: list[float] = []
    for axis, (upper, lower) in zip(axes, panels.T, strict=True):
        axis.set_up(lower)
        for spectrum in spectra:
            heights += _draw_bulk(upper, spectrum, axis, sigma)
            heights += _draw_outliers(upper, spectrum, axis, broad)
            _draw_hiding_places(upper, spectrum, axis)
            _draw_distribution(lower, spectrum, axis)
    _set_up_heights(panels, heights, spectra, scale)
    _add_legend(figure, spectra)
    return figure


def _draw_bulk(panel: Axes, spectrum: Spectrum, axis: EigenvalueAxis, sigma: float | None) -> list[float]:
    """Draw the density of what is not an outlier, and return its highest and its lowest peak."""
    atoms = axis.atoms(spectrum.bulk)
    if atoms is None:
        return []
    narrowest = axis.length / PIXELS
    widths = np.maximum(atoms.widths(), narrowest) if sigma is None else np.full(atoms.places.size, sigma)
    grid = np.union1d(np.linspace(axis.low, axis.high, GRID_POINTS), atoms.places)
    density = smoothed_density(grid, atoms, widths)
    places = axis.eigenvalue(grid)
    panel.fill_between(places, density, TINY, color=spectrum.color, alpha=0.15, linewidth=0)
    panel.plot(places, density, color=spectrum.color, linestyle=spectrum.line, linewidth=1.3)
    at_atoms = smoothed_density(atoms.places, atoms, widths)
    return [float(density.max()), float(at_atoms.min())]


def _draw_outliers(panel: Axes, spectrum: Spectrum, axis: EigenvalueAxis, width: float) -> list[float]:
    """Draw a stem for each outlier, as high as the peak that one eigenvalue's share would have."""
    shown = [one if axis.sign > 0 else -one for one in spectrum.outliers.all]
    shown = [one for one in shown if axis.scale != "log" or one.value >= axis.center]
    if not shown:
        return []
    height = 1.0 / ((spectrum.measure.size or 1) * math.sqrt(2.0 * math.pi) * width)
    values = np.array([one.value for one in shown])
    panel.vlines(values, TINY, height, color=spectrum.color, linestyle=spectrum.line, linewidth=1.0)
    panel.errorbar(
        values,
        np.full(values.size, height),
        xerr=[[one.value - one.low for one in shown], [one.high - one.value for one in shown]],
        fmt=spectrum.marker,
        color=spectrum.color,
        capsize=3.0,
        **MARKED,
    )
    return [height]


def _draw_hiding_places(panel: Axes, spectrum: Spectrum, axis: EigenvalueAxis) -> None:
    """Shade where an eigenvalue may lie beyond the extreme nodes, up to the end of the axis."""
    first, last = axis.eigenvalue(np.array([axis.low, axis.high]))
    lowest, highest = spectrum.measure.lambda_min, spectrum.measure.lambda_max
    for place, bound in ((lowest.value, lowest.low), (highest.value, highest.high)):
        low, high = np.clip(sorted((axis.sign * place, axis.sign * bound)), first, last)
        from_, to = axis.coordinate(np.array([low, high]))
        if to - from_ > axis.length / PIXELS:
            panel.axvspan(low, high, color=spectrum.color, alpha=0.12, linewidth=0)


def _draw_distribution(panel: Axes, spectrum: Spectrum, axis: EigenvalueAxis) -> None:
    """Draw the quadrature's distribution function and its band; on a logarithmic axis what is farther from zero."""
    first, last = axis.eigenvalue(np.array([axis.low, axis.high]))
    steps = axis.sign * spectrum.atoms.places
    steps = np.unique(np.concatenate(([first], steps[(steps > first) & (steps < last)], [last])))
    points = _points_of_band(spectrum, axis, steps)
    low, high = spectrum.measure.cdf_bounds(axis.sign * points)
    line = spectrum.measure.cdf(axis.sign * steps)
    falls = axis.scale == "log"
    if falls and axis.sign > 0:
        low, high, line = 1.0 - high, 1.0 - low, 1.0 - line
    # the function is monotone, so between two points it is above the lower one's bound and below the upper one's
    left, right = slice(None, -1), slice(1, None)
    low, high = np.repeat(low[right if falls else left], 2), np.repeat(high[left if falls else right], 2)
    panel.fill_between(np.repeat(points, 2)[1:-1], low, high, color=spectrum.color, alpha=0.25, linewidth=0)
    drawn = "steps-post" if axis.sign > 0 else "steps-pre"
    panel.plot(steps, line, drawstyle=drawn, color=spectrum.color, linestyle=spectrum.line, linewidth=1.3)


def _points_of_band(spectrum: Spectrum, axis: EigenvalueAxis, steps: Array) -> Array:
    """Return where the distribution function is bounded: evenly, among the nodes, and beside steep steps."""
    coordinates = np.quantile(axis.coordinate(steps), np.linspace(0.0, 1.0, BAND_POINTS // 2))
    even = np.linspace(axis.low, axis.high, BAND_POINTS // 2)
    atoms = spectrum.atoms
    steepest = np.union1d(np.argsort(-np.abs(atoms.places))[:STEEPEST], np.argsort(-atoms.weights)[:STEEPEST])
    errors = BESIDE * atoms.errors[steepest]
    beside = axis.sign * np.concatenate((atoms.places[steepest] - errors, atoms.places[steepest] + errors))
    points = np.concatenate((axis.eigenvalue(np.append(coordinates, even)), beside))
    return np.unique(np.clip(points, steps[0], steps[-1]))


def _set_up_heights(panels: Any, heights: list[float], spectra: Sequence[Spectrum], scale: Scale) -> None:
    """Give scales, ends and labels to the vertical axes."""
    highest, lowest = (max(heights), min(heights)) if heights else (1.0, 1.0)
    panels[0, 0].set_ylim(max(min(0.3 * lowest, 0.01 * highest), highest * 10.0**-DECADES), 3.0 * highest)
    for panel in panels[0]:
        panel.set_yscale("log")
        if scale != "log":
            panel.axvline(0.0, color="0.6", linewidth=0.6, zorder=0)
        if not heights:
            panel.text(0.5, 0.5, "no eigenvalue exceeds the noise", ha="center", transform=panel.transAxes)
    panels[0, 0].set_ylabel("share of eigenvalues\nper " + ("unit" if scale == "linear" else "decade"))
    panels[1, 0].set_ylabel("share of eigenvalues\n" + ("farther from zero" if scale == "log" else "below"))
    if scale == "log":
        smallest = min(1.0 / (spectrum.measure.size or 1e4) for spectrum in spectra)
        panels[1, 0].set_ylim(0.1 * smallest, 1.5)
        for panel in panels[1]:
            panel.set_yscale("log")
    else:
        panels[1, 0].set_ylim(-0.02, 1.02)


def _add_legend(figure: Figure, spectra: Sequence[Spectrum]) -> None:
    """Name the line and the marker of each report."""
    from matplotlib.lines import Line2D

    lines = [
        Line2D([], [], color=one.color, linestyle=one.line, marker=one.marker if one.outliers.all else "", **MARKED)
        for one in spectra
    ]
    numbers = [str(number) for number in range(len(lines))]
    legend = figure.legend(lines, numbers, loc="outside upper left", fontsize="small", frameon=False, handlelength=3.0)
    for text, spectrum in zip(legend.get_texts(), spectra, strict=True):
        text.set_text(spectrum.label)  # given to legend(), a name with an underscore in front would be dropped
        text.set_parse_math(False)  # or dollar signs would be taken for those around a formula
        text.set_usetex(False)
