// One pass over V and W: W <- W - C^T V, then V W^T and W W^T of the new W, each where asked for.
#pragma once

#include "hesd/panel.hpp"

namespace hesd::cuda {

// coefficients (k - gram_only, b), gram (k, b) and self_gram (b, b) on the device, any of them null. Without
// coefficients W is only read.
void sweep(const Panel& w, const Panel& v, std::int64_t gram_only, const double* coefficients, double* gram,
           double* self_gram);

// W W^T (b, b), products in float64.
void self_gram(const Panel& w, double* gram);

}  // namespace hesd::cuda
