"""The basis that takes large eigenvalues out: orthonormal, and its gains are what it takes out."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from matrices import DTYPES, matrix_with

import hesd_fast as hesd
from hesd_fast.estimators.deflation import Deflation

SIZE = 200
SPECTRA = {
    "1/i": 1.0 / np.arange(1.0, SIZE + 1.0),
    "exponential": 0.5 ** np.arange(SIZE),
    "step": np.where(np.arange(SIZE) < 20, 1.0, 1e-3),
    "low rank": np.r_[[3.0, -2.0, 1.0], np.zeros(SIZE - 3)],
    "identity": np.ones(SIZE),
}


def grown(matrix, steps, random_every=4):
    deflation = Deflation(hesd.MatrixOperator(matrix), 4 * steps + 8, seed=0, first_probe=0)
    for step in range(steps):
        deflation.grow(4, at_random=step % random_every == 0 or not deflation.goes_on)
    return deflation


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SPECTRA)
def test_the_basis_is_orthonormal_also_where_products_bring_nothing_new(name, dtype):
    deflation = grown(matrix_with(SPECTRA[name], dtype), 16)
    basis = deflation.basis.double()
    assert len(basis) >= 16
    difference = basis @ basis.T - torch.eye(len(basis), dtype=torch.float64)
    assert float(difference.abs().max()) <= 64 * torch.finfo(dtype).eps


@pytest.mark.parametrize("name", SPECTRA)
def test_the_gain_is_what_the_last_vectors_took_out(name):
    matrix, mean = matrix_with(SPECTRA[name]), 0.25
    deflation, shifted = grown(matrix, 1), matrix - mean * torch.eye(SIZE, dtype=torch.float64)

    def left():
        projector = torch.eye(SIZE, dtype=torch.float64) - deflation.basis.T @ deflation.basis
        return float((projector @ shifted @ projector).norm() ** 2)

    assert deflation.gain(mean) is None  # random vectors
    before, columns = left(), len(deflation.basis)
    deflation.grow(4, at_random=False)
    found = len(deflation.basis) - columns
    if not found:
        assert name == "identity"
        assert deflation.gain(mean) is None
        return
    gained = deflation.gain(mean) * found
    assert gained == pytest.approx(before - left(), abs=1024 * np.finfo(float).eps * float(shifted.norm() ** 2))


def test_an_invariant_space_is_left_as_it_is():
    deflation = grown(matrix_with(SPECTRA["low rank"]), 1)
    deflation.grow(4, at_random=False)
    assert len(deflation.basis) == 7
    deflation.grow(4, at_random=False)
    assert (len(deflation.basis), deflation.products, deflation.goes_on) == (7, 7, False)
