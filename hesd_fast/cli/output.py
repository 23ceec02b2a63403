"""What commands write: the folder for the results, reports and their picture."""

from __future__ import annotations

import tempfile
from pathlib import Path

import click

import hesd_fast as hesd
from hesd_fast.terminal import file_name, printable


def make_folder(out: Path) -> None:
    """Make the folder for the results and try it, before any long work."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
    except OSError as error:
        raise hesd.ProblemError(
            f"the folder {str(out)!r} cannot be made or written to: {error}; give another --out"
        ) from error


def write_reports(reports: dict[str, hesd.Report], out: Path, picture: str) -> None:
    """Write a file for each report and one picture of all, and say where they are."""
    paths = []
    for name, report in reports.items():
        paths.append(out / f"{file_name(name)}.hesd.json")
        report.save(paths[-1])
    paths.append(out / f"{picture}.png")
    hesd.plot_densities(reports, paths[-1])
    click.echo("wrote " + ", ".join(printable(path) for path in paths))
