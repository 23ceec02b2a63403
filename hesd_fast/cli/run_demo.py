"""``hesd demo``."""

from __future__ import annotations

from pathlib import Path

import click

import hesd_fast as hesd
from hesd_fast.cli.options import out_option, progress_option
from hesd_fast.cli.output import make_folder, write_reports


@click.command("demo")
@out_option("hesd-demo")
@progress_option
def run_demo(out: Path, progress: bool) -> None:
    """Analyse the small digit classifier that ships with the package, on its training and its test images."""
    from hesd_fast.cli.demo_problem import demo_problem  # loads PyTorch

    make_folder(out)
    reports = {}
    for split in ("train", "test"):
        click.echo(f"{split} images")
        reports[split] = hesd.analyze(demo_problem(split), progress=progress)
        click.echo(f"{reports[split]}\n")
    click.echo(f"{hesd.compare(reports)}\n")
    write_reports(reports, out, "demo")
