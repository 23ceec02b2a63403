"""Partial reorthogonalization: what the estimate says against what is measured, and what that saves."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from lanczos_driver import IN_PLACE, Record, new_run, times
from matrices import DTYPES, matrix_with
from spectra import distance, hessian_like, quadrature

from hesd_fast import kernels
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


class Stepwise(Record):
    """A run in partial mode; the measured and the estimated overlap of every block with all before it."""

    def __init__(self, matrix, steps, block, dtype, seed=0, multiply=None):
        run = new_run(kernels.empty_panel, dtype, len(matrix), steps, block, "partial" + IN_PLACE)
        estimated = []

        def watched(record, panel):
            estimated.append(run.engine.estimated_overlap)
            return times(panel, matrix) if multiply is None else multiply(record, panel)

        super().__init__(run, matrix, seed, watched)
        self.estimated = np.array(estimated[1:])  # the first block has none before it
        before = [np.concatenate(self.blocks[:j]) for j in range(1, len(self.blocks))]
        self.measured = np.array(
            [np.abs(older @ block.T).max() for older, block in zip(before, self.blocks[1:], strict=True)]
        )


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block", [1, 2, 3, 4])
def test_no_block_loses_more_than_8_times_the_square_root_of_epsilon(spectrum, dtype, block):
    matrix = matrix_with(SPECTRA[spectrum], dtype)
    root = torch.finfo(dtype).eps ** 0.5
    for seed in (0, 1, 2, 11, 15, 16):
        steps = Stepwise(matrix, STEPS[block], block, dtype, seed)
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
        steps = Stepwise(matrix, STEPS[block], block, dtype, seed)
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
        assert distance(full, partial) <= 64 * torch.finfo(dtype).eps * scale, seed


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
    steps = Stepwise(
        operator.diagonal, 60, block, dtype, multiply=lambda _, panel: operator.matmat(panel, torch.empty_like(panel))
    )
    assert steps.measured.max() <= 8 * torch.finfo(dtype).eps ** 0.5
    assert steps.engine.recurrence_error >= noise / 300**0.5  # one entry of it
    exact = Stepwise(operator.diagonal, 60, block, dtype)
    assert steps.engine.partial_sweeps >= exact.engine.partial_sweeps


def test_a_block_that_a_sweep_narrows_is_followed_by_an_estimate_of_its_new_width():
    # An operator that is not symmetric brings an old block back, of which a sweep leaves nothing but rounding.
    matrix = matrix_with(hessian_like())
    spoiled = []

    def multiply(record, panel):
        product = panel @ matrix
        if not spoiled and record.engine.partial_sweeps == 1:
            spoiled.append(len(record.blocks))
            product[:3] += 0.2 * torch.from_numpy(record.blocks[2][:3])
        return product

    steps = Stepwise(matrix, 30, 4, torch.float64, multiply=multiply)
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
