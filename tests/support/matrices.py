"""Symmetric matrices of PyTorch with known eigenvalues."""

from __future__ import annotations

import torch

DTYPES = [torch.float64, torch.float32]
"""What the engine computes in."""


def matrix_with(eigenvalues, dtype=torch.float64, seed=0):
    n = len(eigenvalues)
    generator = torch.Generator().manual_seed(seed)
    q, _ = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64, generator=generator))
    matrix = (q * torch.as_tensor(eigenvalues, dtype=torch.float64)) @ q.T
    return ((matrix + matrix.T) / 2).to(dtype)
