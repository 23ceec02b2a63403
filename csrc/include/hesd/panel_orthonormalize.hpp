// panel_orthonormalize: an orthonormal basis of a panel's rows, with the factor that gives the rows back.
//
//   W = L Q + E,    Q Q^T = I (rank x rank),    every row of E of norm <= about the tolerance unless max_rank binds
//
// W           (b, n), float64 or float32; its contents are destroyed.
// out         (b, n), W's precision; rows [0, rank) receive Q, rows [rank, b) zeros. May be W itself.
// tolerance   absolute: a direction whose remaining norm is <= tolerance is dropped.
// max_rank    at most this many directions are kept, the largest first.
// gram        (b, b) W W^T summed over all shards, where the caller has it already; null otherwise.
// factor      (b, b) row-major float64: columns [0, rank) receive L, the others zeros.
// returns     rank and the norm of the weakest direction kept (infinite when rank = 0).
//
// Method: CholeskyQR repeated until orthonormal (twice when W is well conditioned: CholeskyQR2, Yamamoto, Nakatsukasa,
// Yanagisawa, Fukaya, ETNA 44, 2015). Each round takes the Gram matrix of the rows scaled to unit length and factors it
// by Cholesky with diagonal pivoting. Where a shifted Cholesky would carry an ill-conditioned panel through, the
// pivoting stops at a relative pivot of 1e-10 instead; rows beyond it are kept as explicit residuals, whose own norms
// the next round measures. So dependent rows are told from small ones by a measured norm, not by a difference of
// squares.
//
// Gram matrices pass through `reduction`. Non-finite W throws EngineError, and so does a panel whose rows cannot be
// squared in float64 (norms outside about 1e-140 ... 1e150). Same bits for any thread count. Traffic when well
// conditioned: W read three times and written once, out written once; one reading less where the Gram matrix is given.
// On CUDA devices float32 W is not written in between.
#pragma once

#include "hesd/panel.hpp"

namespace hesd {

struct OrthonormalizeResult {
    std::int64_t rank;
    double weakest;
};

using PanelOrthonormalize = OrthonormalizeResult (*)(const Panel& w, const Panel& out, double tolerance,
                                                     std::int64_t max_rank, const Reduction& reduction,
                                                     const double* gram, double* factor);

}  // namespace hesd
