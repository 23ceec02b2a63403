"""Partial reorthogonalization: what the estimate says against what is measured, and what that saves."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from test_lanczos_run import DTYPES, hessian_like, matrix_with

from hesd_fast import kernels
from hesd_fast.engine import _engine
from hesd_fast.lanczos.drive import block_lanczos

_RANDOM = np.random.default_rng(1)
SPECTRA = {
    "hessian": hessian_like(),
    "clustered": np.concatenate(
        [np.repeat([1.0, 2.0, 3.0, 5.0], 70) + _RANDOM.normal(0, 1e-3, 280), _RANDOM.normal(0, 1e-2, 20)]
    ),
    "indefinite": np.concatenate([-np.geomspace(1, 1e-4, 150), np.geomspace(1, 1e-4, 150)]),
    "geometric": np.geomspace(1, 1e-8, 300),
    "repeated": np.repeat(np.linspace(0.1, 1, 30), 10),
    "low rank": np.concatenate([np.geomspace(1, 1e-3, 60), np.zeros(240)]),
    "outliers": np.concatenate([_RANDOM.normal(0, 1e-4, 290), np.geomspace(1e-2, 1e3, 10)]),
}
STEPS = {1: 90, 2: 60, 3: 40, 4: 40}


class Diagonal:
    """A diagonal operator whose products may be off by noise of a given size, relative to its largest eigenvalue."""

    device = torch.device("cpu")
    products = 0

    def __init__(self, eigenvalues, dtype, noise=0.0):
        self.dtype, self.size = dtype, len(eigenvalues)
        self.diagonal = torch.as_tensor(eigenvalues, dtype=dtype)
        self.noise = noise * float(self.diagonal.abs().max()) / self.size**0.5
        self.generator = torch.Generator().manual_seed(0)

    def matmat(self, panel, out=None):
        torch.mul(panel, self.diagonal, out=out)
        if self.noise:
            out.add_(torch.randn(panel.shape, generator=self.generator, dtype=self.dtype), alpha=self.noise)
        return out


class Stepwise:
    """Runs the engine in partial mode; the measured and the estimated overlap of every block with all before it."""

    def __init__(self, multiply, n, steps, block, dtype, seed=0):
        history = kernels.empty_panel(0, n, dtype)
        working = kernels.empty_panel((steps + 1) * block, n, dtype)
        self.engine = engine = _engine.BlockLanczos(history, working, block, steps, n, "partial", 8.0, None)
        kernels.fill_probes(working[engine.work_row :][:block], seed)
        engine.start()
        blocks = []
        measured, estimated = [], []
        while not engine.finished:
            row, width = engine.current_row, engine.current_width
            block_now = working[row : row + width].double()
            if blocks:
                measured.append(float((torch.cat(blocks) @ block_now.T).abs().max()))
                estimated.append(engine.estimated_overlap)
            blocks.append(block_now.clone())
            working[engine.work_row :][:width] = multiply(engine, working[row : row + width], blocks)
            engine.advance()
        self.widths = [len(one) for one in blocks]
        self.measured, self.estimated = np.array(measured), np.array(estimated)


def run(matrix, steps, block, seed):
    return Stepwise(lambda _, panel, __: panel @ matrix, len(matrix), steps, block, matrix.dtype, seed)


def quadrature(tridiagonal):
    """Ritz values and their weights, averaged over the probes."""
    values, vectors, _ = tridiagonal.ritz()
    weights = ((tridiagonal.start @ vectors[: tridiagonal.start.shape[1]]) ** 2).sum(axis=0)
    return values, weights / weights.sum()


def distance(one, other):
    """Wasserstein-1 distance: the area between the two distribution functions."""
    nodes = np.concatenate([one[0], other[0]])
    order = np.argsort(nodes, kind="stable")
    height = np.cumsum(np.concatenate([one[1], -other[1]])[order])
    return float((np.abs(height[:-1]) * np.diff(nodes[order])).sum())


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block", [1, 2, 3, 4])
def test_no_block_loses_more_than_8_times_the_square_root_of_epsilon(spectrum, dtype, block):
    matrix = matrix_with(SPECTRA[spectrum], dtype)
    root = torch.finfo(dtype).eps ** 0.5
    for seed in (0, 1, 2, 11, 15, 16):
        steps = run(matrix, STEPS[block], block, seed)
        assert steps.measured.max() <= 8 * root, seed


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block", [1, 3, 4])
def test_estimates_follow_what_is_measured(spectrum, dtype, block):
    # Random signs stand for rounding that nobody knows, so an estimate is an order of magnitude: within a factor of 30
    # above epsilon where it decides, and no more than 1e4 too high, which would only cost sweeps.
    matrix = matrix_with(SPECTRA[spectrum], dtype)
    epsilon = torch.finfo(dtype).eps
    for seed in (0, 1):
        steps = run(matrix, STEPS[block], block, seed)
        matters = steps.measured > epsilon**0.5 / 2
        assert (steps.measured[matters] <= 30 * steps.estimated[matters]).all(), seed
        assert (steps.estimated <= 1e4 * np.maximum(steps.measured, epsilon)).all(), seed


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block", [1, 3])
def test_the_measure_is_that_of_full_reorthogonalization(spectrum, dtype, block):
    matrix = matrix_with(SPECTRA[spectrum], dtype)
    scale = np.abs(SPECTRA[spectrum]).max()
    for seed in (0, 1):
        full, partial = (
            quadrature(block_lanczos(matrix, STEPS[block], block, seed=seed, reorthogonalization=mode))
            for mode in ("full", "partial")
        )
        assert distance(full, partial) <= 32 * torch.finfo(dtype).eps * scale, seed


@pytest.mark.parametrize(("dtype", "factor"), [(torch.float64, 1.5), (torch.float32, 1.0)])
@pytest.mark.parametrize("block", [1, 4])
def test_it_reads_fewer_vectors_of_the_basis(dtype, factor, block):
    # measured: 1.8 to 2.0 in float64, 1.3 to 1.4 in float32
    operator = Diagonal(hessian_like(2000), dtype)
    full, partial = (block_lanczos(operator, 100, block, reorthogonalization=mode) for mode in ("full", "partial"))
    assert full.steps == partial.steps == 100
    assert partial.basis_vectors_read * factor <= full.basis_vectors_read


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block", [1, 3])
@pytest.mark.parametrize("noise", [1e-4, 1e-3])
def test_noise_of_the_products_is_measured_and_taken_into_account(dtype, block, noise):
    operator = Diagonal(hessian_like(), dtype, noise)
    steps = Stepwise(lambda _, panel, __: operator.matmat(panel, torch.empty_like(panel)), 300, 60, block, dtype)
    assert steps.measured.max() <= 8 * torch.finfo(dtype).eps ** 0.5
    assert steps.engine.recurrence_error >= noise / 300**0.5  # one entry of it
    exact = Stepwise(lambda _, panel, __: panel * operator.diagonal, 300, 60, block, dtype)
    assert steps.engine.partial_sweeps >= exact.engine.partial_sweeps


def test_a_block_that_a_sweep_narrows_is_followed_by_an_estimate_of_its_new_width():
    # An operator that is not symmetric brings an old block back, of which a sweep leaves nothing but rounding.
    matrix = matrix_with(hessian_like())
    spoiled = []

    def multiply(engine, panel, blocks):
        product = panel @ matrix
        if not spoiled and engine.partial_sweeps == 1:
            spoiled.append(len(blocks))
            product[:3] += 0.2 * blocks[2][:3]
        return product

    steps = Stepwise(multiply, 300, 30, 4, torch.float64)
    assert spoiled
    assert 1 in steps.widths
    assert np.isfinite(steps.estimated).all()
    assert steps.measured.max() <= 8 * 2.0**-26


@pytest.mark.parametrize("storage", ["bfloat16", "float16"])
@pytest.mark.parametrize("block", [1, 4])
def test_vectors_kept_in_16_bits_stay_orthogonal_even_on_single_coordinates(storage, block):
    # the rounding of an eigenvector on one coordinate does not spread over all of them
    tridiagonal = block_lanczos(
        Diagonal(hessian_like(2000), torch.float32), 60, block, reorthogonalization="partial", basis_dtype=storage
    )
    assert tridiagonal.orthogonality <= torch.finfo(getattr(torch, storage)).eps
    assert abs(tridiagonal.ritz()[0][-1] - 10.0) <= 64 * 2.0**-23 * 10.0
