"""The progress bar shows products, rate and time left, and stays silent off a terminal."""

from __future__ import annotations

import io

from rich.console import Console

import hesd_fast.analysis.progress as progress_module
from hesd_fast.analysis.progress import ProductProgress


def drive(monkeypatch, terminal, enabled=True):
    output = io.StringIO()
    monkeypatch.setattr(
        progress_module, "Console", lambda stderr: Console(file=output, force_terminal=terminal, width=120)
    )
    with ProductProgress(40, enabled=enabled) as bar:
        for step in range(1, 11):
            bar.update(4 * step)
    return output.getvalue()


def test_a_terminal_sees_products_and_time(monkeypatch):
    text = drive(monkeypatch, terminal=True)
    assert "40/40" in text
    assert "time left" in text
    assert "/s" in text


def test_files_and_quiet_runs_see_nothing(monkeypatch):
    assert drive(monkeypatch, terminal=False).strip() == ""
    assert drive(monkeypatch, terminal=True, enabled=False).strip() == ""
