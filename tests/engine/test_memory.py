"""What is said about memory: now, at its peak, and in advance."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import numpy as np
import pytest

from hesd_fast.engine.memory import MemoryWatch, available_memory, peak_memory, resident_memory

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="memory is read from /proc")

SIZE = 64 * 2**20

RUN = """
import sys
import torch
from torch import nn
import hesd_fast as hesd
from hesd_fast.engine.memory import peak_memory

what, sizes = sys.argv[1], [int(size) for size in sys.argv[2].split(",")]
torch.manual_seed(0)
layers = [nn.Linear(256, 512), nn.GELU(), nn.Linear(512, 512), nn.GELU(), nn.Linear(512, 10)]
data = [(torch.randn(size, 256), torch.randint(10, (size,))) for size in sizes]
problem = hesd.Problem(nn.Sequential(*layers), hesd.losses.supervised(nn.CrossEntropyLoss()), data)
options = {"block_size": 4, "max_steps": 12}
if what == "plan":
    print(hesd.plan(problem, **options).peak_bytes)
else:
    hesd.analyze(problem, **options, progress=False)
    print(peak_memory())
"""


def in_a_process(*arguments: str) -> int:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", RUN, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return int(done.stdout.split()[-1])


@pytest.mark.parametrize(
    ("sizes", "lowest", "highest"),
    [("512", 0.9, 1.1), ("512,512,512,512", 0.9, 1.1), ("2048,2048,64", 0.9, 1.1), ("128,4096", 0.8, 1.3)],
    ids=["one batch", "equal batches", "the last one smaller", "the last one larger"],
)
def test_the_peak_of_a_run_is_predicted(sizes, lowest, highest):
    predicted, measured = in_a_process("plan", sizes), in_a_process("analyze", sizes)
    assert lowest <= predicted / measured <= highest


def test_memory_that_comes_and_goes_is_seen():
    with MemoryWatch() as watch:
        watch.peak()
        before = resident_memory()
        block = np.ones(SIZE, dtype=np.uint8)
        time.sleep(0.1)
        with_block = resident_memory()
        del block
        time.sleep(0.1)
        assert resident_memory() <= before + SIZE // 4
        assert before + 3 * SIZE // 4 <= with_block <= watch.peak() <= with_block + SIZE // 4
        assert watch.peak() <= before + SIZE // 4


def test_the_peak_is_above_what_is_there():
    assert 0 < resident_memory() <= peak_memory() + 2**20
    assert available_memory() > 0


def test_systems_that_do_not_say_get_no_prediction(monkeypatch):
    monkeypatch.setattr("hesd_fast.engine.memory.resident_memory", lambda: None)
    with MemoryWatch() as watch:
        assert watch.peak() is None
