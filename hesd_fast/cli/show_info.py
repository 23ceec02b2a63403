"""``hesd info``."""

from __future__ import annotations

import click

import hesd_fast as hesd


@click.command("info")
def show_info() -> None:
    """Show what this build holds."""
    for name, value in hesd.build_info().items():
        click.echo(f"{name:<24}{', '.join(value) if isinstance(value, list) else value}")
