"""``hesd plan``."""

from __future__ import annotations

from typing import Any

import click

import hesd_fast as hesd
from hesd_fast.cli.options import run_options
from hesd_fast.cli.targets import load_problem


@click.command("plan")
@click.argument("target")
@run_options
def plan_target(target: str, **options: Any) -> None:
    """Predict what `hesd analyze TARGET` with the same options would take.

    Tries the ways to make products on the first batch, for about a twentieth of the predicted run.
    """
    click.echo(str(hesd.plan(load_problem(target), **options)))
