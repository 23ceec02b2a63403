"""A target of the command line, ``module:function`` or ``file.py:function``, and the problem that it returns."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import hesd_fast as hesd


def load_problem(target: str) -> hesd.Problem:
    """Return the problem that the target's function returns."""
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
