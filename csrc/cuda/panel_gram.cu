#include "cuda/kernels.hpp"
#include "cuda/sweep.hpp"

namespace hesd::cuda {

void panel_gram(const Panel& v, const Panel& w, double* gram) {
    if (v.data == w.data && v.stride == w.stride && v.rows == w.rows && v.precision == w.precision) {
        self_gram(w, gram);
    } else if (v.rows > 0) {
        sweep(w, v, 0, nullptr, gram, nullptr);
    }
}

}  // namespace hesd::cuda
