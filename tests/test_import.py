"""Importing the package: nothing heavy before it is needed, and every name the same in any order of imports."""

from __future__ import annotations

import importlib
import pickle
import subprocess
import sys
from types import FunctionType

import pytest
import torch
from torch import nn

import hesd_fast as hesd
from hesd_fast import choices

HEAVY = ("torch", "numpy", "scipy", "matplotlib", "rich", "hesd_fast.engine._engine")
LOADED = f"print([name for name in {HEAVY} if name in __import__('sys').modules])"

EVERY_NAME = """
import sys
import hesd_fast
from hesd_fast import public
assert len(public.__all__) > 40
for name in public.__all__:
    assert getattr(hesd_fast, name) is getattr(public, name), name
for name in ("errors", "hvp", "operators"):
    assert getattr(hesd_fast, name) is sys.modules["hesd_fast." + name], name
assert list(sys.modules).index("torch") < list(sys.modules).index("hesd_fast.engine._engine")
"""

ORDERS = [
    "import hesd_fast",
    "import hesd_fast.analysis.whole_spectrum; hesd_fast.analyze",
    "import hesd_fast.analysis, hesd_fast.report.report; assert callable(hesd_fast.plan)",
    "from hesd_fast import plan; import hesd_fast.analysis.run_plan; assert callable(plan)",
    "from hesd_fast.problem.problem import Problem; import hesd_fast; hesd_fast.analyze",
    "import hesd_fast; hesd_fast.Problem; import hesd_fast.methodology.generalization_criteria",
    "import hesd_fast.cli.main; import hesd_fast; hesd_fast.plan",
    "from hesd_fast import *; assert callable(analyze); losses.supervised",
    "from hesd_fast.engine import _engine",
    "import hesd_fast.engine._engine",
    "from hesd_fast.engine._engine import build_info",
    "import importlib; importlib.import_module('hesd_fast.engine._engine')",
    "from hesd_fast import kernels; kernels.panel_gram",
    "import hesd_fast.public",
    "import hesd_fast as hesd; hesd.hvp.STRATEGIES; hesd.operators.hessian_blocks; hesd.analyze",
]


def run(code):
    """What a Python process of its own prints."""
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout


@pytest.mark.parametrize("first", ORDERS)
def test_every_name_is_the_same_whatever_is_imported_first(first):
    run(f"{first}\n{EVERY_NAME}")


@pytest.mark.parametrize(
    "code", ["import hesd_fast; hesd_fast.__version__", "import hesd_fast.cli.main, hesd_fast.errors"]
)
def test_nothing_heavy_is_loaded_before_it_is_needed(code):
    assert run(f"{code}\n{LOADED}") == "[]\n"


def test_scipy_and_matplotlib_wait_until_they_are_used():
    parts = ["scipy.linalg", "scipy.optimize", "scipy.sparse", "scipy.stats", "matplotlib"]
    assert run(f"import sys; from hesd_fast import analyze\nprint([n for n in {parts} if n in sys.modules])") == "[]\n"


def test_loading_draws_no_random_numbers():
    code = "import random; before = random.getstate(); import hesd_fast; hesd_fast.analyze"
    assert run(f"{code}\nprint(random.getstate() == before)") == "True\n"


def test_a_name_that_there_is_not_is_refused_as_ever():
    with pytest.raises(AttributeError, match="module 'hesd_fast' has no attribute 'analyse'"):
        hesd.analyse  # noqa: B018
    with pytest.raises(ImportError, match="cannot import name 'analyse' from 'hesd_fast'"):
        from hesd_fast import analyse  # noqa: F401
    for name in ("a.b", "analyze.b", "", "a b", "a-b.c"):
        assert not hasattr(hesd, name)
    # tools ask for such names; that loads nothing
    assert run(f"import hesd_fast; hasattr(hesd_fast, '__wrapped__')\n{LOADED}") == "[]\n"


def test_names_are_listed_before_any_is_used():
    listed = run("import hesd_fast; print(*dir(hesd_fast))").split()
    assert set(hesd.__all__) | {"__version__", "__all__"} <= set(listed)


def test_a_name_that_was_replaced_stays_so(monkeypatch):
    monkeypatch.setattr(hesd, "analyze", fake := lambda: None)
    assert not hasattr(hesd, "analyse")
    assert hesd.analyze is fake
    monkeypatch.undo()
    assert isinstance(hesd.analyze, FunctionType)


def test_problems_reports_and_functions_are_unpickled_by_a_process_that_has_loaded_nothing(tmp_path):
    torch.manual_seed(0)
    data = (torch.randn(8, 3), torch.randn(8, 1))
    problem = hesd.Problem(nn.Linear(3, 1), hesd.losses.supervised(nn.MSELoss()), data)
    report = hesd.analyze(problem, max_steps=2, block_size=1, progress=False)
    (tmp_path / "pickled").write_bytes(pickle.dumps((problem, report, hesd.analyze, hesd.criteria, hesd.build_info)))
    printed = run(
        "import pickle; from pathlib import Path\n"
        f"problem, report, *functions = pickle.loads(Path({str(tmp_path / 'pickled')!r}).read_bytes())\n"
        "import hesd_fast as hesd\n"
        "assert functions == [hesd.analyze, hesd.criteria, hesd.build_info]\n"
        "assert type(problem) is hesd.Problem and type(report) is hesd.Report\n"
        "print(repr(report.lambda_max.value))"
    )
    assert float(printed) == report.lambda_max.value


@pytest.mark.parametrize(
    ("names", "module", "table"),
    [
        (choices.OPERATORS, "hesd_fast.analysis.whole_spectrum", "OPERATORS"),
        (choices.PROTOCOLS, "hesd_fast.lanczos.options", "PROTOCOLS"),
        (choices.BASIS_DTYPES, "hesd_fast.lanczos.basis_storage", "BASIS_DTYPES"),
        (choices.STRATEGIES, "hesd_fast.hvp", "ALL_STRATEGIES"),
    ],
)
def test_the_names_of_choices_are_those_of_what_they_choose(names, module, table):
    assert list(names) == list(getattr(importlib.import_module(module), table))
