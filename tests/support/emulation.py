"""The engine that runs the CUDA sources on the CPU (`make emulated`), beside the installed one."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from hesd_fast.engine import kernels, panels
from hesd_fast.lanczos import lanczos_run as lanczos

FOLDER = Path(__file__).resolve().parents[2] / "build" / "native" / "emulated"


@cache
def engine() -> Any:
    """Load it under a name of its own; all its panels go through the emulated kernels."""
    found = [FOLDER / f"_engine{suffix}" for suffix in importlib.machinery.EXTENSION_SUFFIXES]
    path = next((path for path in found if path.exists()), None)
    if path is None:
        pytest.fail(f"no emulated engine in {FOLDER}; build it with `make emulated`")
    spec = importlib.util.spec_from_file_location("hesd_fast_emulated._engine", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    module.select_target("emulated")
    return module


def use_emulated_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let kernels and block Lanczos run on it for a test."""
    for user in (kernels, panels, lanczos):
        monkeypatch.setattr(user, "_engine", engine())
