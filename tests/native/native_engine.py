"""Finds the engine under test: the one of ``HESD_NATIVE_ENGINE``, or the one that is installed."""

from __future__ import annotations

import importlib
import os
import sys
import types
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).resolve().parents[2] / "hesd_fast"


def load() -> Any:
    """Return the module ``hesd_fast.engine._engine``.

    With ``HESD_NATIVE_ENGINE`` both packages are bare modules, that of the engine with two folders, the named one
    first: its ``__init__``, which imports PyTorch, does not run, and the engine still finds ``hesd_fast.errors``.
    """
    folder = os.environ.get("HESD_NATIVE_ENGINE")
    if folder is not None and "hesd_fast" not in sys.modules:
        for name, folders in {"hesd_fast": [PACKAGE], "hesd_fast.engine": [folder, PACKAGE / "engine"]}.items():
            package = types.ModuleType(name)
            package.__path__ = [str(each) for each in folders]
            sys.modules[name] = package
    engine = importlib.import_module("hesd_fast.engine._engine")
    if folder is not None and Path(str(engine.__file__)).parent != Path(folder):
        raise ImportError(f"{engine.__file__} was loaded; wanted the engine in {folder}")
    return engine


def targets() -> list[str]:
    """Return the instruction sets to test."""
    return list(load().build_info()["cpu_targets_available"])
