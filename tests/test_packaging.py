"""What a source distribution holds: whoever builds from it needs every source. And what an installation says it is."""

from __future__ import annotations

from fnmatch import fnmatch
from importlib.metadata import version
from pathlib import Path

import pytest

import hesd_fast as hesd

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("folder", ["csrc", "tests", "bench", "docs", "examples"])
def test_the_source_distribution_has_every_file(folder):
    lines = [line.split() for line in (ROOT / "MANIFEST.in").read_text(encoding="utf-8").splitlines()]
    (patterns,) = (line[2:] for line in lines if line[:2] == ["recursive-include", folder])
    hidden = ("__pycache__", ".pytest_cache", ".benchmarks")
    files = [path for path in (ROOT / folder).rglob("*") if path.is_file() and not set(path.parts) & set(hidden)]
    assert files
    assert [str(path) for path in files if not any(fnmatch(path.name, pattern) for pattern in patterns)] == []


def test_the_package_its_engine_and_its_installation_are_of_one_version():
    assert hesd.build_info()["version"] == hesd.__version__ == version("hesd-fast")
