"""What is said of the CUDA kernels: the table of bytes, and the reading of ptxas' reports."""

from __future__ import annotations

from pathlib import Path

import cuda_bench
import cuda_resources

DOCUMENT = Path(__file__).resolve().parents[1] / "docs" / "cuda.md"

REPORT = """ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z4fastPf' for 'sm_80'
ptxas info    : Function properties for _Z4fastPf
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 42 registers, used 1 barriers, 416 bytes cmem[0]
ptxas info    : Compiling entry function '_Z4slowPf' for 'sm_90'
ptxas info    : Function properties for _Z4slowPf
    16 bytes stack frame, 20 bytes spill stores, 28 bytes spill loads
ptxas info    : Used 128 registers, used 1 barriers, 1024 bytes smem, 432 bytes cmem[0], 12 bytes cmem[2]
"""


def test_document_holds_the_table_of_bytes():
    assert cuda_bench.table() in DOCUMENT.read_text(encoding="utf-8")


def test_no_kernel_moves_a_tenth_more_than_the_ideal():
    for kernel in cuda_bench.KERNELS:
        for b in (1, 4, 8):
            for v in (4, 2):
                size = cuda_bench.Size(10**6, 100, b, v, 4)
                assert kernel.ideal(size) <= kernel.moved(size) <= 1.1 * kernel.ideal(size), kernel.name


def test_reports_of_ptxas_are_read_and_spills_named():
    fast, slow = cuda_resources.parse(REPORT)
    assert fast == {
        "kernel": "_Z4fastPf", "architecture": "sm_80",
        "registers": 42, "shared": 0, "stack": 0, "spill_stores": 0, "spill_loads": 0,
    }  # fmt: skip
    assert slow["shared"] == 1024
    assert (slow["registers"], slow["stack"], slow["spill_stores"], slow["spill_loads"]) == (128, 16, 20, 28)
    assert cuda_resources.wasteful([fast]) == []
    (line,) = cuda_resources.wasteful([fast, slow])
    assert line == "_Z4slowPf (sm_90): 16 bytes of stack, 20 stored and 28 loaded by spills"
