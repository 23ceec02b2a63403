"""Tridiagonal forms of small matrices: orthogonal similarity, against dense linear algebra."""

from __future__ import annotations

import native_engine
import numpy as np
import pytest

from hesd_fast.errors import EngineError, NumericalError

engine = native_engine.load()
EPSILON = 2.0**-52


def symmetric_band(n, width, seed=0):
    matrix = np.random.default_rng(seed).standard_normal((n, n))
    return np.triu(np.tril(matrix + matrix.T, width), -width)


def band_rows(matrix, width):
    rows = np.full((len(matrix), width + 1), np.nan)  # what lies left of column 0 has no meaning
    for i in range(len(matrix)):
        length = min(i, width) + 1
        rows[i, width + 1 - length :] = matrix[i, i + 1 - length : i + 1]
    return rows


def tridiagonal(diagonal, offdiagonal):
    beside = offdiagonal[: len(diagonal) - 1]
    return np.diag(diagonal) + np.diag(beside, 1) + np.diag(beside, -1)


@pytest.mark.parametrize("n", [1, 2, 3, 7, 40])
@pytest.mark.parametrize("width", [0, 1, 2, 3, 6, 39])
def test_a_band_becomes_tridiagonal(n, width):
    width = min(width, n - 1)
    matrix = symmetric_band(n, width)
    diagonal, offdiagonal, rows = engine.tridiagonalize_band(band_rows(matrix, width), np.eye(n))
    basis = rows.T
    tolerance = 50 * EPSILON * max(1.0, np.abs(matrix).sum(axis=1).max())
    np.testing.assert_allclose(basis.T @ basis, np.eye(n), atol=50 * EPSILON)
    np.testing.assert_allclose(basis.T @ matrix @ basis, tridiagonal(diagonal, offdiagonal), atol=tolerance)
    assert offdiagonal[-1] == 0.0
    np.testing.assert_array_equal(basis[0], np.eye(n)[0])  # the first row is left alone


def test_a_band_that_is_diagonal_in_places_and_zero():
    for matrix in (np.zeros((6, 6)), np.diag(np.arange(6.0)), np.kron(np.eye(3), np.ones((2, 2)))):
        diagonal, offdiagonal, rows = engine.tridiagonalize_band(band_rows(matrix, 3), np.eye(6))
        np.testing.assert_allclose(rows @ matrix @ rows.T, tridiagonal(diagonal, offdiagonal), atol=50 * EPSILON)


def wilkinson_copies():
    wilkinson = tridiagonal(np.abs(np.arange(-10.0, 11.0)), np.ones(20))
    matrix = np.kron(np.eye(4), wilkinson)
    for joint in (21, 42, 63):
        matrix[joint - 1, joint] = matrix[joint, joint - 1] = 1e-14
    return matrix


TRIDIAGONALS = {
    "one": np.array([[3.0]]),
    "zero": np.zeros((5, 5)),
    "random": tridiagonal(*np.random.default_rng(0).standard_normal((2, 60))),
    "equal": tridiagonal(np.full(9, 2.0), np.zeros(9)),
    "graded": tridiagonal(10.0 ** -np.arange(0, 20), 10.0 ** -np.arange(0.5, 20)),
    "copies": wilkinson_copies(),
    "without diagonal": tridiagonal(np.zeros(8), np.ones(8)),
}


@pytest.mark.parametrize("name", TRIDIAGONALS)
def test_eigenvalues_and_eigenvectors(name):
    matrix = TRIDIAGONALS[name]
    n = len(matrix)
    offdiagonal = np.append(np.diag(matrix, 1), np.nan)  # without meaning
    values, rows = engine.tridiagonal_eigenvalues(np.diag(matrix)[None], offdiagonal[None], np.eye(n)[None])
    tolerance = 20 * np.sqrt(n) * EPSILON * max(float(np.abs(matrix).max()), EPSILON)
    vectors = rows[0].T
    np.testing.assert_allclose(np.sort(values[0]), np.linalg.eigvalsh(matrix), atol=tolerance)
    np.testing.assert_allclose(vectors.T @ vectors, np.eye(n), atol=20 * np.sqrt(n) * EPSILON)
    np.testing.assert_allclose(matrix @ vectors, vectors * values, atol=tolerance)


@pytest.mark.parametrize("seed", range(4))
def test_large_entries_may_come_first_or_last(seed):
    # as Lanczos leaves them first; rounding of sweeps from the other end would add up, to 19 epsilons
    random = np.random.default_rng(seed)
    nodes = np.concatenate((random.normal(0.0, 0.01, 1200), [-0.7, -0.2, 1.0, 2.0, 5.0, 10.0]))
    weights = np.full((1, nodes.size), nodes.size**-0.5)
    found = engine.jacobi_matrices(nodes[None], weights, np.empty((nodes.size, 0)), 400)
    diagonal, offdiagonal = found[0], np.append(found[1][:, :-1], [[0.0]], axis=1)
    truth = np.linalg.eigvalsh(tridiagonal(diagonal[0], offdiagonal[0]))
    turned = diagonal[:, ::-1], np.append(offdiagonal[:, -2::-1], [[0.0]], axis=1)
    for matrix in ((diagonal, offdiagonal), turned):
        values, _ = engine.tridiagonal_eigenvalues(*matrix, np.empty((1, 400, 0)))
        np.testing.assert_allclose(np.sort(values[0]), truth, rtol=0, atol=8 * EPSILON * 10.0)


def test_many_matrices_at_once_are_those_one_by_one():
    random = np.random.default_rng(1)
    diagonal, offdiagonal, rows = (
        random.standard_normal((7, 30)),
        random.standard_normal((7, 30)),
        random.random((7, 30, 2)),
    )
    values, images = engine.tridiagonal_eigenvalues(diagonal, offdiagonal, rows)
    for one in range(7):
        here = slice(one, one + 1)
        alone = engine.tridiagonal_eigenvalues(diagonal[here], offdiagonal[here], rows[here])
        np.testing.assert_array_equal(values[here], alone[0])
        np.testing.assert_array_equal(images[here], alone[1])


def test_what_is_not_finite_does_not_converge():
    with pytest.raises(NumericalError, match="tridiagonal matrix of order 3 did not converge"):
        engine.tridiagonal_eigenvalues(np.array([[0.0, np.nan, 1.0]]), np.ones((1, 3)), np.ones((1, 3, 1)))


@pytest.mark.parametrize("k", [1, 2, 5, 30])
def test_the_jacobi_matrix_of_all_nodes_has_them_and_their_weights(k):
    random = np.random.default_rng(k)
    nodes, weights = np.sort(random.standard_normal(k)), random.random(k) + 0.1
    weights /= np.linalg.norm(weights)
    diagonal, offdiagonal = engine.jacobi_matrices(nodes[None], weights[None], np.empty((k, 0)), k)
    values, vectors = np.linalg.eigh(tridiagonal(diagonal[0], offdiagonal[0]))
    np.testing.assert_allclose(values, nodes, atol=50 * EPSILON * np.abs(nodes).max())
    np.testing.assert_allclose(np.abs(vectors[0]), weights, atol=1e3 * EPSILON)
    assert offdiagonal[0, -1] == 0.0
    # fewer steps are the leading ones
    for steps in range(1, k):
        leading = engine.jacobi_matrices(nodes[None], weights[None], np.empty((k, 0)), steps)
        np.testing.assert_allclose(leading[0][0], diagonal[0, :steps], atol=1e3 * EPSILON)
        np.testing.assert_allclose(leading[1][0], offdiagonal[0, :steps], atol=1e3 * EPSILON)


def test_nodes_without_weight_and_repeated_nodes_take_no_part():
    nodes, weights = np.array([-1.0, 0.0, 0.5, 2.0]), np.array([0.6, 0.0, 0.0, 0.8])
    diagonal, offdiagonal = engine.jacobi_matrices(nodes[None], weights[None], np.empty((4, 0)), 2)
    np.testing.assert_allclose(
        np.linalg.eigvalsh(tridiagonal(diagonal[0], offdiagonal[0])), [-1.0, 2.0], atol=8 * EPSILON
    )
    assert offdiagonal[0, 1] <= 8 * EPSILON
    tiny = engine.jacobi_matrices(nodes[None], np.array([[0.6, 1e-300, 1e-300, 0.8]]), np.empty((4, 0)), 2)
    np.testing.assert_allclose(tiny[0], diagonal, atol=8 * EPSILON)
    split = np.array([[0.6, 0.8 * 0.6, 0.8 * 0.8]])
    twice = engine.jacobi_matrices(np.array([[-1.0, 2.0, 2.0]]), split, np.empty((3, 0)), 2)
    np.testing.assert_allclose(twice[0], diagonal, atol=8 * EPSILON)
    np.testing.assert_allclose(twice[1], offdiagonal, atol=16 * EPSILON)


def test_the_last_coupling_is_that_of_the_larger_matrix():
    # diag(nodes) is a projection of a matrix that Lanczos on goes on with
    random = np.random.default_rng(3)
    k, p, steps = 12, 3, 5
    nodes, couplings = np.sort(random.standard_normal(k)), np.zeros((k, p))
    weights = random.standard_normal((2, k))
    weights /= np.linalg.norm(weights, axis=1, keepdims=True)
    # a coupling that the first steps - 1 Lanczos vectors do not have
    for probe in range(2):
        krylov = np.linalg.qr(np.stack([nodes**power * weights[probe] for power in range(steps)], axis=1))[0]
        couplings = random.standard_normal((k, p))
        couplings -= krylov[:, :-1] @ (krylov[:, :-1].T @ couplings)
        larger = np.block([[np.diag(nodes), couplings], [couplings.T, random.standard_normal((p, p)) * 0.0]])
        values, vectors = np.linalg.eigh(larger)
        seen = np.append(weights[probe], np.zeros(p)) @ vectors
        truth = engine.jacobi_matrices(values[None], seen[None], np.empty((k + p, 0)), steps)
        found = engine.jacobi_matrices(nodes[None], weights[probe : probe + 1], couplings, steps)
        np.testing.assert_allclose(found[0], truth[0], atol=1e4 * EPSILON)
        np.testing.assert_allclose(found[1], truth[1], atol=1e4 * EPSILON)


def test_wrong_shapes_are_refused():
    with pytest.raises(EngineError, match="`rows` is not a matrix of shape"):
        engine.tridiagonalize_band(np.ones((3, 2)), np.ones((2, 2)))
    with pytest.raises(EngineError, match="`band` is not a matrix of shape"):
        engine.tridiagonalize_band(np.ones(3), np.ones((3, 2)))
    with pytest.raises(EngineError, match="`rows` is not an array of shape"):
        engine.tridiagonal_eigenvalues(np.ones((2, 3)), np.ones((2, 3)), np.ones((2, 4, 1)))
    with pytest.raises(EngineError, match="`steps` is 4; wanted 1 to 3, the number of nodes"):
        engine.jacobi_matrices(np.ones((1, 3)), np.ones((2, 3)), np.ones((3, 1)), 4)
