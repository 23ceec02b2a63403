#include "hesd/panel_project.hpp"

#include "cpu/targets.hpp"
#include "cpu/tiles.hpp"

namespace hesd::HESD_TARGET {
namespace {

template <typename S, typename T>
void project(const Panel& w, const Panel& v, std::int64_t gram_only, const double* coefficients, double* gram,
             double* self_gram) {
    typedef typename Common<S, T>::type C;
    const std::int64_t k = v.rows;
    const std::int64_t b = w.rows;
    // V's block stays in the second-level cache between the subtraction and the Gram matrix; with many rows in the
    // third.
    const std::int64_t block = block_columns(k * static_cast<std::int64_t>(sizeof(S)), 256 * 1024);
    const std::int64_t gram_size = gram != nullptr ? k * b : 0;
    const std::int64_t self_size = self_gram != nullptr ? b * b : 0;
    const ChunkSums sums(w.columns, gram_size + self_size);
    const std::int64_t stride = scratch_stride<C>(block);
    const Scratch<C> rows(most_threads() * b * stride);
    const std::int64_t taken = k - gram_only;
    const Scratch<C> factors(taken * b);
    for (std::int64_t i = 0; i < taken * b; ++i) {
        factors.data()[i] = static_cast<C>(coefficients[i]);
    }
    const S* v_data = static_cast<const S*>(v.data);
    T* w_data = static_cast<T*>(w.data);
    for_each_block(w.columns, block, [&](std::int64_t chunk, int thread, std::int64_t column, std::int64_t length) {
        C* w_rows = rows.data() + thread * b * stride;
        // The combination is summed by itself: most of its terms are small, and so are their rounding errors.
        for (std::int64_t i = 0; i < b * stride; ++i) {
            w_rows[i] = C(0);
        }
        combine_block(v_data + gram_only * v.stride + column, v.stride, taken, factors.data(), b, 1, w_rows, stride, b,
                      length);
        subtract_rows(w_rows, stride, b, length, w_data + column, w.stride);
        if (gram_size > 0) {
            gram_block<C, false>(v_data + column, v.stride, k, w_rows, stride, b, length, sums.of(chunk));
        }
        if (self_size > 0) {
            self_gram_block(w_rows, stride, b, length, sums.of(chunk) + gram_size);
        }
    });
    sums.total(0, gram_size, gram);
    if (self_size > 0) {
        sums.symmetric_total(gram_size, b, self_gram);
    }
}

}  // namespace

void panel_project(const Panel& w, const Panel& v, std::int64_t gram_only, const double* coefficients, double* gram,
                   double* self_gram) {
    with_storage(v.precision, [&](auto* storage) {
        with_working(w.precision, [&](auto* working) {
            project<std::remove_pointer_t<decltype(storage)>, std::remove_pointer_t<decltype(working)>>(
                w, v, gram_only, coefficients, gram, self_gram);
        });
    });
}

}  // namespace hesd::HESD_TARGET
