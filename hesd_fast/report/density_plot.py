"""Pictures of spectral densities, on a logarithmic scale as the papers show them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import numpy as np

from hesd_fast.errors import ProblemError
from hesd_fast.estimate import Estimate
from hesd_fast.methodology.assessment import TypedReport
from hesd_fast.methodology.comparability import check_reports
from hesd_fast.spectrum.spectral_measure import SpectralMeasure
from hesd_fast.terminal import printable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

GRID_POINTS = 2000
DECADES = 8.0
"""How far below its peak a density is drawn."""


@runtime_checkable
class DensityReport(TypedReport, Protocol):
    """What `plot_densities` needs of a report."""

    @property
    def measure(self) -> SpectralMeasure:
        """The measure that is smoothed."""

    @property
    def lambda_max(self) -> Estimate:
        """The largest eigenvalue."""

    @property
    def lambda_min(self) -> Estimate:
        """The smallest eigenvalue."""


def plot_densities(
    reports: Mapping[str, DensityReport], path: str | os.PathLike[str] | None = None, *, sigma: float | None = None
) -> Figure:
    """Draw the smoothed densities of one or several reports over the same axis.

    Parameters
    ----------
    reports : mapping of str to Report
        What to draw, by the name in the legend.
    path : path, optional
        File to write; its ending chooses the format.
    sigma : float, optional
        Standard deviation of the smoothing Gaussian, in eigenvalue units; 1 % of the whole range by default.

    Returns
    -------
    matplotlib.figure.Figure
        The figure.

    Raises
    ------
    ProblemError
        If there is no report, something else was given, ``sigma`` is not positive, or the file cannot be written.

    Examples
    --------
    >>> import hesd_fast as hesd, torch
    >>> problem = hesd.Problem(torch.nn.Linear(2, 1), lambda m, b: m(b).square().mean(), torch.eye(2))
    >>> figure = hesd.plot_densities({"linear": hesd.analyze(problem, progress=False)})
    >>> figure.axes[0].get_xlabel()
    'eigenvalue'
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    check_reports(reports, "plot_densities", DensityReport)
    if not reports:
        raise ProblemError("there is no report to draw; give at least one")
    figure = Figure(figsize=(8.0, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    _add_legend(figure, reports, _draw(figure.add_subplot(), reports, sigma))
    if path is not None:
        try:
            figure.savefig(path, dpi=150)
        except (OSError, ValueError) as error:
            raise ProblemError(
                f"the picture {os.fspath(path)!r} cannot be written: {error}; "
                "give a path in a writable folder that ends in .png, .pdf or .svg"
            ) from error
    return figure


def _draw(axes: Axes, reports: Mapping[str, DensityReport], sigma: float | None) -> list[Line2D]:
    """Draw a density for each report and return their lines."""
    low = min(report.lambda_min.value for report in reports.values())
    high = max(report.lambda_max.value for report in reports.values())
    if sigma is None:
        sigma = 0.01 * ((high - low) or abs(high) or 1.0)
    margin = 4.0 * sigma + 0.02 * (high - low)
    grid = np.linspace(low - margin, high + margin, GRID_POINTS)
    peak, lines = 0.0, []
    for number, report in enumerate(reports.values()):
        density, color = report.measure.density(grid, sigma), f"C{number}"
        peak = max(peak, float(density.max()))
        lines += axes.semilogy(grid, density, color=color, linewidth=1.2)
        axes.fill_between(grid, density, peak * 1e-30, color=color, alpha=0.15, linewidth=0)
        for extreme in (report.lambda_min, report.lambda_max):
            axes.axvline(extreme.value, color=color, linewidth=0.8, linestyle=":")
    axes.axvline(0.0, color="black", linewidth=0.6)
    axes.set_ylim(peak * 10.0**-DECADES, peak * 3.0)
    axes.set_xlim(grid[0], grid[-1])
    axes.set_xlabel("eigenvalue")
    axes.set_ylabel(f"density (Gaussian of σ = {sigma:.2g})")
    return lines


def _add_legend(figure: Figure, reports: Mapping[str, DensityReport], lines: list[Line2D]) -> None:
    """Name each line after its report, with the type and the criteria."""
    numbers = [str(number) for number in range(len(lines))]
    legend = figure.legend(lines, numbers, loc="outside upper left", fontsize="small", frameon=False)
    for text, (name, report) in zip(legend.get_texts(), reports.items(), strict=True):
        criteria = f"r_e = {report.criteria.r_e:.3g}, k_mass = {report.criteria.k_mass:.3g}"
        label = f"{printable(name)}: {report.hesd_type.name}, {criteria}"
        text.set_text(label)  # given to legend(), a name with an underscore in front would be dropped
        text.set_parse_math(False)  # or dollar signs would be taken for those around a formula
        text.set_usetex(False)
