"""Pictures of spectral densities, on a logarithmic scale as the papers show them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from hesd_fast.errors import ProblemError
from hesd_fast.terminal import printable

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from hesd_fast.report.report import Report

GRID_POINTS = 2000
DECADES = 8.0
"""How far below its peak a density is drawn."""


def plot_densities(
    reports: Mapping[str, Report], path: str | os.PathLike[str] | None = None, *, sigma: float | None = None
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
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from hesd_fast.report.report import check_reports

    check_reports(reports, "plot_densities")
    if not reports:
        raise ProblemError("there is no report to draw; give at least one")
    low = min(report.lambda_min.value for report in reports.values())
    high = max(report.lambda_max.value for report in reports.values())
    if sigma is None:
        sigma = 0.01 * ((high - low) or abs(high) or 1.0)
    margin = 4.0 * sigma + 0.02 * (high - low)
    grid = np.linspace(low - margin, high + margin, GRID_POINTS)

    figure = Figure(figsize=(8.0, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    peak, lines, labels = 0.0, [], []
    for number, (name, report) in enumerate(reports.items()):
        density = report.measure.density(grid, sigma)
        peak = max(peak, float(density.max()))
        color = f"C{number}"
        found = report.criteria
        criteria = f"r_e = {found.r_e:.3g}, k_mass = {found.k_mass:.3g}"
        labels.append(f"{printable(name)}: {report.hesd_type.name}, {criteria}")
        lines += axes.semilogy(grid, density, color=color, linewidth=1.2)
        axes.fill_between(grid, density, peak * 1e-30, color=color, alpha=0.15, linewidth=0)
        for extreme in (report.lambda_min, report.lambda_max):
            axes.axvline(extreme.value, color=color, linewidth=0.8, linestyle=":")
    axes.axvline(0.0, color="black", linewidth=0.6)
    axes.set_ylim(peak * 10.0**-DECADES, peak * 3.0)
    axes.set_xlim(grid[0], grid[-1])
    axes.set_xlabel("eigenvalue")
    axes.set_ylabel(f"density (Gaussian of σ = {sigma:.2g})")
    numbers = [str(number) for number in range(len(lines))]
    legend = figure.legend(lines, numbers, loc="outside upper left", fontsize="small", frameon=False)
    for text, label in zip(legend.get_texts(), labels, strict=True):
        text.set_text(label)  # given to legend(), a name with an underscore in front would be dropped
        text.set_parse_math(False)  # or dollar signs would be taken for those around a formula
        text.set_usetex(False)
    if path is not None:
        try:
            figure.savefig(path, dpi=150)
        except (OSError, ValueError) as error:
            raise ProblemError(
                f"the picture {os.fspath(path)!r} cannot be written: {error}; "
                "give a path in a writable folder that ends in .png, .pdf or .svg"
            ) from error
    return figure
