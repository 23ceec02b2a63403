"""How long functions are, in Python by its syntax tree and in C++ by counting braces."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

CPP = {".cpp", ".hpp", ".cu", ".cuh"}
# Literals and comments, which may hold braces.
_UNREAD = re.compile(
    r"""R"\((?:.|\n)*?\)"|"(?:\\.|[^"\\\n])*"|'(?:\\.|[^'\\\n])'|//[^\n]*|/\*(?:.|\n)*?\*/|^[ \t]*\#(?:\\\n|[^\n])*""",
    re.MULTILINE,
)
_SCOPE = re.compile(r"^(?:inline\s+)?(?:namespace|class|struct|union|enum|extern)\b")
_TEMPLATE = re.compile(r"^template\s*<(?:[^<>]|<[^<>]*>)*>\s*")
_NAME = re.compile(r"([~\w][\w:~]*)\s*\(")


class Function(NamedTuple):
    """A function, and how many lines it has from its first word to its end."""

    path: Path
    line: int
    name: str
    lines: int

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.name} has {self.lines} lines"


def long_functions(paths: Iterable[Path], limit: int) -> list[Function]:
    """Return the functions of more than `limit` lines in Python and C++ files, the longest first."""
    found = [function for path in paths for function in functions(Path(path)) if function.lines > limit]
    return sorted(found, key=lambda function: -function.lines)


def functions(path: Path) -> Iterator[Function]:
    """Return every function of a file. Functions in a C++ function count as lines of it; in Python, as ones as well."""
    text = path.read_text(encoding="utf-8")
    return _cpp_functions(path, text) if path.suffix in CPP else _python_functions(path, text)


def _python_functions(path: Path, text: str) -> Iterator[Function]:
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            yield Function(path, node.lineno, node.name, node.end_lineno - node.lineno + 1)


def _cpp_functions(path: Path, text: str) -> Iterator[Function]:
    """Of code as clang-format leaves it: the line with which a body, a namespace or a class begins ends in a brace."""
    text = _UNREAD.sub(lambda unread: "\n" * unread.group().count("\n"), text)
    scopes = 0  # namespaces and classes around a line
    depth = 0  # braces around it
    head: list[str] = []  # of the declaration that is being read
    first = 0
    body: tuple[int, str] | None = None
    for number, line in enumerate(text.splitlines(), start=1):
        if depth == scopes and line.strip():
            first = first if head else number
            head.append(line.strip())
        declaration = _TEMPLATE.sub("", " ".join(head))
        if depth == scopes and line.endswith("{"):
            if _SCOPE.match(declaration):
                scopes += 1
            elif "(" in declaration and not declaration.endswith("= {"):
                body = (first, _name_of(declaration))
            head = []
        elif depth == scopes and line.rstrip().endswith((";", "}", ":")):
            head = []
        depth += line.count("{") - line.count("}")
        if depth < scopes:
            scopes = depth
        if depth == scopes and body is not None:
            yield Function(path, body[0], body[1], number - body[0] + 1)
            body = None
    if depth != 0:
        raise ValueError(f"{path}: {depth} braces are not closed; wanted code that balances in every branch of an #if")


def _name_of(declaration: str) -> str:
    """Return the first name in front of a parenthesis that is no macro's, or else the first one."""
    names: list[str] = _NAME.findall(declaration)
    return next((name for name in names if not name.isupper() and name != "__attribute__"), names[0])
