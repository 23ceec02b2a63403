"""The package keeps to its layout: floors, names, lengths of functions, one loop, examples of all that is public."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from function_lengths import long_functions

from hesd_fast import kernels, losses, public

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "hesd_fast"
FILES = sorted(path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py"))

FLOORS = (
    "",  # the files of the root that need nothing: errors, names of options, records
    *(
        "engine",
        "problem",
        "hvp",
        "operators",
        "lanczos",
        "spectrum",
        "estimators",
        "methodology",
        "report",
        "analysis",
        "cli",
    ),
    "public",
)
"""Folders from the lowest to the highest: a file imports from its own and from those below."""

MOST_LINES_OF_PYTHON, MOST_LINES_OF_CPP = 60, 80


def floor_of(parts: tuple[str, ...]) -> int:
    """The place in FLOORS of a module that is given by its names below the package; () is the package's __init__."""
    if parts in ((), ("public",)):
        return FLOORS.index("public")
    return FLOORS.index(parts[0]) if parts[0] in FLOORS else 0


def imported_by(path: Path, source: str) -> Iterator[tuple[int, tuple[str, ...]]]:
    """Line and names below the package of everything of the package that a file imports, wherever it does so."""
    package = ("hesd_fast", *path.parts[:-1])
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            modules = [tuple(alias.name.split(".")) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            modules = [(*base, *(node.module.split(".") if node.module else ()))]
        else:
            continue
        yield from ((node.lineno, module[1:]) for module in modules if module[0] == "hesd_fast")


def wrong_imports(path: Path, source: str) -> list[str]:
    """What a file of the package imports from a floor above its own, or from the package's root, which holds all."""
    parts = path.with_suffix("").parts
    own = floor_of(() if parts == ("__init__",) else parts)
    found = []
    for line, module in imported_by(path, source):
        if not module and own < FLOORS.index("cli"):
            found.append(f"{path}:{line} imports from the root of the package; wanted the module that has it")
        elif module and floor_of(module) > own:
            found.append(f"{path}:{line} imports hesd_fast.{'.'.join(module)}, which is above {FLOORS[own] or 'it'}")
    return found


def test_files_import_from_their_own_floor_and_from_those_below():
    assert {path.parts[0] for path in FILES if len(path.parts) > 1} <= set(FLOORS)
    assert [wrong for path in FILES for wrong in wrong_imports(path, (PACKAGE / path).read_text("utf-8"))] == []


@pytest.mark.parametrize(
    ("path", "source", "wrong"),
    [
        ("lanczos/options.py", "from hesd_fast.analysis import run_plan", "imports hesd_fast.analysis, which is above"),
        ("problem/problem.py", "import hesd_fast.hvp.base", "imports hesd_fast.hvp.base, which is above problem"),
        (
            "engine/memory.py",
            "def f():\n    import torch, hesd_fast.public",
            "engine/memory.py:2 imports hesd_fast.public",
        ),
        ("hvp/base.py", "if TYPE_CHECKING:\n    from hesd_fast.operators.base import X", "hesd_fast.operators.base"),
        ("engine/memory.py", "from ..lanczos import options", "imports hesd_fast.lanczos, which is above engine"),
        ("errors.py", "from hesd_fast.engine import cuda", "imports hesd_fast.engine, which is above it"),
        ("report/report.py", "from hesd_fast import Problem", "imports from the root of the package"),
        ("records.py", "import hesd_fast as hesd", "imports from the root of the package"),
        ("cli/main.py", "import hesd_fast.public", "imports hesd_fast.public, which is above cli"),
        ("cli/main.py", "import hesd_fast as hesd\nfrom hesd_fast.analysis import run_plan", None),
        ("public.py", "from hesd_fast import errors\nfrom hesd_fast.cli import main", None),
        ("hvp/base.py", "import torch\nfrom hesd_fast.errors import X\nfrom hesd_fast.hvp.planner import Y", None),
        ("hvp/base.py", "from . import planner\nfrom ..engine import cuda", None),
    ],
)
def test_an_import_from_above_would_be_seen(path, source, wrong):
    found = wrong_imports(Path(path), source)
    assert found == [] if wrong is None else (len(found) == 1 and wrong in found[0])


def named_like_a_function(paths: Iterable[Path], functions: Iterable[str]) -> list[Path]:
    """Modules and folders with the name of an exported function, which one of the two would hide."""
    names = set(functions)
    return [path for path in paths if names & set(path.with_suffix("").parts)]


def test_no_module_has_the_name_of_an_exported_function():
    functions = [name for name in public.__all__ if inspect.isfunction(getattr(public, name))]
    assert {"analyze", "plan", "criteria"} <= set(functions)
    assert named_like_a_function(FILES, functions) == []
    planted = [Path("analysis/plan.py"), Path("criteria/values.py")]
    assert named_like_a_function([*FILES, *planted], functions) == planted


def sources(*kinds: str, folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.suffix in kinds)


def test_functions_fit_on_a_page():
    found = long_functions(sources(".py", folder=PACKAGE), MOST_LINES_OF_PYTHON)
    found += long_functions(sources(".cpp", ".hpp", ".cu", ".cuh", folder=ROOT / "csrc"), MOST_LINES_OF_CPP)
    assert [str(function) for function in found] == []


@pytest.mark.parametrize(
    ("name", "head", "line", "end", "most"),
    [
        ("planted.py", "def planted():", "    print()", "", MOST_LINES_OF_PYTHON),
        ("planted.py", "class Planted:\n    async def method(self):", "        pass", "", MOST_LINES_OF_PYTHON),
        ("planted.cpp", "namespace hesd {\nint planted() {", "    call();", "}\n}", MOST_LINES_OF_CPP),
    ],
)
def test_a_function_that_is_too_long_would_be_seen(tmp_path, name, head, line, end, most):
    of_its_own = 2 if name.endswith(".cpp") else 1  # lines of a function that are not in its body
    for more in (0, 1):
        (tmp_path / name).write_text("\n".join([head, *[line] * (most - of_its_own + more), end, ""]), "utf-8")
        assert len(long_functions([tmp_path / name], most)) == more


def calls_of(method: str, source: str) -> list[int]:
    """Lines that call a method of this name."""
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    return [call.lineno for call in calls if isinstance(call.func, ast.Attribute) and call.func.attr == method]


@pytest.mark.parametrize("method", ["take_step", "advance"])
def test_one_loop_drives_every_run(method):
    found = {path: lines for path in FILES if (lines := calls_of(method, (PACKAGE / path).read_text("utf-8")))}
    assert [len(lines) for lines in found.values()] == [1], found
    assert calls_of(method, f"while not run.finished:\n    run.{method}()\n    other.{method}()") == [2, 3]


def without_examples(names: dict[str, Any]) -> list[str]:
    """Names whose docstring has no section of examples, or one without a line that runs."""
    missing = []
    for name, value in names.items():
        _, heading, examples = inspect.cleandoc(value.__doc__ or "").partition("\nExamples\n--------\n")
        if not heading or ">>> " not in examples:
            missing.append(name)
    return missing


def functions_of(module: ModuleType) -> dict[str, Any]:
    """What a public module names in its __all__, or the functions of its own without an underscore."""
    own = [name for name, value in vars(module).items() if getattr(value, "__module__", None) == module.__name__]
    named = getattr(module, "__all__", [name for name in own if name[0] != "_"])
    return {name: value for name in named if inspect.isfunction(value := getattr(module, name))}


def test_every_public_name_shows_how_it_is_used():
    names = {name: getattr(public, name) for name in public.__all__}
    names = {name: value for name, value in names.items() if not inspect.ismodule(value)}
    names |= {
        f"{module.__name__}.{name}": f for module in (kernels, losses) for name, f in functions_of(module).items()
    }
    assert {"analyze", "hesd_fast.engine.kernels.empty_panel", "hesd_fast.problem.losses.supervised"} <= set(names)
    assert without_examples(names) == []


@pytest.mark.parametrize(
    ("docstring", "missing"),
    [
        (None, True),
        ("Return one.", True),
        ("Return one.\n\n    Examples\n    --------\n    Call it.\n    ", True),
        ("Return one.\n\n    >>> one()\n    1\n    ", True),
        ("Return one.\n\n    Examples\n    --------\n    >>> one()\n    1\n    ", False),
    ],
)
def test_a_name_without_examples_would_be_seen(docstring, missing):
    def one():
        return 1

    one.__doc__ = docstring
    assert without_examples({"one": one}) == (["one"] if missing else [])
