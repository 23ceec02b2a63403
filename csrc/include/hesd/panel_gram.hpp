// panel_gram: all inner products between two panels.
//
//   gram[i, j] = sum_c V[i, c] * W[j, c]
//
// V      (k, n), float64, float32, bfloat16 or float16.
// W      (b, n), float64 or float32.
// gram   (k, b) row-major float64, overwritten.
//
// Products and sums in float64. The sum runs over chunks of columns that depend only on n, and the chunks are added
// in order: the same bits for any thread count. n = 0 gives zeros. Traffic: V once, W once.
#pragma once

#include "hesd/panel.hpp"

namespace hesd {

using PanelGram = void (*)(const Panel& v, const Panel& w, double* gram);

}  // namespace hesd
