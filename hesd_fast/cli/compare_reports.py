"""``hesd compare``."""

from __future__ import annotations

from pathlib import Path

import click

import hesd_fast as hesd


@click.command("compare")
@click.argument("reports", nargs=-1, required=True, type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option(
    "--weights-may-differ", is_flag=True, help="Compare checkpoints of one network, not data sets under one checkpoint."
)
def compare_reports(reports: tuple[Path, ...], weights_may_differ: bool) -> None:
    """Compare saved reports by the unified methodology; the first is the reference.

    All must be of the same network, weights, parameters, mode and precision; what differs is the data.
    """
    names = [str(path) for path in reports]
    if len(set(names)) < len(names):
        names = [f"{number}. {name}" for number, name in enumerate(names, start=1)]
    loaded = [hesd.load_report(path) for path in reports]
    click.echo(hesd.compare(dict(zip(names, loaded, strict=True)), weights_may_differ=weights_may_differ))
