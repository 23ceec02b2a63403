"""Turns the files in bench/results into the tables of docs/performance-tables.md.

make bench-report
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import results_file

ROOT = Path(__file__).parent.parent
BEGIN, END = "<!-- begin: written by make bench-report -->", "<!-- end: written by make bench-report -->"
NOTHING = "Nothing is measured yet: `make bench`, then `make bench-report`."


def update(document: str, tables: str) -> str:
    """Return the document with new tables between the markers; what stands around them stays.

    Raises
    ------
    ValueError
        If the document lacks a marker.
    """
    before, begin, rest = document.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"the document has no place for the tables; put the lines {BEGIN} and {END} into it")
    return f"{before}{BEGIN}\n\n{tables.strip()}\n\n{END}{after}"


def render(files: Iterable[dict[str, Any]]) -> str:
    """Return the tables of all files of results, one section per machine."""
    sections = [_machine(found) for found in files if found["rows"]]
    return "\n\n".join(sections) or NOTHING


def _machine(found: dict[str, Any]) -> str:
    machine, rows, runs = found["machine"], found["rows"], found["runs"]
    names = {date: str(number) for number, date in enumerate(runs, start=1)}
    contests = {name: row for name, row in rows.items() if "engine" in row}
    kernels = {name: row for name, row in contests.items() if "gigabytes" in row}
    models = {name: row for name, row in contests.items() if "gigabytes" not in row}
    products = {name: row for name, row in models.items() if name.startswith("bench_products.py")}
    numbers = {name: row for name, row in models.items() if name.startswith("bench_report_numbers.py")}
    lanczos = {name: row for name, row in models.items() if name not in products | numbers}
    parts = [
        f"## {machine['cpu']}, {machine['cores']} cores, {machine['memory_gib']} GiB, {machine['cpu_target']}",
        "`make bench` measures all rows; `.venv/bin/python -m pytest 'bench/<bench>'` measures one alone.",
        _table(
            ["run", "date", "command", "commit", "threads", "versions"],
            [
                [names[date], date, f"`{run['command']}`", _commit(run), _threads(run), _versions(run)]
                for date, run in runs.items()
            ],
        ),
        _limits({name: row for name, row in rows.items() if "engine" not in row}, names),
        _targets(contests),
        _kernels(kernels, names),
        _models("Products, and densities made of them", products, names),
        _models("Lanczos, the same number of products", lanczos, names),
        _models("All numbers of a report, from the block tridiagonal matrix", numbers, names),
        _everyone(kernels),
    ]
    return "\n\n".join(part for part in parts if part)


def _limits(rows: dict[str, Any], names: dict[str, str]) -> str:
    lines = []
    for name, row in rows.items():
        for kind, limit in row["limits"].items():
            unit = "GB/s" if kind == "read_bandwidth" else "GFLOP/s"
            others = ", ".join(f"{probe} {rate:.3g}" for probe, rate in limit["probes"].items())
            rate = f"{limit['median']:.3g} ({limit['min']:.3g}–{limit['max']:.3g}) {unit}"
            lines.append([f"`{name}`", kind.replace("_", " "), rate, limit["name"], others, names[row["run"]]])
    head = ["bench", "limit", "median (min–max)", "by", "medians of all probes", "run"]
    return f"### The machine's limits\n\n{_table(head, lines)}" if lines else ""


def _targets(rows: dict[str, Any]) -> str:
    lines = [
        [f"`{name}`", t["figure"], f"≥ {t['wanted']:g}", f"{t['got']:.3g}", "met" if t["met"] else "**missed**"]
        for name, row in rows.items()
        for t in row["targets"]
    ]
    return f"### Targets\n\n{_table(['bench', 'figure', 'wanted', 'got', ''], lines)}" if lines else ""


def _kernels(rows: dict[str, Any], names: dict[str, str]) -> str:
    lines = []
    for name, row in rows.items():
        for group, ratio in row["ratios"].items():
            fastest = next(c for c in row["competitors"] if c["name"] == ratio["fastest"] and c["group"] == group)
            lines.append(
                [
                    f"`{name}`",
                    row["about"],
                    _milliseconds(row["engine"]),
                    _milliseconds(fastest),
                    f"{group}: {fastest['name']}",
                    _ratio(ratio),
                    f"{row['gigabytes']:.3g}",
                    f"{row['gigabytes_per_second']:.3g}",
                    f"{row['share_of_read_bandwidth']:.0%}" if "share_of_read_bandwidth" in row else "",
                    f"{row['gigaflops_per_second']:.3g}" if "gigaflops" in row else "",
                    _gemm_shares(row),
                    names[row["run"]],
                ]
            )
    head = ["bench", "work", "engine, ms", "fastest other, ms", "which", "ratio", "GB", "GB/s", "of read bandwidth"]
    return f"### Kernels\n\n{_table([*head, 'GFLOP/s', 'of GEMM, float32/float64', 'run'], lines)}" if lines else ""


def _models(title: str, rows: dict[str, Any], names: dict[str, str]) -> str:
    lines = []
    for name, row in rows.items():
        engine = row["engine"]
        for other in row["competitors"]:
            lines.append(
                [
                    f"`{name}`",
                    row["about"],
                    _milliseconds(engine),
                    _share(engine),
                    other["name"],
                    _milliseconds(other),
                    _share(other),
                    _times(other, engine),
                    names[row["run"]],
                ]
            )
    head = ["bench", "work", "engine, ms", "outside products", "other", "other, ms", "outside products", "ratio", "run"]
    return f"### {title}\n\n{_table(head, lines)}" if lines else ""


def _everyone(rows: dict[str, Any]) -> str:
    lines = [
        [f"`{name}`", other["group"], other["name"], _milliseconds(other), _times(other, row["engine"])]
        for name, row in rows.items()
        for other in row["competitors"]
    ]
    head = ["bench", "group", "way", "ms", "ratio to the engine"]
    return f"### Every way that PyTorch was tried\n\n{_table(head, lines)}" if lines else ""


def _milliseconds(entry: dict[str, Any]) -> str:
    if "median" not in entry:
        return f"{1e3 * entry['warm_up']:.4g} (warm-up)"
    median, low, high = (1e3 * entry[key] for key in ("median", "min", "max"))
    return f"{median:.4g} ({low:.4g}–{high:.4g})"


def _times(other: dict[str, Any], engine: dict[str, Any]) -> str:
    return f"{other.get('median', other.get('warm_up')) / engine['median']:.3g}"


def _ratio(ratio: dict[str, Any]) -> str:
    return f"{ratio['ratio']:.3g} ({ratio['min']:.3g}–{ratio['max']:.3g})"


def _share(entry: dict[str, Any]) -> str:
    return f"{entry['outside_products']:.0%}" if "outside_products" in entry else ""


def _gemm_shares(row: dict[str, Any]) -> str:
    rates = [row["limits"][kind]["median"] for kind in ("gemm_float32", "gemm_float64") if kind in row["limits"]]
    return " / ".join(f"{row['gigaflops_per_second'] / rate:.0%}" for rate in rates)


def _commit(run: dict[str, Any]) -> str:
    if run["commit"] is None:
        return "not a checkout"
    return f"{run['commit'][:10]}{' and changes' if run['dirty'] else ''}"


def _threads(run: dict[str, Any]) -> str:
    return ", ".join(f"{name} {count}" for name, count in run["threads"].items())


def _versions(run: dict[str, Any]) -> str:
    return ", ".join(f"{name} {run[name]}" for name in ("hesd_fast", "torch", "numpy", "python", "compiler"))


def _table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    rule = ["---"] * len(head)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, rule, *lines))


def main(argv: Sequence[str] | None = None) -> None:
    """Rewrite the document."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=ROOT / "bench" / "results", help="folder of files of results")
    parser.add_argument("--document", type=Path, default=ROOT / "docs" / "performance-tables.md")
    arguments = parser.parse_args(argv)
    files = [
        results_file.load(path)
        for path in sorted(arguments.results.glob("*.json"))
        if not path.name.startswith("cuda-")
    ]
    arguments.document.write_text(update(arguments.document.read_text(), render(files)))
    print(f"wrote the tables of {len(files)} files of results into {arguments.document}")


if __name__ == "__main__":
    main()
