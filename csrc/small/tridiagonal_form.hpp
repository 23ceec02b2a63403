// Symmetric tridiagonal forms of what block Lanczos leaves behind, by orthogonal transformations, in float64. Numbers
// are expected near 1 (squares must neither overflow nor underflow): callers divide by a power of two.
#pragma once

#include <cstdint>

namespace hesd {

// Householder reduction of a band matrix to tridiagonal form, with rows of the transformation:
//
//   Q^T T Q = tridiagonal,   X <- X Q
//
// band        (n, w + 1) row-major: T(i, i - w) ... T(i, i), with anything where the column is below 0.
// rows        (n, r) row-major: X^T, overwritten.
// diagonal    (n), offdiagonal (n), of which the last is 0.
//
// A bulge of w x w is chased down from each column (Lang, A parallel algorithm for reducing symmetric banded matrices
// to tridiagonal form, SISC 14(6), 1993, with the bulges left in place). About n^2 (6 w + 2 r) operations; on one
// thread, so the same bits for any number of threads.
void tridiagonalize_band(std::int64_t n, std::int64_t w, const double* band, std::int64_t r, double* rows,
                         double* diagonal, double* offdiagonal);

// Eigenvalues of symmetric tridiagonal matrices, and rows of their eigenvectors, by the implicit QL method:
//
//   S^T tridiagonal S = diag(eigenvalues),   X <- X S
//
// diagonal    (count, n), overwritten by the eigenvalues, in no order.
// offdiagonal (count, n), overwritten; its last column has no meaning.
// rows        (count, n, r): X^T of each matrix, overwritten. Weights of Gauss rules need the first row alone.
//
// Absolute errors of a few roundoffs of the largest entry. About 1.5 n^2 (15 + 6 r) operations a matrix, which share
// the threads; the same bits for any number of them. Throws NumericalError where an eigenvalue does not converge.
void tridiagonal_eigenvalues(std::int64_t count, std::int64_t n, std::int64_t r, double* diagonal, double* offdiagonal,
                             double* rows);

// The first steps of Lanczos on diag(nodes) from each of b starting vectors, as orthogonal transformations give them:
//
//   alpha_j, beta_j: the Jacobi matrix of the measure with mass weights(i)^2 at nodes(i), j = 1 ... steps <= k
//
// nodes       (k).
// weights     (b, k) row-major; every row has a norm of 1.
// couplings   (k, p) row-major: Y. The last beta is hypot(beta_s, ||q_s^T Y||), q_s being the last Lanczos vector: what
//             Lanczos on a matrix would go on with of which diag(nodes) is a projection and Y its coupling to the rest.
// diagonal    (b, steps), offdiagonal (b, steps), none of the latter negative. A row goes on past a beta of 0.
//
// One node after another is taken in, and rotations pass what it changes down the matrix, of which nothing below the
// wanted rows can move those (Gragg and Harwood, The numerically stable reconstruction of Jacobi matrices from spectral
// data, Numer. Math. 44, 1984). About b k steps (30 + 6 p) operations; the same bits for any number of threads.
void jacobi_matrices(std::int64_t k, const double* nodes, std::int64_t b, const double* weights, std::int64_t p,
                     const double* couplings, std::int64_t steps, double* diagonal, double* offdiagonal);

}  // namespace hesd
