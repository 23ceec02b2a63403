"""Kernels against plain PyTorch: one orthogonalization sweep and one Gram matrix, checked before they are timed.

make bench
"""

from __future__ import annotations

import pytest
import torch

from hesd_fast import kernels, reference

N, K = 2_000_000, 32


def panels(block):
    basis = kernels.empty_panel(K, N)
    work = kernels.empty_panel(block, N)
    kernels.fill_probes(basis, 0)
    kernels.fill_probes(work, 1, kind="gaussian")
    kernels.panel_orthonormalize(basis)
    return basis, work


def engine_sweep(basis, work):
    first = kernels.panel_gram(basis, work)
    second, _ = kernels.panel_project(work, basis, first)
    kernels.panel_project(work, basis, second)


def pytorch_sweep(basis, work):
    for _ in range(2):
        work -= (basis @ work.T).T @ basis


@pytest.mark.parametrize("block", [1, 4, 8])
@pytest.mark.parametrize("sweep", [engine_sweep, pytorch_sweep], ids=["engine", "pytorch"])
def test_two_pass_gram_schmidt(benchmark, sweep, block):
    basis, work = panels(block)
    checked = work.clone()
    sweep(basis, checked)
    overlap = reference.panel_gram(basis, checked).abs().max()
    assert overlap <= 8 * torch.finfo(torch.float32).eps * checked.double().norm(dim=1).max()
    benchmark(sweep, basis, work)


@pytest.mark.parametrize("block", [1, 4, 8])
@pytest.mark.parametrize("gram", [kernels.panel_gram, lambda v, w: v @ w.T], ids=["engine", "pytorch"])
def test_panel_gram(benchmark, gram, block):
    basis, work = panels(block)
    error = (gram(basis, work).double() - reference.panel_gram(basis, work)).abs().max()
    assert error <= 64 * torch.finfo(torch.float32).eps * work.double().norm(dim=1).max()
    benchmark(gram, basis, work)
