#include "cuda/kernels.hpp"
#include "cuda/sweep.hpp"

namespace hesd::cuda {

void panel_project(const Panel& w, const Panel& v, std::int64_t gram_only, const double* coefficients, double* gram,
                   double* self_gram) {
    sweep(w, v, gram_only, coefficients, gram, self_gram);
}

}  // namespace hesd::cuda
