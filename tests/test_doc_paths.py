"""What the pages name is there: files of the repository, pages that they link to, and headings of those."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
FOLDERS = r"(?:hesd_fast|csrc|tests|bench|docs|examples)/[\w./-]*"


def anchors_of(page: str) -> set[str]:
    """Return the anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```$", "", page, flags=re.M | re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def leads_somewhere(link: str, page: str, folder: Path) -> bool:
    """Whether a link of a page in this folder is to an address, or to a file and a heading that are there."""
    path, _, anchor = link.partition("#")
    if link.startswith("https://"):
        return True
    if path and not (folder / path).exists():
        return False
    return not anchor or anchor in anchors_of((folder / path).read_text(encoding="utf-8") if path else page)


def missing(page: str, folder: Path) -> list[str]:
    """Return the files and headings that a page in this folder names and that are not there."""
    paths = re.findall(rf"(?<![\w/.-]){FOLDERS}", page)
    links = re.findall(r"\]\(([^)\s]+)\)", page)
    return [
        *(path for path in paths if not (ROOT / path.rstrip(".")).exists()),
        *(link for link in links if not leads_somewhere(link, page, folder)),
    ]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_and_headings_that_pages_name_are_there(page):
    assert not missing(page.read_text(encoding="utf-8"), page.parent)


def test_what_is_not_there_is_noticed():
    page = (
        "# Good\n\n`docs/criteria.md` `hesd_fast/no_such.py::test`, "
        "[a](criteria.md#type) [b](cuda.md#none) [c](#good) [d](x.md)."
    )
    assert missing(page, ROOT / "docs") == ["hesd_fast/no_such.py", "cuda.md#none", "x.md"]
