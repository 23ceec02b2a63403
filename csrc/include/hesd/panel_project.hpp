// panel_project: subtract combinations of V from W and, while the data is in cache, take the next Gram matrices.
//
//   W        <- W - C^T V[gram_only:]
//   gram      = V W^T        (k, b), of the new W; skipped when null
//   self_gram = W W^T       (b, b), of the new W; skipped when null
//
// W          (b, n), float64 or float32, overwritten.
// V          (k, n), float64, float32, bfloat16 or float16.
// gram_only  gram-only rows: the first rows of V, 0 <= gram_only <= k, which are not subtracted.
// C          (k - gram_only, b) row-major float64.
//
// The matrices lie where the kernels work. Arithmetic: float64 where V or W is float64, else float32 with C rounded to
// it first. C^T V is summed by itself and subtracted once, so that many small terms do not each round a large W. The
// Gram matrices are those of the rounded W: gram summed as in panel_gram, self_gram always from products in float64
// (same bits for any thread count). k = 0 leaves W and still gives self_gram.
// Traffic: V once (its second use comes from cache), W read and written once.
#pragma once

#include "hesd/panel.hpp"

namespace hesd {

using PanelProject = void(const Panel& w, const Panel& v, std::int64_t gram_only, const double* coefficients,
                          double* gram, double* self_gram);

}  // namespace hesd
