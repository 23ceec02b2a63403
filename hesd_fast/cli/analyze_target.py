"""``hesd analyze``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

import hesd_fast as hesd
from hesd_fast import choices
from hesd_fast.cli.options import out_option, progress_option, run_options, tolerance_option
from hesd_fast.cli.output import make_folder, write_reports
from hesd_fast.cli.targets import load_problem

if TYPE_CHECKING:
    from hesd_fast.operators.hessian_blocks import Groups


@click.command("analyze")
@click.argument("target")
@out_option("hesd-report")
@run_options
@tolerance_option
@click.option(
    "--operator",
    type=click.Choice(choices.OPERATORS),
    default="hessian",
    show_default=True,
    help="The curvature matrix to analyse.",
)
@click.option(
    "--hvp",
    type=click.Choice(["auto", *choices.STRATEGIES]),
    default="auto",
    show_default=True,
    help="How products are made: the fastest exact way, found by trying, or the one named.",
)
@click.option(
    "--groups",
    "grouping",
    type=click.Choice(choices.GROUPINGS),
    help="One spectrum for each module's own parameters, or for each parameter, of the Hessian's diagonal blocks.",
)
@click.option(
    "--group",
    "named",
    multiple=True,
    metavar="NAME=REGEX",
    help="The same for a group of parameters: those whose whole name matches. May be given several times.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Chooses the probes.")
@progress_option
def analyze_target(
    target: str, out: Path, operator: str, grouping: str | None, named: tuple[str, ...], **options: Any
) -> None:
    """Analyse the problem that a function returns.

    TARGET is `module:function` or `path/to/file.py:function`; the function takes no arguments and returns a
    hesd_fast.Problem. Writes report.hesd.json and report.png into the folder given by --out; with groups, one
    GROUP.hesd.json for each, and groups.png.
    """
    groups = _groups(grouping, named)
    problem = load_problem(target)
    make_folder(out)
    if groups is None:
        report = hesd.analyze(problem, operator=operator, **options)
        click.echo(f"{report}\n")
        write_reports({"report": report}, out, "report")
        return
    if operator != "hessian":
        raise hesd.ProblemError(f"--operator {operator} has no groups; leave out --groups and --group, or --operator")
    reports = hesd.analyze_groups(problem, groups=groups, **options)
    click.echo(f"{hesd.summary(reports)}\n")
    write_reports(reports, out, "groups")


def _groups(grouping: str | None, named: tuple[str, ...]) -> Groups | None:
    """Return the groups that the options ask for, or None."""
    if not named:
        return grouping
    if grouping is not None:
        raise hesd.ProblemError(f"--groups {grouping} and --group were given; give one of them")
    chosen = {}
    for text in named:
        name, equals, selection = text.partition("=")
        if not equals or not name:
            raise hesd.ProblemError(f"--group is {text!r}; wanted NAME=REGEX")
        if name in chosen:
            raise hesd.ProblemError(f"--group {name!r} was given twice; call them by different names")
        chosen[name] = selection
    return chosen
