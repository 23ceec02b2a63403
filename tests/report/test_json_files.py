"""Report files are read only when nothing in them is missing, of another kind, impossible, or contradicts the rest."""

from __future__ import annotations

import copy
import dataclasses
import json
import time
from typing import Any, TypeVar

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from torch import nn
from typing_extensions import TypeAliasType

import hesd_fast as hesd
from hesd_fast.records import read_record
from hesd_fast.report import json_files as report_file
from hesd_fast.report.facts import RunSettings
from hesd_fast.report.report import summary

FORMAT_FIELDS = ("format", "format_version")


UNUSABLE = "no spectrum can be computed from tridiagonals and criteria: "


@pytest.fixture(scope="module")
def report():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    inputs = torch.randn(40, 3)
    data = (inputs, (inputs[:, 0] > 0).long())
    loss = hesd.losses.supervised(nn.CrossEntropyLoss())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for _ in range(100):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(data[0]), data[1]).backward()
        optimizer.step()
    return hesd.analyze(model, loss, data, block_size=2, max_steps=6, progress=False)


@pytest.fixture(scope="module")
def saved(report, tmp_path_factory):
    path = tmp_path_factory.mktemp("saved") / "run.hesd.json"
    report.save(path)
    return json.loads(path.read_text())


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tmp_path_factory.mktemp("altered") / "run.hesd.json"


def altered(saved, field, value):
    """The content of a file with the field at ``a.b.0.c`` replaced."""
    content = copy.deepcopy(saved)
    *way, last = field.split(".")
    place = content
    for step in way:
        place = place[int(step) if isinstance(place, list) else step]
    place[int(last) if isinstance(place, list) else last] = value
    return content


def refusal(path, content):
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(hesd.CheckpointError) as caught:
        hesd.load_report(path)
    message = str(caught.value)
    assert "run.hesd.json" in message
    assert message.endswith(("run the analysis again", "give a file that Report.save wrote"))
    return message


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("hesd_type", "UNDETERMINED", "hesd_type is UNDETERMINED; type_evidence, criteria and problem make it MP"),
        ("type_evidence.reason", "it is so", "type_evidence.reason is 'it is so'; its numbers, criteria and problem"),
        ("type_evidence.advice", ["pray"], "type_evidence.advice is a list of 1; its numbers"),
        ("type_evidence.noise", -1.0, "type_evidence.noise is -1.0; wanted at least 0"),
        ("type_evidence.noise", 1e9, "hesd_type is MP; type_evidence, criteria and problem make it QS"),
        ("type_evidence.thresholds.kappa", 1e9, "hesd_type is MP; type_evidence, criteria and problem make it QS"),
        ("type_evidence.thresholds.delta", 2.0, "type_evidence.thresholds: delta must lie between 0 and 1, got 2.0"),
        ("type_evidence.sharpness", None, "type_evidence.sharpness is None; its numbers, criteria and problem give"),
        ("problem.loss", 0.3, "type_evidence.sharpness is Estimate"),
        ("problem.parameter_norm_squared", -1.0, "problem.parameter_norm_squared is -1.0; wanted at least 0"),
        ("criteria.k_hn.value", -0.1, "criteria.k_hn: an Estimate needs low <= value <= high"),
        ("criteria.k_mass.high", "inf", "criteria.k_mass.high is inf; the tridiagonal matrices give"),
        ("criteria.k_mass.low", "-inf", "criteria.k_mass.low is -inf; the tridiagonal matrices give"),
        ("criteria.k_mass.method", "guess", "criteria.k_mass.method is 'guess'; the tridiagonal matrices give 'tight"),
        ("criteria.exponent", 0.25, "criteria.k_hn.value is "),
        ("criteria.exponent", -1, f"{UNUSABLE}exponent must be positive"),
        ("criteria.resolution", 0.0, "criteria.resolution is 0.0; the tridiagonal matrices give"),
        ("tridiagonals.0.epsilon", 2.0**-10, "type_evidence.lambda_max.low is "),
        ("tridiagonals.0.size", 27, "tridiagonals[0].size is 27 and problem.size is 26"),
        ("tridiagonals.0.products", 13, "cost.hvps is 12 and tridiagonals have 13 products"),
        (
            "tridiagonals.0.orthogonality",
            -1.0,
            "tridiagonals[0]: orthogonality must be finite and not negative, got -1.0",
        ),
        (
            "tridiagonals.0.reorthogonalization",
            "often",
            "tridiagonals[0].reorthogonalization is 'often'; wanted one of full",
        ),
        ("tridiagonals.0.start", [[0.0, 0.0], [1.0, 1.0]], f"{UNUSABLE}probe 0 is the zero vector"),
        (
            "tridiagonals.0.diagonal.0.0.1",
            -0.0584475,
            "tridiagonals[0].diagonal[0] is not symmetric, as every diagonal block",
        ),
        ("tridiagonals.0.breakdown", True, "tridiagonals[0]: breakdown=True contradicts a last coupling"),
        ("precision", None, "precision.error is None, and that of tridiagonals[0] ProductError("),
        ("precision.error.largest", 1.0, "precision.error is ProductError(1, "),
        ("precision.error.largest", -1.0, "precision.error: a ProductError needs numbers that are finite and not"),
        ("precision.cosines", [1.0], "precision.cosines has 1 numbers; wanted 4, one for each parameter"),
        ("precision.relative_errors.1", -1.0, "precision.relative_errors holds -1.0; wanted numbers from 0 on"),
        ("precision.relative_error", -1.0, "precision.relative_error is -1.0; wanted at least 0"),
        ("precision.cosine", 1.1, "precision.cosine is 1.1; wanted a number from -1 to 1"),
        ("precision.cosines.0", -1.1, "precision.cosines holds -1.1; wanted numbers from -1 to 1"),
        ("precision.worst", "3.weight", "precision.worst is '3.weight', which is none of the parameters"),
        ("precision.reference", "float16", "precision.reference is 'float16'; wanted float64 or float32"),
        ("precision.batches", 2, "precision.batches is 2; wanted 1 to 1"),
        ("precision.vectors", 0, "precision.vectors is 0; wanted at least 1"),
        ("problem.size", 2**63, "problem.size is 9223372036854775808; wanted less than 2**63"),
        ("problem.shapes.0.1", 4, "problem.shapes holds 30 numbers and problem.size is 26"),
        ("problem.shapes.0.1", -3, r"problem.shapes[0] has a negative length"),
        ("problem.shapes", [[26]], "problem.shapes has 1 shapes and problem.parameters 4 names"),
        ("problem.parameters.1", "0.weight", "problem.parameters names a parameter twice"),
        ("problem.terms", 0, "problem.terms is 0.0; wanted a positive number"),
        ("problem.batches", 0, "problem.batches is 0; wanted at least 1"),
        ("problem.mode", "test", "problem.mode is 'test'; wanted one of eval, train, as_is"),
        ("problem.precision", "float", "problem.precision is 'float'; wanted float32 or float64"),
        ("cost.hvps", 7, "cost.hvps is 7 and tridiagonals have 12 products"),
        ("cost.seconds", -1, "cost.seconds is -1.0; wanted at least 0"),
        ("options.block_size", 3, "options.block_size is 3, and of tridiagonals[0] it is 2"),
        ("options.max_steps", 5, "options.max_steps is 5 and options.block_size 2, and tridiagonals have 12 vectors"),
        ("options.reorthogonalization", "none", "options.reorthogonalization is 'none', and of tridiagonals[0]"),
        ("options.basis", "disk", "options.basis is 'disk', and of tridiagonals[0] it is 'memory'"),
        ("options.basis_dtype", "float16", "options.basis_dtype is 'float16', and of tridiagonals[0]"),
        ("options.operator", "fisher", "options.operator is 'fisher'; wanted one of hessian, gauss_newton"),
        ("options.protocol", "lla", "options.protocol is 'lla', which has other settings"),
        ("options.protocol", "all", "options.protocol is 'all'; wanted null or one of lla"),
        ("options.seed", -1, "options.seed is -1; wanted at least 0"),
    ],
)
def test_a_contradiction_is_named(saved, path, field, value, message):
    assert f"is damaged: {message}" in refusal(path, altered(saved, field, value))


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("criteria", [], "criteria is a list of 0; wanted an object with named fields"),
        ("criteria.r_e", 0.1, "criteria.r_e is 0.1; wanted an object with named fields"),
        ("criteria.r_e.value", "0.1", "criteria.r_e.value is '0.1'; wanted a number"),
        ("criteria.r_e.value", True, "criteria.r_e.value is True; wanted a number"),
        ("criteria.r_e.value", "nan", "criteria.r_e.value is 'nan'; wanted a number"),
        ("criteria.exponent", "inf", "criteria.exponent is 'inf'; wanted a number"),
        ("criteria.exponent", 10**400, "criteria.exponent is an integer of 1329 bits; wanted one of at most 64, or a"),
        ("hesd_type", 1, "hesd_type is 1; wanted one of MP, MN, QS, UNDETERMINED"),
        ("problem.model", ["Net"], "problem.model is a list of 1; wanted a text"),
        ("problem.model", None, "problem.model is None; wanted a text"),
        ("problem.parameters", "0.weight", "problem.parameters is '0.weight'; wanted a list"),
        ("problem.parameters.2", 3, "problem.parameters[2] is 3; wanted a text"),
        ("problem.batches", True, "problem.batches is True; wanted an integer"),
        ("problem.batches", 1.0, "problem.batches is 1.0; wanted an integer"),
        ("problem.size", 10**30, "problem.size is an integer of 100 bits; wanted one of at most 64"),
        ("problem.shapes.0", 12, "problem.shapes[0] is 12; wanted a list"),
        ("checks", {}, "checks is an object with 0 fields; wanted a list"),
        ("checks.0.passed", 1, "checks[0].passed is 1; wanted true or false"),
        ("versions.torch", 2, "versions.'torch' is 2; wanted a text"),
        ("versions", "2.6", "versions is '2.6'; wanted an object"),
        ("options.seed", "0", "options.seed is '0'; wanted an integer"),
        ("options.group", 3, "options.group is 3; wanted a text"),
        ("tridiagonals.0.diagonal.1", 3.0, "tridiagonals[0].diagonal[1] is 3.0; wanted a list"),
        ("tridiagonals.0.diagonal.1.0.1", "3", "tridiagonals[0].diagonal[1][0][1] is '3'; wanted a number"),
        ("tridiagonals.0.diagonal.1.0.1", True, "tridiagonals[0].diagonal[1][0][1] is True; wanted a number"),
        ("tridiagonals.0.diagonal.1.0.1", [1.0], "tridiagonals[0].diagonal[1][0][1] is a list of 1; wanted a number"),
        (
            "tridiagonals.0.diagonal.1.1",
            [1.0],
            "tridiagonals[0].diagonal[1][1] has 1 numbers; wanted 2, as in the first row",
        ),
        ("tridiagonals.0.start", [], "tridiagonals[0]: start must have shape (b, p_0) with b >= p_0 >= 1, got (0, 0)"),
        (
            "tridiagonals.0.start",
            [[], []],
            "tridiagonals[0]: start must have shape (b, p_0) with b >= p_0 >= 1, got (2, 0)",
        ),
        ("surprise", 1, "'surprise' is no field; known are hesd_type, type_evidence"),
        ("cost.sur\x1bprise", 1, r"cost.'sur\x1bprise' is no field; known are hvps, seconds"),
    ],
)
def test_a_field_of_the_wrong_kind_is_named(saved, path, field, value, message):
    assert f"is damaged: {message}" in refusal(path, altered(saved, field, value))


def fields_of(content, where=()):
    """Every place in a file, as a tuple of names and numbers; all that is in it comes after it."""
    yield where
    entries = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for name, value in entries:
        yield from fields_of(value, (*where, name))


def at(content, where):
    for step in where:
        content = content[step]
    return content


def test_every_field_has_to_be_there(saved, path):
    named = [where for where in fields_of(saved) if where and isinstance(where[-1], str)]
    assert len(named) > 90
    for where in named:
        if where[0] in FORMAT_FIELDS or where[:-1] in (("versions",), ("options", "tolerance")):
            continue
        content = copy.deepcopy(saved)
        del at(content, where[:-1])[where[-1]]
        wanted = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in where)
        assert f"is damaged: {wanted[1:]} is missing;" in refusal(path, content)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "cannot be read as a report: Expecting value"),
        ("[" * 100_000, "cannot be read as a report: "),
        ('{"a":' * 100_000, "cannot be read as a report: "),
        ('{"format": ' + "1" * 5000 + "}", "run.hesd.json"),
        ('{"format": NaN}', "cannot be read as a report: it has the number NaN, which JSON does not know"),
        ('{"format": 1, "format": 2}', "cannot be read as a report: it has the field 'format' twice"),
        ('{"format": "hesd-fast report"', "cannot be read as a report: "),
        ("3", "is not a report of hesd-fast"),
        ('{"format": ["hesd-fast report"]}', "is not a report of hesd-fast"),
    ],
)
def test_text_that_is_no_report_is_refused(path, text, message):
    assert message in refusal(path, text)


@pytest.mark.parametrize("version", [2, 4, "3", 3.0, True, None, [2], 10**30])
def test_other_versions_of_the_format_are_refused(saved, path, version):
    path.write_text(json.dumps({**saved, "format_version": version}))
    with pytest.raises(hesd.CheckpointError, match=r"this release reads version 3\. Read it with the release"):
        hesd.load_report(path)


def test_files_that_cannot_be_read_are_refused(tmp_path, monkeypatch):
    path = tmp_path / "run.hesd.json"
    path.write_bytes(b'{"format": "\xff"}')
    with pytest.raises(hesd.CheckpointError, match="cannot be read as a report: 'utf-8' codec can't decode byte 0xff"):
        hesd.load_report(path)
    with pytest.raises(hesd.CheckpointError, match=r"cannot be read as a report: .*directory"):
        hesd.load_report(tmp_path)
    with pytest.raises(hesd.CheckpointError, match=r"'a\\x00b' cannot be read as a report: .*null"):
        hesd.load_report("a\0b")
    for wrong in (None, 3, b"run.hesd.json", ["run.hesd.json"]):
        with pytest.raises(hesd.CheckpointError, match=r"the path of a report is .*; give a text or a pathlib\.Path"):
            hesd.load_report(wrong)
    with path.open("wb") as file:
        file.truncate(report_file.LARGEST_FILE + 1)  # no byte of it is on the disk
    with pytest.raises(hesd.CheckpointError, match="it has more than 1073741824 bytes"):
        hesd.load_report(path)


def as_on_another_machine(content, error, seed=0):
    """The content with a matrix that another eigensolver could have taken for its own."""
    rng = np.random.default_rng(seed)
    content = copy.deepcopy(content)
    matrix = content["tridiagonals"][0]
    scale = max(abs(content["type_evidence"][name]["value"]) for name in ("lambda_max", "lambda_min"))
    for name in ("diagonal", "offdiagonal"):
        for i, block in enumerate(map(np.array, matrix[name])):
            moved = block + error * scale * rng.standard_normal(block.shape)
            matrix[name][i] = ((moved + moved.T) / 2 if name == "diagonal" else moved).tolist()
    return content


def test_numbers_in_the_last_digits_may_differ_on_another_machine(saved, report, path):
    path.write_text(json.dumps(as_on_another_machine(saved, 1e-13)))
    loaded = hesd.load_report(path)
    assert loaded.criteria == report.criteria
    assert loaded.measure.tridiagonals[0].diagonal[0].tolist() != report.measure.tridiagonals[0].diagonal[0].tolist()


@pytest.mark.parametrize("mode", ["full", "none"])
def test_what_rounding_does_not_determine_may_differ_on_another_machine(path, mode):
    # Every eigenvalue is there twice, or again as copies; K_Hn depends on how they share their weight.
    torch.manual_seed(0)
    data = (torch.randn(30, 6).double(), torch.randn(30, 2).double())
    loss = hesd.losses.supervised(nn.MSELoss())
    report = hesd.analyze(
        nn.Linear(6, 2).double(),
        lambda m, b: sign_changing(m, b, loss),
        data,
        block_size=2,
        max_steps=24,
        reorthogonalization=mode,
        progress=False,
    )
    report.save(path)
    content = json.loads(path.read_text())
    k_hn = []
    for seed in range(4):
        path.write_text(json.dumps(as_on_another_machine(content, 2.0**-52, seed)))
        loaded = hesd.load_report(path)
        assert loaded.criteria == report.criteria
        k_hn.append(hesd.criteria(loaded.measure).k_hn.value)
    assert np.ptp(k_hn) > 100 * report_file.DIGITS * np.mean(k_hn)
    assert "criteria.k_hn.high is 100.0" in refusal(path, altered(content, "criteria.k_hn.high", 100.0))
    near = 0.99 * content["criteria"]["r_e"]["low"]
    assert f"criteria.r_e.low is {near}" in refusal(path, altered(content, "criteria.r_e.low", near))


@pytest.mark.parametrize(
    ("field", "factor", "computations"),
    [
        ("type_evidence.lambda_max.high", 2.0, 1),
        ("criteria.k_mass.high", 100.0, 1),
        ("criteria.r_e.high", 100.0, 1),
        ("criteria.r_e.high", 1.01, 9),
        ("criteria.k_hn.high", 100.0, 9),
    ],
)
def test_only_what_rounding_may_have_done_is_looked_at_closely(saved, path, monkeypatch, field, factor, computations):
    seen = []
    compute = report_file._computed
    monkeypatch.setattr(report_file, "_computed", lambda *given: seen.append(given) or compute(*given))
    monkeypatch.setattr(report_file, "_wrong_type", lambda content: ())
    record, name, part = field.split(".")
    content = altered(saved, field, saved[record][name][part] * factor)
    assert f"{field} is " in refusal(path, content)
    assert len(seen) == computations


def test_a_file_that_asks_for_more_memory_than_there_is_is_refused(saved, path, monkeypatch):
    path.write_text(json.dumps(saved))
    monkeypatch.setattr(report_file, "_computed", lambda *_: pytest.fail("it was computed"))
    monkeypatch.setattr(report_file, "available_memory", lambda: 80 * 12**2 - 1)
    with pytest.raises(
        hesd.CheckpointError,
        match=r"takes more memory to be read than there is: 12 Ritz values take about .* GiB are "
        r"free; free some, or read it on another machine",
    ):
        hesd.load_report(path)
    monkeypatch.undo()
    for enough in (lambda: 80 * 12**2, lambda: None):
        monkeypatch.setattr(report_file, "available_memory", enough)
        assert hesd.load_report(path).measure.nodes


@pytest.mark.parametrize("name", ["criteria", "read_record"])
def test_memory_that_ends_while_a_file_is_read_is_an_error_of_its_own(saved, path, monkeypatch, name):
    path.write_text(json.dumps(saved))

    def exhausted(*_):
        np.empty(2**62 // 8)

    monkeypatch.setattr(report_file, name, exhausted)
    with pytest.raises(hesd.CheckpointError, match=r"takes more memory to be read than there is: Unable to allocate"):
        hesd.load_report(path)


def test_shapes_of_many_lengths_are_refused_at_once(saved, path):
    started = time.perf_counter()
    content = altered(saved, "problem.shapes.0", [2**62] * 300_000)
    assert "problem.shapes holds 2**63 or more numbers" in refusal(path, content)
    assert "numbers and problem.size is 26" in refusal(path, altered(saved, "problem.shapes.0", [2**62, 2**62, 0]))
    assert time.perf_counter() - started < 30  # it took minutes, and an hour for a file ten times as long


def sign_changing(model, batch, loss):
    """A loss whose Hessian has positive and negative eigenvalues, each of them twice."""
    total, count = loss(model, batch)
    return total - 0.4 * count * sum(parameter.square().sum() for parameter in model.parameters()), count


def test_what_was_chosen_is_taken_as_given(report, path):
    own = hesd.criteria(report.measure, exponent=1.0, mass_exponent=2.0, resolution=1e-3)
    facts = report.problem
    hesd_type, evidence = hesd.classify(
        report.measure,
        own,
        loss_value=facts.loss,
        parameter_norm_squared=facts.parameter_norm_squared,
        noise=1e-4,
        thresholds=hesd.TypeThresholds(delta=0.9),
    )
    changed = dataclasses.replace(report, criteria=own, hesd_type=hesd_type, type_evidence=evidence)
    changed.save(path)
    loaded = hesd.load_report(path)
    assert loaded.criteria == own
    assert loaded.type_evidence == evidence


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hesd_type": hesd.HESDType.MN}, "hesd_type is MN; type_evidence, criteria and problem make it MP"),
        (
            {"settings": RunSettings("hessian", 2, 6, "full", "memory", "float32", "auto", None, "0", None)},
            "options.seed is '0'; wanted an integer",
        ),
        ({"versions": {"torch": object()}}, "versions.'torch' is <object"),
    ],
)
def test_a_report_that_could_not_be_read_back_is_not_saved(report, tmp_path, changes, message):
    path = tmp_path / "run.hesd.json"
    with pytest.raises(
        hesd.CheckpointError, match="the report cannot be saved, as it could not be read back: "
    ) as caught:
        dataclasses.replace(report, **changes).save(path)
    assert message in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_report_of_weights_that_are_zero_can_be_read_back(path):
    torch.manual_seed(0)
    model = nn.Linear(3, 1)
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    data = (torch.randn(20, 3), torch.randn(20, 1))
    report = hesd.analyze(model, hesd.losses.supervised(nn.MSELoss()), data, block_size=1, max_steps=1, progress=False)
    report.save(path)
    assert hesd.load_report(path).type_evidence == report.type_evidence


SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 3),
    st.sampled_from([2**31, 2**63, 2**64, -(2**70), 10**400]),
    st.floats(allow_nan=True, allow_infinity=True),
    st.sampled_from(["", "inf", "-inf", "nan", "1", "MP", "QS", "full", "none", "\x1b[2J", "\ud800", "a" * 200]),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["value", "low", "x"]), inner, max_size=3)
    ),
    max_leaves=6,
)


def mutated(value):
    """A strategy for what may stand in the place of a value: itself moved, negated, scaled, or of another kind."""
    if isinstance(value, str):
        return st.sampled_from([value + "x", value[:-1], value.upper(), "\x1b[2J\ud800"]) | VALUES
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return VALUES
    nearby = st.sampled_from(
        [-value, 0, value + 1, value * 2, value * (1 + 1e-9), value * 1.01, value * 1e300, float(value)]
    )
    return nearby | VALUES


def check_loaded(loaded, report, content):
    """Assert that a report that was loaded is whole: it does all that reports do, and says what it said."""
    assert all(line.isprintable() for line in str(loaded).split("\n"))
    assert summary({"a": loaded}).count("\n") == 1
    with np.errstate(all="ignore"):
        assert np.isfinite(loaded.measure.density(np.linspace(-1.0, 1.0, 5))).all()
    assert loaded.trace.low <= loaded.trace.high
    assert loaded.top(1)[0].value == loaded.lambda_max.value
    loaded.plot().canvas.draw()
    if loaded.criteria.exponent == report.criteria.exponent:
        hesd.compare({"a": loaded, "b": loaded})
    for estimates, wanted in ((loaded.criteria, report.criteria), (loaded.type_evidence, report.type_evidence)):
        for field in dataclasses.fields(estimates):
            found, own = getattr(estimates, field.name), getattr(wanted, field.name)
            if isinstance(found, hesd.Estimate):
                np.testing.assert_allclose(
                    [found.value, found.low, found.high], [own.value, own.low, own.high], rtol=1e-3, atol=3e-5
                )
    assert loaded.hesd_type is report.hesd_type
    for ours, theirs in zip(loaded.measure.nodes, report.measure.nodes, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-3 * report.measure.largest_magnitude)
    for name in FORMAT_FIELDS:
        del content[name]
    again = loaded.to_saved().to_dict()
    assert json.dumps(again, sort_keys=True) == json.dumps(as_read(content, again), sort_keys=True)


def as_read(content, like):
    """The content with integers turned into floats where fields are floats, as reading does."""
    if isinstance(content, dict):
        return {name: as_read(value, like[name]) for name, value in content.items()}
    if isinstance(content, list):
        return [as_read(value, other) for value, other in zip(content, like, strict=True)]
    return float(content) if isinstance(like, float) and not isinstance(content, bool) else content


@settings(max_examples=300, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_an_altered_file_is_refused_or_read_as_it_is(saved, report, path, data):
    content = copy.deepcopy(saved)
    places = [where for where in fields_of(saved) if where]
    tops = {where[0] for where in places}
    kind = data.draw(st.sampled_from(["replace", "replace", "replace", "delete", "add", "cut"]))
    # every top field as often as another, however much is in it
    top = data.draw(st.sampled_from(sorted(tops)))
    where = data.draw(st.sampled_from([place for place in places if place[0] == top]))
    parent, last = at(content, where[:-1]), where[-1]
    if kind == "replace":
        parent[last] = data.draw(mutated(parent[last]))
    elif kind == "delete":
        del parent[last]
    elif kind == "add" and isinstance(parent, dict):
        parent[data.draw(st.sampled_from(["surprise", "", "value", "group"]))] = data.draw(VALUES)
    elif kind == "add":
        parent.insert(last, data.draw(VALUES))
    text = json.dumps(content)
    if kind == "cut":
        begin = data.draw(st.integers(0, len(text)))
        text = text[:begin] + text[begin + data.draw(st.sampled_from([1, 2, 10, len(text)])) :]
    path.write_text(text)
    try:
        loaded = hesd.load_report(path)
    except hesd.CheckpointError:
        event("refused")
        return
    event("read")
    check_loaded(loaded, report, json.loads(text))


_Number = TypeVar("_Number")
_Alias = TypeAliasType("_Alias", np.ndarray[tuple[Any, ...], np.dtype[_Number]], type_params=(_Number,))


@dataclasses.dataclass(frozen=True, eq=False)
class _Arrays:
    plain: np.ndarray[tuple[Any, ...], np.dtype[np.float64]]
    aliased: _Alias[np.float64]


def test_arrays_are_read_by_whatever_name_numpy_has_for_them():
    found = read_record(_Arrays, {"plain": [[1.0, 2.0]], "aliased": [[3.0], [4.0]]})
    assert found.plain.tolist() == [[1.0, 2.0]]
    assert found.aliased.tolist() == [[3.0], [4.0]]
