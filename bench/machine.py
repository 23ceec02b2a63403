"""What a result is worth nothing without: the machine, the versions, the commit."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import torch

import hesd_fast as hesd

ROOT = Path(__file__).parent.parent
GENERATED = (":!bench/results", ":!docs/performance-tables.md")


def machine() -> dict[str, Any]:
    """Return processor, cores, memory and the instruction set that the engine uses."""
    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gib": _memory(),
        "cpu_target": hesd.build_info()["cpu_target"],
        "system": f"{platform.system()} {platform.machine()}",
    }


def label() -> str:
    """Return a name for this machine that is the same in every run, fit for a file."""
    facts = machine()
    words = f"{facts['cpu']}-{facts['cores']}-cores-{facts['cpu_target']}"
    return re.sub(r"[^a-z0-9]+", "-", words.lower()).strip("-")


def run_facts(command: str) -> dict[str, Any]:
    """Return date, command, commit, versions and thread counts of this run."""
    info = hesd.build_info()
    commit, dirty = _commit()
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": command,
        "commit": commit,
        "dirty": dirty,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "numpy": np.__version__,
        "hesd_fast": info["version"],
        "compiler": info["compiler"],
        "threads": {"engine": info["threads"], "torch": torch.get_num_threads()},
    }


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _memory() -> float | None:
    try:
        return round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1)
    except (OSError, ValueError):
        return None


def _commit() -> tuple[str | None, bool | None]:
    """Return the commit and whether anything but the results differs from it; None outside of a checkout."""
    try:
        commit = _git("rev-parse", "HEAD")
        return commit, bool(_git("status", "--porcelain", "--", ".", *GENERATED))
    except (OSError, subprocess.CalledProcessError):
        return None, None


def _git(*arguments: str) -> str:
    return subprocess.run(("git", *arguments), cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()
