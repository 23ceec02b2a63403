"""The baseline of the benchmarks computes what the engine computes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import hesd_fast as hesd
from hesd_fast.engine import reference

SIZE = 60


def matrix():
    """A symmetric matrix with a few eigenvalues of both signs well outside of the others."""
    values = torch.linspace(-0.1, 0.1, SIZE, dtype=torch.float64)
    values[:2], values[-3:] = torch.tensor([-1.0, -0.5]), torch.tensor([1.0, 2.0, 4.0])
    vectors, _ = torch.linalg.qr(
        torch.randn(SIZE, SIZE, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    )
    product = (vectors * values) @ vectors.T
    return (product + product.T) / 2


def probe(seed):
    vector = torch.empty((1, SIZE), dtype=torch.float64)
    reference.fill_probes(vector, seed)
    return vector[0]


@pytest.mark.parametrize("seed", [0, 7])
@pytest.mark.parametrize("steps", [1, 2, 12, 30])
def test_baseline_gives_the_nodes_and_weights_of_the_engine(steps, seed):
    operator = matrix()
    nodes, weights = reference.lanczos_quadrature(lambda vector: operator @ vector, probe(seed), steps)
    measure = hesd.SpectralMeasure.from_tridiagonal(
        hesd.block_lanczos(operator, steps=steps, block_size=1, seed=seed, probe_kind="rademacher")
    )
    assert len(nodes) == steps
    epsilon = torch.finfo(torch.float64).eps
    largest = float(nodes.abs().max())
    np.testing.assert_allclose(nodes.numpy(), measure.nodes[0], rtol=0, atol=64 * epsilon * largest)
    # weights are squares of eigenvector entries, which move by epsilon over the gap between nodes
    np.testing.assert_allclose(weights.numpy(), measure.weights[0], rtol=0, atol=1024 * epsilon)


def test_baseline_is_exact_when_the_krylov_space_is_invariant():
    values = torch.tensor([-1.0, 0.0, 3.0], dtype=torch.float64).repeat(SIZE // 3)
    nodes, weights = reference.lanczos_quadrature(lambda vector: values * vector, probe(3), 10)
    epsilon = torch.finfo(torch.float64).eps
    # a Rademacher probe sees every eigenvalue with its exact share
    np.testing.assert_allclose(nodes.numpy(), [-1.0, 0.0, 3.0], rtol=0, atol=64 * epsilon * 3)
    np.testing.assert_allclose(weights.numpy(), [1 / 3] * 3, rtol=0, atol=64 * epsilon)
