"""Results are kept by name, and the report can read what the benches of this very run have written."""

from __future__ import annotations

import copy
import json

import machine
import pytest
import report
import results_file
from conftest import ROWS

DOCUMENT = report.ROOT / "docs" / "performance-tables.md"

ENTRY = {"name": "panel_gram", "group": "engine", "median": 0.002, "min": 0.001, "max": 0.003, "times": [0.001, 0.003]}
ROW = {
    "about": "n = 1",
    "engine": ENTRY,
    "competitors": [
        {**ENTRY, "name": "mm", "group": "PyTorch", "median": 0.003},
        {"name": "loop", "group": "PyTorch", "warm_up": 1.0},
    ],
    "ratios": {"PyTorch": {"fastest": "mm", "ratio": 1.5, "min": 1.25, "max": 1.75}},
    "limits": {
        kind: {"name": "probe", "median": rate, "min": rate, "max": rate}
        for kind, rate in (("read_bandwidth", 20.0), ("gemm_float32", 100.0), ("gemm_float64", 50.0))
    },
    "gigaflops": 0.01,
    "gigaflops_per_second": 5.0,
    "gigabytes": 0.02,
    "gigabytes_per_second": 10.0,
    "share_of_read_bandwidth": 0.5,
    "targets": [
        {"figure": "ratio to PyTorch", "wanted": 1.7, "got": 1.5, "met": False},
        {"figure": "share of read bandwidth", "wanted": 0.25, "got": 0.5, "met": True},
    ],
}


def run(date):
    return {**machine.run_facts("pytest bench"), "date": date}


def test_rows_are_replaced_by_name_and_runs_without_rows_dropped(tmp_path):
    path = tmp_path / "machine.json"
    results_file.merge(path, machine.machine(), run("1"), {"a": ROW, "b": ROW})
    results_file.merge(path, machine.machine(), run("2"), {"b": ROW})
    found = results_file.load(path)
    assert {name: row["run"] for name, row in found["rows"].items()} == {"a": "1", "b": "2"}
    assert list(found["runs"]) == ["1", "2"]
    results_file.merge(path, machine.machine(), run("3"), {"a": ROW})
    assert list(results_file.load(path)["runs"]) == ["2", "3"]


def test_row_of_a_failed_bench_is_taken_out(tmp_path):
    path = tmp_path / "machine.json"
    results_file.merge(path, machine.machine(), run("1"), {"a": ROW, "b": ROW})
    results_file.merge(path, machine.machine(), run("2"), {}, failed=["a", "never seen"])
    assert list(results_file.load(path)["rows"]) == ["b"]


def test_file_of_another_format_is_refused(tmp_path):
    path = tmp_path / "machine.json"
    path.write_text(json.dumps({"format": 0}))
    with pytest.raises(ValueError, match="format 0"):
        results_file.load(path)


def test_report_shows_missed_targets_and_keeps_the_text_around(tmp_path):
    results_file.merge(tmp_path / "machine.json", machine.machine(), run("1"), {"bench_kernels.py::test_x": ROW})
    document = tmp_path / "performance.md"
    document.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    for _ in range(2):  # a second time changes nothing
        report.main(["--results", str(tmp_path), "--document", str(document)])
        text = document.read_text()
        assert text.startswith(f"before\n{report.BEGIN}\n")
        assert text.endswith(f"{report.END}\nafter\n")
        assert "old" not in text
        assert "| `bench_kernels.py::test_x` | ratio to PyTorch | ≥ 1.7 | 1.5 | **missed** |" in text
        assert "| `bench_kernels.py::test_x` | share of read bandwidth | ≥ 0.25 | 0.5 | met |" in text
        assert "2 (1–3) | 3 (1–3) | PyTorch: mm | 1.5 (1.25–1.75) | 0.02 | 10 | 50% | 5 | 5% / 10% |" in text
        assert "1000 (warm-up)" in text
        assert "| `pytest bench` |" in text


def test_document_without_markers_is_refused():
    with pytest.raises(ValueError, match="no place for the tables"):
        report.update("text", "tables")


def test_document_has_a_place_for_the_tables():
    assert "**missed**" not in report.update(DOCUMENT.read_text(), report.render([]))


def test_report_reads_the_rows_of_this_run(request, tmp_path):
    rows = copy.deepcopy(request.config.stash[ROWS])
    if not rows:
        pytest.skip("no bench ran before this test, so there is nothing to report; run the whole folder")
    results_file.merge(tmp_path / "machine.json", machine.machine(), machine.run_facts("pytest bench"), rows)
    text = report.render([results_file.load(tmp_path / "machine.json")])
    for name, row in rows.items():
        assert f"`{name}`" in text
        for other in row.get("competitors", []):
            assert other["name"] in text
