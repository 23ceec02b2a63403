// panel_gram: all inner products between two panels.
//
//   gram[i, j] = sum_c V[i, c] * W[j, c]
//
// V      (k, n), float64, float32, bfloat16 or float16.
// W      (b, n), float64 or float32.
// gram   (k, b) row-major float64, overwritten; where the kernels work.
//
// Arithmetic: float64 where V or W is float64, and where V and W are one and the same panel, whose norms decide about
// rank. Otherwise products are taken and summed in float32 over runs of 64 to a vector lane, and the runs in float64:
// the error is about one float32 epsilon of |V_i| |W_j| over the square root of n, below that of W's own rounding.
//
// The sum runs over chunks of columns that depend only on n, and the chunks are added in order: the same bits for any
// thread count, not for any instruction set. n = 0 gives zeros. Traffic: V once, W once.
#pragma once

#include "hesd/panel.hpp"

namespace hesd {

using PanelGram = void(const Panel& v, const Panel& w, double* gram);

}  // namespace hesd
