"""What the machine can do at most, in this run: read bandwidth and the rate of matrix products."""

from __future__ import annotations

import contest
import numpy as np
import torch
from conftest import record


def read_probes(values: torch.Tensor) -> list[contest.Limit]:
    """Ways to read a contiguous float32 tensor once, as limits."""
    flat = values.view(-1)
    half = flat.numel() // 2
    first, second = flat[:half], flat[half : 2 * half]
    arrays = first.numpy(), second.numpy()
    size = flat.numel() * flat.element_size()
    return [
        contest.Limit("read_bandwidth", "torch.sum", lambda: flat.sum(), size),
        contest.Limit("read_bandwidth", "torch.dot", lambda: torch.dot(first, second), size),
        contest.Limit("read_bandwidth", "torch.linalg.vector_norm", lambda: torch.linalg.vector_norm(flat), size),
        contest.Limit("read_bandwidth", "numpy.dot", lambda: np.dot(*arrays), size),
    ]


def gemm_probes(order: int) -> list[contest.Limit]:
    """Square matrix products in float32 and float64, as limits."""
    probes = []
    for dtype in (torch.float32, torch.float64):
        a, b = torch.randn(2, order, order, dtype=dtype)
        out = torch.empty(order, order, dtype=dtype)
        kind = f"gemm_{str(dtype).removeprefix('torch.')}"
        probes.append(
            contest.Limit(
                kind, f"torch.mm, order {order}", lambda a=a, b=b, out=out: torch.mm(a, b, out=out), 2 * order**3
            )
        )
    return probes


def test_limits(request, benchmark, sizes):
    values = torch.ones(sizes.basis * sizes.panel_lengths[1])
    limits = read_probes(values) + gemm_probes(sizes.gemm)

    def everything():
        for limit in limits:
            limit.round()

    everything()  # warm-up
    for limit in limits:
        limit.times.clear()
    benchmark.pedantic(everything, rounds=sizes.rounds)
    read = f"{values.numel() * 4 / 1e9:.2f} GB"
    row = {
        "about": f"reading {read}; products of order {sizes.gemm}",
        "limits": contest.best_limits(limits, every=True),
    }
    benchmark.extra_info.update(row)
    record(request, row)
