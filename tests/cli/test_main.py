"""The command line: what it prints, what it writes, how it fails."""

from __future__ import annotations

import subprocess
import sys

import pytest
from click.testing import CliRunner

import hesd_fast as hesd
from hesd_fast.analysis.settings import DEFAULT_BLOCK_SIZE, DEFAULT_MAX_STEPS
from hesd_fast.cli.main import main
from hesd_fast.terminal import file_name

PROBLEM = """
import torch
from torch import nn
import hesd_fast as hesd

def build():
    torch.manual_seed(0)
    return hesd.Problem(nn.Linear(4, 2), hesd.losses.supervised(nn.MSELoss()), (torch.randn(30, 4), torch.randn(30, 2)))

def wrong():
    return 3

def needs(path):
    return build()

number = 4
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "cli_problem.py").write_text(PROBLEM)
    yield tmp_path
    sys.modules.pop("cli_problem", None)


def run(*arguments):
    return CliRunner().invoke(main, list(arguments))


@pytest.mark.parametrize("target", ["cli_problem:build", "cli_problem.py:build"])
def test_analyze_writes_report_and_picture(folder, target):
    result = run("analyze", target, "--out", "results", "--max-steps", "3", "--block-size", "2", "--seed", "5")
    assert result.exit_code == 0, result.output
    assert "mainly positive" in result.output
    report = hesd.load_report(folder / "results" / "report.hesd.json")
    assert report.options["max_steps"] == 3
    assert report.options["block_size"] == 2
    assert report.options["seed"] == 5
    assert (folder / "results" / "report.png").stat().st_size > 0


def test_groups_are_analysed_by_module_or_by_name(folder):
    result = run("analyze", "cli_problem:build", "--groups", "parameters", "--out", "a", "--max-steps", "3")
    assert result.exit_code == 0, result.output
    rows = [line.split() for line in result.output.splitlines()]
    assert [row[:3] for row in rows[1:3]] == [["weight", "8", "MP"], ["bias", "2", "MP"]]
    assert rows[0] == ["parameters", "type", "lambda_max", "lambda_min", "trace", "r_e", "K_Hn"]
    report = hesd.load_report(folder / "a" / "bias.hesd.json")
    assert report.group == "bias"
    assert report.problem.parameters == ("bias",)
    assert (folder / "a" / "groups.png").stat().st_size > 0
    result = run("analyze", "cli_problem:build", "--group", "both=.*", "--group", "w=weight", "--out", "b")
    assert result.exit_code == 0, result.output
    assert hesd.load_report(folder / "b" / "both.hesd.json").problem.size == 10
    assert hesd.load_report(folder / "b" / "w.hesd.json").problem.size == 8


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--group", "bias"), "--group is 'bias'; wanted NAME=REGEX"),
        (("--group", "=bias"), "--group is '=bias'; wanted NAME=REGEX"),
        (("--group", "a=bias", "--group", "a=weight"), "--group 'a' was given twice"),
        (("--group", "a=bias", "--groups", "modules"), "--groups modules and --group were given"),
        (("--groups", "modules", "--operator", "gauss_newton"), "--operator gauss_newton has no groups"),
    ],
)
def test_groups_that_cannot_be_used_are_named(folder, options, message):
    result = run("analyze", "cli_problem:build", *options, "--out", "c")
    assert result.exit_code == 1
    assert message in " ".join(result.output.split())


def test_groups_of_any_name_are_written_into_the_folder(folder):
    names = [str(folder / "elsewhere"), "x/y", "..", "ok", "\x1b[2J", "long" * 60]
    (folder / "named.py").write_text(
        PROBLEM.replace("nn.Linear(4, 2), hesd.l", "model, hesd.l").replace(
            "    return hesd.P",
            f"    model = nn.Sequential(nn.Linear(4, 2))\n    for name in {names!r}:\n"
            "        part = nn.Linear(2, 2)\n        model._modules[name] = part\n    return hesd.P",
        )
    )
    before = set(folder.iterdir())
    result = run("analyze", "named.py:build", "--groups", "modules", "--out", "a/b", "--max-steps", "2")
    assert result.exit_code == 0, result.output
    assert set(folder.iterdir()) - before <= {folder / "a", folder / "__pycache__"}
    assert list((folder / "a").iterdir()) == [folder / "a" / "b"]
    files = sorted((folder / "a" / "b").glob("*.hesd.json"))
    assert {hesd.load_report(file).group for file in files} == {"0", *names[:3], *names[3:]}
    assert {"ok.hesd.json", "x%2Fy.hesd.json", "%2E..hesd.json", "%1B[2J.hesd.json"} <= {file.name for file in files}
    assert all(len(file.name) < 200 for file in files)
    assert run("analyze", "cli_problem:build", "--group", "../b/c=bias", "--out", "c").exit_code == 0
    assert [path.name for path in (folder / "c").glob("*.json")] == ["%2E.%2Fb%2Fc.hesd.json"]


def test_different_names_have_different_files():
    names = ["", "%", ".", "..", "%2E", "a/b", "a%2Fb", "a\\b", "a:b", "é", "\ud800", "a" * 300, "a" * 301, "b\0"]
    files = [file_name(name) for name in names]
    assert len(set(files)) == len(names)
    assert all(name and name.isprintable() and len(name.encode()) <= 160 for name in files)
    assert not any(set(name) & set('/\\:*?"<>|') or name.startswith(".") for name in files)
    assert file_name("layers.0.conv-1 (a)") == "layers.0.conv-1 (a)"


def test_plan_says_what_a_run_takes(folder):
    result = run("plan", "cli_problem:build", "--max-steps", "3")
    assert result.exit_code == 0, result.output
    assert "peak memory of the process: about" in result.output


def test_analyze_passes_mode_and_protocol_on(folder):
    assert run("analyze", "cli_problem:build", "--reorthogonalization", "none", "--out", "a").exit_code == 0
    assert hesd.load_report(folder / "a" / "report.hesd.json").options["reorthogonalization"] == "none"
    assert run("analyze", "cli_problem:build", "--protocol", "lla", "--out", "b").exit_code == 0
    result = run("analyze", "cli_problem:build", "--operator", "gauss_newton", "--max-steps", "2", "--out", "c")
    assert result.exit_code == 0
    assert "of the Gauss-Newton matrix" in result.output
    assert hesd.load_report(folder / "b" / "report.hesd.json").options["protocol"] == "lla"


def test_compare_reads_saved_reports(folder):
    run("analyze", "cli_problem:build", "--out", "a")
    result = run("compare", "a/report.hesd.json")
    assert result.exit_code == 1
    assert "at least one other" in result.output
    run("analyze", "cli_problem:build", "--out", "b", "--seed", "1")
    result = run("compare", "a/report.hesd.json", "b/report.hesd.json")
    assert result.exit_code == 0, result.output
    assert "generalization: holds" in result.output


def test_compare_with_itself(folder):
    run("analyze", "cli_problem:build", "--out", "a")
    result = run("compare", "a/report.hesd.json", "a/report.hesd.json")
    assert result.exit_code == 0, result.output
    assert "reference 1. a/report.hesd.json" in result.output
    assert "2. a/report.hesd.json: mainly positive; generalization: holds" in result.output


def test_compare_refuses_other_weights_unless_told(folder):
    (folder / "later.py").write_text(
        PROBLEM.replace(
            "return hesd.Problem(nn.Linear(4, 2)",
            "model = nn.Linear(4, 2)\n    model.bias.data += 1.0\n    return hesd.Problem(model",
        )
    )
    for target, out in (("cli_problem.py:build", "a"), ("later.py:build", "b")):
        assert run("analyze", target, "--out", out, "--max-steps", "3").exit_code == 0
    files = ("a/report.hesd.json", "b/report.hesd.json")
    result = run("compare", *files)
    assert result.exit_code == 1
    assert "ProblemError: 'b/report.hesd.json' is of weights with the digest" in result.output
    result = run("compare", "--weights-may-differ", *files)
    assert result.exit_code == 0, result.output
    assert "this compares checkpoints of a network" in result.output


def test_errors_do_nothing_to_a_terminal(folder):
    (folder / "\x1b[2J.json").write_text("{}")
    result = run("compare", "\x1b[2J.json")
    assert result.exit_code == 1
    assert r"\x1b[2J.json' is not a report" in result.output
    (folder / "raising.py").write_text(
        "import hesd_fast as hesd\ndef build():\n    raise hesd.ProblemError('one\\ntwo \\x1b[2J \\ud800')\n"
    )
    result = run("analyze", "raising.py:build")
    assert result.exit_code == 1
    assert result.output.strip() == "Error: ProblemError: one\ntwo \\x1b[2J \\ud800"


def test_a_file_is_not_taken_for_a_module_of_the_same_name(folder):
    (folder / "sub").mkdir()
    (folder / "sub" / "json.py").write_text("from hesd_cli_helper import build\n")
    (folder / "sub" / "hesd_cli_helper.py").write_text(PROBLEM)
    before = list(sys.path)
    result = run("analyze", "sub/json.py:build", "--max-steps", "2", "--out", "a")
    assert result.exit_code == 0, result.output
    assert sys.path == before
    assert sys.modules["json"].__name__ == "json"
    del sys.modules["hesd_cli_helper"]


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("nothing", "module:function"),
        (":build", "module:function"),
        ("cli_problem:", "module:function"),
        ("no_such_module:build", "there is no module 'no_such_module'"),
        ("no_such_file.py:build", "there is no file 'no_such_file.py'"),
        ("cli_problem:missing", "no function 'missing'"),
        ("cli_problem:number", "no function 'number'"),
        ("cli_problem:wrong", "returned a int"),
        ("cli_problem:needs", "cli_problem:needs cannot be called without arguments: missing a required argument"),
        ("cli_problem.py:missing", "'cli_problem.py' has no function 'missing'"),
    ],
)
def test_bad_targets_are_explained_without_a_traceback(folder, target, message):
    result = run("analyze", target)
    assert result.exit_code == 1
    assert message in result.output
    assert "Traceback" not in result.output
    assert not (folder / "hesd-report").exists()


def test_bad_options_are_explained(folder):
    result = run("analyze", "cli_problem:build", "--block-size", "99")
    assert result.exit_code == 1
    assert "block_size is 99" in result.output
    result = run("analyze", "cli_problem:build", "--max-steps", "2", "--protocol", "lla")
    assert result.exit_code == 1
    assert "leave them out" in result.output


@pytest.mark.parametrize("command", [("analyze", "cli_problem:build"), ("demo",)])
@pytest.mark.parametrize("out", ["taken/inside", "/proc"])
def test_an_unwritable_folder_is_explained_before_the_analysis(folder, monkeypatch, command, out):
    if out == "/proc" and not sys.platform.startswith("linux"):
        pytest.skip("a folder that nobody can write to is only known on Linux")
    monkeypatch.setattr(hesd, "analyze", lambda *_, **__: pytest.fail("the analysis began"))
    (folder / "taken").write_text("a file")
    result = run(*command, "--out", out)
    assert result.exit_code == 1
    assert f"'{out}' cannot be made or written to" in result.output


def test_info_shows_the_build():
    result = run("info")
    assert result.exit_code == 0
    for word in (
        hesd.__version__,
        "cpu_target",
        "avx" if "avx2" in hesd.build_info()["cpu_targets_available"] else "generic",
    ):
        assert word in result.output


@pytest.mark.parametrize(
    "arguments",
    [("--version",), ("--help",), *((name, "--help") for name in sorted(main.commands)), ("analyze", "--x")],
)
def test_version_and_help_load_nothing_heavy(arguments):
    code = (
        "import atexit, sys\n"
        "from hesd_fast.cli.main import main\n"
        "heavy = ('torch', 'numpy', 'scipy', 'matplotlib', 'rich')\n"
        "atexit.register(lambda: print([name for name in heavy if name in sys.modules]))\n"
        f"main({list(arguments)}, prog_name='hesd')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == (2 if "--x" in arguments else 0), done.stderr
    assert done.stdout.endswith("[]\n")


def test_help_names_the_defaults():
    for command in ("analyze", "plan"):
        shown = " ".join(run(command, "--help").output.split())
        for default in (DEFAULT_BLOCK_SIZE, DEFAULT_MAX_STEPS, "full", "auto"):
            assert f"[default: {default}]" in shown


def test_version_and_help():
    assert run("--version").output == f"hesd, version {hesd.__version__}\n"
    for command in ("demo", "analyze", "compare", "info"):
        assert command in run("--help").output
        assert run(command, "--help").exit_code == 0


def test_demo_analyses_both_splits(folder):
    result = run("demo", "--out", "demo")
    assert result.exit_code == 0, result.output
    assert "reference train: mainly positive" in result.output
    for name in ("train.hesd.json", "test.hesd.json", "demo.png"):
        assert (folder / "demo" / name).stat().st_size > 0
