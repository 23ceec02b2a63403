// panel_orthonormalize: an orthonormal basis of a panel's rows, with the factor that gives the rows back.
//
//   W = L Q + E,    Q Q^T = I (rank x rank),    every row of E of norm <= about the tolerance unless max_rank binds
//
// W           (b, n), float64 or float32; its contents are destroyed.
// out         (b, n), W's precision; rows [0, rank) receive Q, rows [rank, b) zeros. May be W itself.
// state       where the kernels work; begun by orthonormalize_begin, with the Gram matrix of W, summed over all shards,
//             in state.gram. Tolerance: absolute, a direction whose remaining norm is <= it is dropped. max_rank: at
//             most this many directions are kept, the largest first.
// first       whether this is the first call since the state was begun.
//
// Afterwards state.facts->stage says how it stands. More: call again, with first false (the CPU kernels go on to the
// end, the others put two rounds to work and do not wait). Last or finished: out is written, state.factor (b, b),
// row-major, has L in its columns [0, rank) and zeros in the others, and the facts hold the rank and the norm of the
// weakest direction kept (infinite when the rank is 0). not_finite, no_convergence: see orthonormalize_require.
//
// Method: CholeskyQR repeated until orthonormal (twice when W is well conditioned: CholeskyQR2, Yamamoto, Nakatsukasa,
// Yanagisawa, Fukaya, ETNA 44, 2015). Each round takes the Gram matrix of the rows scaled to unit length and factors it
// by Cholesky with diagonal pivoting, see small/pivoted_cholesky_qr.hpp. Where a shifted Cholesky would carry an
// ill-conditioned panel through, the pivoting stops at a relative pivot of 1e-10 instead; rows beyond it are kept as
// explicit residuals, whose own norms the next round measures. So dependent rows are told from small ones by a measured
// norm, not by a difference of squares.
//
// Gram matrices pass through `reduction`. Same bits for any thread count. Traffic when well conditioned: W read twice
// and written once, out written once. On CUDA devices float32 W is not written in between.
#pragma once

#include "hesd/panel.hpp"

namespace hesd {

enum class OrthonormalizeStage : int {
    more,            // the transformed rows' Gram matrix is wanted
    last,            // the transformed rows are final
    finished,        // nothing is left to do
    not_finite,      // W has non-finite values
    no_convergence,  // the rows cannot be squared in float64: norms outside about 1e-140 ... 1e150
};

struct OrthonormalizeFacts {
    OrthonormalizeStage stage;
    double tolerance;
    std::int64_t max_rank;
    std::int64_t rounds;
    std::int64_t rank;  // leading rows that are directions of Q already
    std::int64_t live;  // leading rows that are not dropped; those in [rank, live) are residuals
    double weakest;
};

// One orthonormalization of b rows: pointers to where the kernels work.
struct Orthonormalization {
    std::int64_t rows;  // b
    OrthonormalizeFacts* facts;
    double* gram;       // (b, b), of the rows as they are
    double* transform;  // (b, b), to be applied to them
    double* factor;     // (b, b): rows at first = factor * rows as they are
    double* scratch;    // orthonormalize_scratch(b) numbers
};

// In numbers of 8 bytes.
constexpr std::int64_t orthonormalize_scratch(std::int64_t rows) { return 3 * rows * rows + 4 * rows + 2; }

using PanelOrthonormalize = void(const Panel& w, const Panel& out, const Orthonormalization& state, bool first,
                                 const Reduction& reduction);

}  // namespace hesd
