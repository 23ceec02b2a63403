"""The command line: ``hesd demo``, ``hesd analyze``, ``hesd plan``, ``hesd compare``, ``hesd info``."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, ParamSpec

import click

import hesd_fast as hesd  # loads PyTorch when a command first uses it
from hesd_fast import choices
from hesd_fast.terminal import file_name, printable

if TYPE_CHECKING:
    from hesd_fast.operators.hessian_blocks import Groups

P = ParamSpec("P")


def _plain_errors(command: Callable[P, None]) -> Callable[P, None]:
    """Print errors raised on purpose as one message, without a traceback, and exit with status 1."""

    @wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            command(*args, **kwargs)
        except hesd.errors.HESDError as error:
            message = printable(error, keep="\n")  # the line breaks of messages are our own
            raise click.ClickException(f"{type(error).__name__}: {message}") from error

    return run


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(hesd.__version__, prog_name="hesd")
def main() -> None:
    """Hessian eigenvalue spectral densities of PyTorch models: the curvature of a network, its type, its criteria."""


def _out_option(default: str) -> Callable[[Any], Any]:
    return click.option(
        "--out",
        type=click.Path(file_okay=False, path_type=Path),
        default=default,
        show_default=True,
        help="Folder for the reports and pictures.",
    )


@main.command()
@_out_option("hesd-demo")
@click.option("--progress/--no-progress", default=True, help="Show a progress bar on a terminal.")
@_plain_errors
def demo(out: Path, progress: bool) -> None:
    """Analyse the small digit classifier that ships with the package, on its training and its test images."""
    from hesd_fast.cli.demo_problem import demo_problem

    _make_folder(out)
    reports = {}
    for split in ("train", "test"):
        click.echo(f"{split} images")
        reports[split] = hesd.analyze(demo_problem(split), progress=progress)
        click.echo(f"{reports[split]}\n")
    click.echo(f"{hesd.compare(reports)}\n")
    _write(reports, out, "demo")


def _run_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options that say how long a run is and where its vectors lie."""
    options = [
        click.option("--block-size", type=int, help="Number of probes.  [default: 4]"),
        click.option("--max-steps", type=int, help="Block Lanczos steps.  [default: 100]"),
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
    ]
    for option in reversed(options):
        command = option(command)
    return command


@main.command()
@click.argument("target")
@_out_option("hesd-report")
@_run_options
@click.option(
    "--operator",
    type=click.Choice(choices.OPERATORS),
    default="hessian",
    show_default=True,
    help="The matrix whose spectrum is wanted.",
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
@click.option("--progress/--no-progress", default=True, help="Show a progress bar on a terminal.")
@_plain_errors
def analyze(
    target: str,
    out: Path,
    block_size: int | None,
    max_steps: int | None,
    reorthogonalization: str | None,
    protocol: str | None,
    basis: str,
    basis_dtype: str,
    operator: str,
    hvp: str,
    groups: str | None,
    named: tuple[str, ...],
    seed: int,
    progress: bool,
) -> None:
    """Analyse the problem that a function returns.

    TARGET is `module:function` or `path/to/file.py:function`; the function takes no arguments and returns a
    hesd_fast.Problem. Writes report.hesd.json and report.png into the folder given by --out; with groups, one
    GROUP.hesd.json for each, and groups.png.
    """
    chosen = _groups(groups, named)
    problem = _load_problem(target)
    _make_folder(out)
    options: dict[str, Any] = {
        "block_size": "auto" if block_size is None else block_size,
        "max_steps": max_steps,
        "reorthogonalization": reorthogonalization,
        "protocol": protocol,
        "basis": basis,
        "basis_dtype": basis_dtype,
        "hvp": hvp,
        "seed": seed,
        "progress": progress,
    }
    if chosen is None:
        report = hesd.analyze(problem, operator=operator, **options)
        click.echo(f"{report}\n")
        _write({"report": report}, out, "report")
        return
    if operator != "hessian":
        raise hesd.ProblemError(f"--operator {operator} has no groups; leave out --groups and --group, or --operator")
    reports = hesd.analyze_groups(problem, groups=chosen, **options)
    click.echo(f"{hesd.summary(reports)}\n")
    _write(reports, out, "groups")


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


@main.command()
@click.argument("target")
@_run_options
@_plain_errors
def plan(target: str, **options: Any) -> None:
    """Predict what `hesd analyze TARGET` with the same options would take.

    Tries the ways to make products on the first batch, for about a twentieth of the predicted run.
    """
    if options["block_size"] is None:
        options["block_size"] = "auto"
    click.echo(str(hesd.plan(_load_problem(target), **options)))


@main.command()
@click.argument("reports", nargs=-1, required=True, type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option(
    "--weights-may-differ", is_flag=True, help="Compare checkpoints of one network, not data sets under one checkpoint."
)
@_plain_errors
def compare(reports: tuple[Path, ...], weights_may_differ: bool) -> None:
    """Compare saved reports by the unified methodology; the first is the reference.

    All must be of the same network, weights, parameters, mode and precision; what differs is the data.
    """
    names = [str(path) for path in reports]
    if len(set(names)) < len(names):
        names = [f"{number}. {name}" for number, name in enumerate(names, start=1)]
    loaded = [hesd.load_report(path) for path in reports]
    click.echo(hesd.compare(dict(zip(names, loaded, strict=True)), weights_may_differ=weights_may_differ))


@main.command()
@_plain_errors
def info() -> None:
    """Show what this build holds."""
    for name, value in hesd.build_info().items():
        click.echo(f"{name:<24}{', '.join(value) if isinstance(value, list) else value}")


def _make_folder(out: Path) -> None:
    """Make the folder for the results and try it, before any long work."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
    except OSError as error:
        raise hesd.ProblemError(
            f"the folder {str(out)!r} cannot be made or written to: {error}; give another --out"
        ) from error


def _write(reports: dict[str, hesd.Report], out: Path, picture: str) -> None:
    paths = []
    for name, report in reports.items():
        paths.append(out / f"{file_name(name)}.hesd.json")
        report.save(paths[-1])
    paths.append(out / f"{picture}.png")
    hesd.plot_densities(reports, paths[-1])
    click.echo("wrote " + ", ".join(printable(path) for path in paths))


def _load_problem(target: str) -> hesd.Problem:
    where, colon, name = target.rpartition(":")
    if not colon or not where or not name.isidentifier():
        raise hesd.ProblemError(
            f"the target is {target!r}; wanted module:function or file.py:function, "
            "the function returning a hesd_fast.Problem"
        )
    if where.endswith(".py"):
        with _importable(Path(where).parent.resolve()):
            return _call_target(target, getattr(_load_file(Path(where)), name, None))
    sys.path.insert(0, str(Path.cwd()))
    return _call_target(target, getattr(_load_module(where), name, None))


def _call_target(target: str, function: Any) -> hesd.Problem:
    if not callable(function):
        where, _, name = target.rpartition(":")
        raise hesd.ProblemError(f"{where!r} has no function {name!r}; wanted one that returns a hesd_fast.Problem")
    _check_takes_nothing(target, function)
    problem = function()
    if not isinstance(problem, hesd.Problem):
        raise hesd.ProblemError(
            f"{target} returned a {type(problem).__name__}; wanted a hesd_fast.Problem, "
            "as in Problem(model, loss, data)"
        )
    return problem


@contextmanager
def _importable(folder: Path) -> Iterator[None]:
    """Let modules be imported from a folder first."""
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        if str(folder) in sys.path:  # the file may have tidied up itself
            sys.path.remove(str(folder))


def _load_module(where: str) -> ModuleType:
    try:
        return importlib.import_module(where)
    except ModuleNotFoundError as error:
        if error.name is not None and not where.startswith(error.name):
            raise  # the module exists; something that it imports does not
        raise hesd.ProblemError(
            f"there is no module {where!r} here or among the installed packages; "
            "run in its folder, or give file.py:function"
        ) from error


def _load_file(path: Path) -> ModuleType:
    """Run a Python file as a module whose name cannot be that of another, so that json.py is not taken for json."""
    if not path.is_file():
        raise hesd.ProblemError(f"there is no file {str(path)!r}; give the path of a Python file, or a module name")
    spec = importlib.util.spec_from_file_location(f"_hesd_target_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise hesd.ProblemError(f"{str(path)!r} cannot be loaded as a Python file; give one that ends in .py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and pickle look their module up there
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[spec.name]
        raise
    return module


def _check_takes_nothing(target: str, function: Callable[..., Any]) -> None:
    try:
        signature = inspect.signature(function)
    except ValueError:  # some functions written in C have none to look at
        return
    try:
        signature.bind()
    except TypeError as error:
        raise hesd.ProblemError(
            f"{target} cannot be called without arguments: {error}; wanted a function that takes none and returns a "
            "hesd_fast.Problem"
        ) from error
