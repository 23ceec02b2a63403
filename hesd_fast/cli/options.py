"""Options that several commands have."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from hesd_fast import choices

Decorator = Callable[[Any], Any]


def out_option(default: str) -> Decorator:
    """Return the option that names the folder for the results."""
    return click.option(
        "--out",
        type=click.Path(file_okay=False, path_type=Path),
        default=default,
        show_default=True,
        help="Folder for the reports and pictures.",
    )


progress_option: Decorator = click.option(
    "--progress/--no-progress", default=True, help="Show a progress bar on a terminal."
)


def tolerance_of(_context: click.Context, _option: click.Parameter, value: str) -> Any:
    """Return what ``hesd.analyze`` takes for ``0.02``, ``r_e=0.01,k_mass=0.05``, ``auto`` or ``none``."""
    if value in ("auto", "none"):
        return None if value == "none" else value
    try:
        if "=" not in value:
            return float(value)
        pairs = [part.split("=") for part in value.split(",")]
        wanted = {name.strip(): float(width) for name, width in pairs}
        if len(wanted) < len(pairs):
            raise ValueError("a name was given twice")
        return wanted
    except ValueError:
        raise click.BadParameter(
            f"{value!r} is no tolerance; wanted a number, NAME=NUMBER,NAME=NUMBER, auto or none"
        ) from None


tolerance_option: Decorator = click.option(
    "--tolerance",
    default="auto",
    show_default=True,
    callback=tolerance_of,
    help="Half the width of the intervals at which the run stops: 0.02, or r_e=0.01,k_mass=0.05; none for all steps. "
    "auto is 0.02, but in a protocol.",
)

_RUN_OPTIONS: tuple[Decorator, ...] = (
    click.option(
        "--block-size",
        type=int,
        callback=lambda _context, _option, value: "auto" if value is None else value,
        help="Number of probes.  [default: 4]",
    ),
    click.option("--max-steps", type=int, help="Block Lanczos steps, at most.  [default: 100]"),
    click.option(
        "--reorthogonalization",
        type=click.Choice(choices.REORTHOGONALIZATIONS),
        help="Against all vectors, those an estimate names, the last ten, or two blocks only.  [default: full]",
    ),
    click.option(
        "--protocol",
        type=click.Choice(choices.PROTOCOLS),
        help="A published protocol; sets the three options above.",
    ),
    click.option(
        "--basis",
        default="auto",
        show_default=True,
        help="Where the Lanczos vectors are: memory, host (of a GPU), disk, or a directory.",
    ),
    click.option(
        "--basis-dtype",
        type=click.Choice(["auto", *choices.BASIS_DTYPES]),
        default="auto",
        show_default=True,
        help="Precision that the Lanczos vectors are kept in.",
    ),
)


def run_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options that say how long a run is and where its vectors lie, as arguments of ``hesd.analyze``."""
    for option in reversed(_RUN_OPTIONS):
        command = option(command)
    return command
