"""The sanitizers see faults: planted ones, in a library built as the engine is, called from a Python like this one."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import native_engine
import pytest

SANITIZER = os.environ.get("HESD_NATIVE_SANITIZER")

PRELUDE = """
import ctypes, os
import numpy as np
faults = ctypes.CDLL(os.path.join(os.environ["HESD_NATIVE_ENGINE"], "planted_faults.so"))
for name in ("read_past_the_end", "read_after_free", "race"):
    getattr(faults, name).restype = ctypes.c_double
faults.read_misaligned.restype = ctypes.c_float
def address(array, beyond=0):
    return ctypes.c_void_p(array.ctypes.data + beyond)
def integer(value):
    return ctypes.c_int64(value)
short, long = np.ones(7), np.ones(5000)
out, seven = np.ones(256, dtype=np.float32), np.ones(7, dtype=np.float32)
faults.run_planted_kernel.restype = ctypes.c_char_p
def kernel(name, argument):  # of CUDA, emulated
    message = faults.run_planted_kernel(name, address(out), address(seven), integer(argument))
    assert message == b"", message
"""

FAULTS = {
    "address": [
        ("faults.read_past_the_end(address(short), integer(8))", "heap-buffer-overflow"),
        ("faults.read_past_the_end(address(long), integer(5001))", "heap-buffer-overflow"),
        ("faults.write_before_the_start(address(short))", "heap-buffer-overflow"),
        ("faults.read_after_free()", "heap-use-after-free"),
        ("faults.overflow(integer(2**63 - 1))", "signed integer overflow"),
        ("faults.read_misaligned(address(short))", "misaligned address"),
        ("kernel(b'copy', 8)", "heap-buffer-overflow"),
        ("kernel(b'write_shared', 101)", "heap-buffer-overflow"),
    ],
    "thread": [
        ("faults.race()", "ThreadSanitizer: data race"),
        ("kernel(b'hand_over', 0)", "ThreadSanitizer: data race"),  # no __syncthreads
        ("kernel(b'add_from_all_blocks', 0)", "ThreadSanitizer: data race"),
    ],
}
INNOCENT = {
    "address": [
        "faults.read_past_the_end(address(short), integer(7))",
        "faults.write_before_the_start(address(short, 8))",
        "faults.overflow(integer(2**63 - 2))",
        "faults.read_misaligned(address(short, 3))",
        "kernel(b'copy', 7)",
        "kernel(b'write_shared', 100)",
    ],
    "thread": [
        "faults.no_race(address(long), integer(5000))",
        "kernel(b'hand_over', 1)",
        "kernel(b'add_from_all_blocks', 1)",
    ],
}

pytestmark = pytest.mark.skipif(SANITIZER is None, reason="the engine under test has no sanitizer: `make native-test`")


def run(call):
    return subprocess.run(
        [sys.executable, "-c", PRELUDE + call], check=False, capture_output=True, text=True, timeout=120
    )


@pytest.mark.parametrize(("call", "report"), FAULTS.get(SANITIZER or "", []))
def test_a_planted_fault_ends_the_process_with_a_report(call, report):
    ended = run(call)
    assert ended.returncode != 0, call
    assert report in ended.stderr
    assert re.search(r"planted_(faults\.cpp|cuda_faults\.cu):\d+", ended.stderr)  # the report names the line


@pytest.mark.parametrize("call", INNOCENT.get(SANITIZER or "", []))
def test_the_same_without_the_fault_is_silent(call):
    ended = run(call)
    assert ended.returncode == 0, ended.stderr
    assert ended.stderr == ""


def test_no_pytorch_in_the_process():
    assert "torch" not in sys.modules
    assert native_engine.load().__file__.startswith(os.environ["HESD_NATIVE_ENGINE"])
