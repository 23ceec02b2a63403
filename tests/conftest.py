"""One thread for all that does not ask for more: the tests are small, threads would only wait for each other."""

from __future__ import annotations

import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # read when NumPy is first imported

import pytest
import torch


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def float64_by_default():
    """New tensors and modules are of float64."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


@pytest.fixture
def traced_alone(monkeypatch):
    """Compiling takes seconds a model: what torch.compile gets runs as it is. test_compiled compiles."""
    monkeypatch.setattr(torch, "compile", lambda program, **_: program)
