"""The command line: ``hesd demo``, ``hesd analyze``, ``hesd plan``, ``hesd compare``, ``hesd info``."""

from __future__ import annotations

from typing import Any

import click

import hesd_fast as hesd  # loads PyTorch when a command first uses it
from hesd_fast.cli.analyze_target import analyze_target
from hesd_fast.cli.compare_reports import compare_reports
from hesd_fast.cli.plan_target import plan_target
from hesd_fast.cli.run_demo import run_demo
from hesd_fast.cli.show_info import show_info
from hesd_fast.errors import HESDError
from hesd_fast.terminal import printable


class _PlainErrors(click.Group):
    """Prints errors raised on purpose as one message, without a traceback, and exits with status 1."""

    def invoke(self, context: click.Context) -> Any:
        try:
            return super().invoke(context)
        except HESDError as error:
            message = printable(error, keep="\n")  # the line breaks of messages are our own
            raise click.ClickException(f"{type(error).__name__}: {message}") from error


@click.group(cls=_PlainErrors, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(hesd.__version__, prog_name="hesd")
def main() -> None:
    """Hessian eigenvalue spectral densities of PyTorch models: the curvature of a network, its type, its criteria."""


for command in (run_demo, analyze_target, plan_target, compare_reports, show_info):
    main.add_command(command)
