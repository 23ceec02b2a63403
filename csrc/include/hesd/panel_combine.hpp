// panel_combine: linear combinations of basis vectors, such as Ritz vectors.
//
//   X = S V
//
// V   (k, n), float64, float32, bfloat16 or float16.
// S   (r, k) row-major float64, where the kernels work; null for the identity: X becomes V, rounded.
// X   (r, n), any of the four, overwritten; must not overlap V.
//
// Sums in the order of V's rows, in float64 where V or X is float64 and else in float32 with S rounded to it, then
// rounded to nearest even to X's precision (float64 to 16 bits through float32): the same bits for any thread count.
// k = 0 gives zeros. Traffic: V once, X written once.
#pragma once

#include "hesd/panel.hpp"

namespace hesd {

using PanelCombine = void(const double* s, const Panel& v, const Panel& x);

}  // namespace hesd
