"""The page of messages is true: its examples run and say what stands under them, and its tables quote the source."""

from __future__ import annotations

import ast
import contextlib
import io
import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import hesd_fast
from hesd_fast.errors import HESDError, HESDWarning

PAGE = Path(__file__).parent.parent / "docs" / "what-can-go-wrong.md"

LEFT_OUT = "…"
"""What stands for anything in a quotation."""

QUOTING = ("message", "detail")
"""Heads of the columns that quote what is said."""


@dataclass(frozen=True)
class Example:
    """Lines of Python on a page, with the line that they begin in, and the text that stands under them, or none."""

    line: int
    code: str
    told: str

    def run(self, names: dict[str, Any]) -> str:
        """Return what is printed, then warnings, then the error of ours that ends it."""
        printed, error = io.StringIO(), ""
        code = compile("\n" * (self.line - 1) + self.code, str(PAGE), "exec")  # the lines of the page, for tracebacks
        with contextlib.redirect_stdout(printed), warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("ignore")
            warnings.simplefilter("always", HESDWarning)
            try:
                exec(code, names)
            except HESDError as raised:
                error = f"{type(raised).__name__}: {raised}"
        return "\n".join([printed.getvalue(), *(f"HESDWarning: {one.message}" for one in caught), error]).strip()


def sections_of(page: str) -> dict[str, list[Example]]:
    """Return the examples under each heading of the second order, and under "" those before."""
    sections: dict[str, list[Example]] = {"": []}
    heading = re.compile(
        r"^## (?P<title>[^\n]*)$|^```python\n(?P<code>.*?)^```$(?:\n\n```text\n(?P<told>.*?)^```$)?", re.M | re.S
    )
    title = ""
    for match in heading.finditer(page):
        if match["code"] is None:
            title = match["title"]
            sections[title] = []
        else:
            line = page.count("\n", 0, match.start("code")) + 1
            sections[title].append(Example(line, match["code"], match["told"] or ""))
    return sections


def pattern_of(quoted: str) -> str:
    """Return a regular expression for a quotation, in which spaces and the ends of lines are the same."""
    parts = [r"\s+".join(map(re.escape, part.split())) for part in re.split(rf"\s*{LEFT_OUT}\s*", quoted.strip())]
    return ".*?".join(parts)


SECTIONS = sections_of(PAGE.read_text(encoding="utf-8"))


@pytest.mark.parametrize("title", [title for title, examples in SECTIONS.items() if title and examples])
def test_examples_say_what_stands_under_them_and_others_say_nothing(title, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for example in [*SECTIONS[""], *SECTIONS[title]]:
        said = example.run(names)
        if example.told:
            assert re.match(pattern_of(example.told), said, re.DOTALL), f"line {example.line}: {said}"
        else:
            assert not said, f"line {example.line}: {said}"


def texts_of_sources() -> str:
    """Return all texts of the package's sources, a line each, with something left out where they have a value."""
    found = []
    for source in sorted(Path(hesd_fast.__file__).parent.rglob("*.py")):
        for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = [part.value if isinstance(part, ast.Constant) else LEFT_OUT for part in node.values]
                found.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return "\n".join(text.replace("\n", " ") for text in found)


def quotations_of(page: str) -> list[str]:
    """Return what the tables quote: the code in the first cell of each row."""
    found, quotes = [], False
    for line in page.splitlines():
        first = line[2:].partition(" | ")[0].strip() if line.startswith("| ") else None
        if first is None or first in QUOTING:
            quotes = first is not None
        elif quotes:
            found += re.findall(r"`([^`]+)`", first)
    return found


QUOTATIONS = quotations_of(PAGE.read_text(encoding="utf-8"))


def test_tables_quote_the_source():
    texts = texts_of_sources()
    unknown = [quoted for quoted in QUOTATIONS if not re.search(pattern_of(quoted), texts)]
    assert not unknown
    assert len(QUOTATIONS) > 60


def test_wrong_quotations_and_examples_are_noticed():
    page = (
        "```python\nimport hesd_fast\n```\n\n## One\n\n"
        "```python\nhesd_fast.plan(1)\n```\n\n```text\nProblemError: …\n```"
    )
    sections = sections_of(page)
    names: dict[str, Any] = {}
    assert [example.line for examples in sections.values() for example in examples] == [2, 8]
    assert sections[""][0].run(names) == ""
    said = sections["One"][0].run(names)
    assert said == "ProblemError: plan got int; give a Problem, as in Problem(model, loss, data)"
    assert re.match(pattern_of(sections["One"][0].told), said)
    assert not re.match(pattern_of("ProblemError: plan got … numbers"), said)
    assert quotations_of("| message | remedy |\n| --- | --- |\n| `one …` `two` | `three` |\n\n| a |\n| `b` |") == [
        "one …",
        "two",
    ]
