"""The files of results: one per machine, rows replaced by name when they are measured again."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

FORMAT = 1


def load(path: Path) -> dict[str, Any]:
    """Return the results in a file, an empty set if there is none."""
    if not path.exists():
        return {"format": FORMAT, "machine": {}, "runs": {}, "rows": {}}
    found: dict[str, Any] = json.loads(path.read_text())
    if found.get("format") != FORMAT:
        raise ValueError(f"{path} has format {found.get('format')!r}; wanted {FORMAT}. Delete it and measure again")
    return found


def merge(
    path: Path,
    machine: dict[str, Any],
    run: dict[str, Any],
    rows: dict[str, dict[str, Any]],
    failed: Iterable[str] = (),
) -> None:
    """Put the rows of one run into a file.

    Each row names the run it comes from. Rows of benches that failed are taken out, so no figure survives the check
    that refutes it.
    """
    results = load(path)
    results["machine"] = machine
    for name in failed:
        results["rows"].pop(name, None)
    results["rows"].update({name: {"run": run["date"], **row} for name, row in rows.items()})
    results["runs"][run["date"]] = run
    in_use = {row["run"] for row in results["rows"].values()}
    results["runs"] = {date: facts for date, facts in sorted(results["runs"].items()) if date in in_use}
    results["rows"] = dict(sorted(results["rows"].items()))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(_one_line_per_row(results))


def _one_line_per_row(results: dict[str, Any]) -> str:
    lines = [f'{{"format": {results["format"]},', f'"machine": {json.dumps(results["machine"])},']
    for section in ("runs", "rows"):
        entries = ",\n".join(f"{json.dumps(name)}: {json.dumps(row)}" for name, row in results[section].items())
        lines.append(f'"{section}": {{\n{entries}\n}}' + ("," if section == "runs" else "}"))
    return "\n".join(lines) + "\n"
