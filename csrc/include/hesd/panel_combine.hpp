// panel_combine: linear combinations of basis vectors, such as Ritz vectors.
//
//   X = S V
//
// V   (k, n), float64, float32, bfloat16 or float16.
// S   (r, k) row-major float64.
// X   (r, n), float64 or float32, overwritten; must not overlap V.
//
// Sums in float64 in the order of V's rows, rounded once to X's precision: the same bits for any thread count.
// k = 0 gives zeros. Traffic: V once, X written once.
#pragma once

#include "hesd/panel.hpp"

namespace hesd {

using PanelCombine = void (*)(const double* s, const Panel& v, const Panel& x);

}  // namespace hesd
