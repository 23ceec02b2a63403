"""Reports survive saving and loading, refuse what is not a report, and draw what they hold."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import stat
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn

import hesd_fast as hesd
from hesd_fast.report.facts import Check
from hesd_fast.report.report import summary


@pytest.fixture(scope="module")
def report():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 2))
    inputs = torch.randn(40, 5)
    data = (inputs, (inputs[:, 0] > 0).long())
    loss = hesd.losses.supervised(nn.CrossEntropyLoss())
    return hesd.analyze(model, loss, data, max_steps=30, tolerance=None, progress=False)


@pytest.fixture(scope="module")
def zero_report():
    model = nn.Linear(4, 1)
    return hesd.analyze(model, lambda m, b: m(b).mean(), torch.randn(20, 4), progress=False)


def test_save_and_load_keep_every_number(report, tmp_path):
    path = tmp_path / "run.hesd.json"
    report.save(path)
    loaded = hesd.load_report(path)
    assert str(loaded) == str(report)
    for name in ("hesd_type", "type_evidence", "criteria", "problem", "cost", "checks", "settings", "versions"):
        assert getattr(loaded, name) == getattr(report, name), name
    assert loaded.measure.tridiagonals[0].to_dict() == report.measure.tridiagonals[0].to_dict()
    for ours, theirs in zip(loaded.measure.nodes, report.measure.nodes, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert loaded.trace == report.trace


def test_infinite_intervals_survive_as_strict_json(zero_report, tmp_path):
    path = tmp_path / "zero.hesd.json"
    zero_report.save(path)

    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    json.loads(path.read_text(), parse_constant=refuse)
    loaded = hesd.load_report(path)
    assert loaded.criteria == zero_report.criteria
    assert math.isinf(loaded.criteria.k_mass.high)


def test_a_save_that_fails_names_the_file_and_leaves_nothing(report, tmp_path):
    with pytest.raises(hesd.CheckpointError, match="nowhere"):
        report.save(tmp_path / "nowhere" / "run.hesd.json")
    assert list(tmp_path.iterdir()) == []


def test_saving_over_an_old_report_replaces_it(report, zero_report, tmp_path):
    path = tmp_path / "run.hesd.json"
    zero_report.save(path)
    report.save(path)
    assert hesd.load_report(path).criteria == report.criteria
    assert [p.name for p in tmp_path.iterdir()] == ["run.hesd.json"]


def test_a_report_gets_the_permissions_of_any_new_file(report, tmp_path):
    path = tmp_path / "run.hesd.json"
    before = os.umask(0o027)
    try:
        report.save(path)
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o640


def test_a_save_onto_a_folder_leaves_nothing(report, tmp_path):
    (tmp_path / "taken").mkdir()
    with pytest.raises(hesd.CheckpointError, match=r"taken.*cannot be written"):
        report.save(tmp_path / "taken")
    assert [path.name for path in tmp_path.rglob("*")] == ["taken"]


def test_reports_are_utf_8_whatever_the_locale(report, tmp_path):
    path = tmp_path / "run.hesd.json"
    report.save(path)
    content = json.loads(path.read_text(encoding="utf-8"))
    content["problem"]["model"] = "Модель"
    path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    program = "import sys, hesd_fast as hesd; print(ascii(hesd.load_report(sys.argv[1]).problem.model))"
    environment = {**os.environ, "LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    done = subprocess.run(
        [sys.executable, "-c", program, path], env=environment, capture_output=True, text=True, check=False
    )
    assert done.stdout.strip() == ascii("Модель"), done.stderr


def break_type(content):
    content["hesd_type"] = "XX"


def drop_criteria(content):
    del content["criteria"]


def break_block(content):
    content["tridiagonals"][0]["diagonal"][0] = [[1.0]]


@pytest.mark.parametrize("damage", [break_type, drop_criteria, break_block])
def test_damaged_reports_are_refused(report, tmp_path, damage):
    path = tmp_path / "run.hesd.json"
    report.save(path)
    content = json.loads(path.read_text())
    damage(content)
    path.write_text(json.dumps(content))
    with pytest.raises(hesd.CheckpointError, match=r"run\.hesd\.json.*damaged"):
        hesd.load_report(path)


def test_what_is_not_a_report_is_refused(report, tmp_path):
    path = tmp_path / "run.hesd.json"
    with pytest.raises(hesd.CheckpointError, match="cannot be read"):
        hesd.load_report(path)
    path.write_text("{")
    with pytest.raises(hesd.CheckpointError, match="cannot be read"):
        hesd.load_report(path)
    path.write_text("[1, 2]")
    with pytest.raises(hesd.CheckpointError, match="not a report"):
        hesd.load_report(path)
    report.save(path)
    path.write_text(path.read_text().replace('"format_version": 3', '"format_version": 99'))
    with pytest.raises(hesd.CheckpointError, match="format version 99"):
        hesd.load_report(path)


def test_the_print_names_everything(report):
    text = str(report)
    for word in (
        "66 parameters",
        "type",
        "because",
        "lambda_max",
        "trace",
        "r_e",
        "K_Hn",
        "k_mass",
        "balance",
        f"{report.cost.hvps} products",
    ):
        assert word in text, word


ESCAPE = "\x1b[2J\x9b\u202e\ud800"
HARMLESS = r"\x1b[2J\x9b\u202e\ud800"


def named_dangerously(report):
    """The same report with an escape sequence wherever a name or a text of others goes."""
    return dataclasses.replace(
        report,
        problem=dataclasses.replace(report.problem, model=ESCAPE, mode=ESCAPE, precision=ESCAPE),
        cost=dataclasses.replace(report.cost, strategy=ESCAPE, unmet=(ESCAPE,)),
        type_evidence=dataclasses.replace(report.type_evidence, reason=ESCAPE, advice=(ESCAPE,)),
        checks=(Check("symmetry", True, ESCAPE),),
        settings=dataclasses.replace(report.settings, group=ESCAPE),
    )


def test_print_and_table_do_nothing_to_a_terminal(report):
    text = str(named_dangerously(report))
    assert text.count(HARMLESS) == 9
    assert all(line.isprintable() for line in text.split("\n"))
    assert len(text.split("\n")) == len(str(report).split("\n")) - len(report.checks) + 3
    table = summary({ESCAPE + "\n": report, "plain": report})
    assert HARMLESS + r"\n" in table
    assert all(line.isprintable() for line in table.split("\n"))
    assert len(table.split("\n")) == 3


def test_what_is_not_a_mapping_of_reports_makes_no_table(report):
    with pytest.raises(hesd.ProblemError, match="summary got a list; give reports by name"):
        summary([report])
    with pytest.raises(hesd.ProblemError, match="summary got a Estimate under 'a'; give a Report"):
        summary({"a": report.trace})
