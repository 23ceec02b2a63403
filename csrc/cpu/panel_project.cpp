#include "hesd/panel_project.hpp"

#include "cpu/targets.hpp"
#include "cpu/vector.hpp"

namespace hesd::HESD_TARGET {
namespace {

template <typename S, typename T>
void project(const Panel& w, const Panel& v, const double* coefficients, double* gram, double* self_gram) {
    const std::int64_t k = v.rows;
    const std::int64_t b = w.rows;
    // V's block stays in the second-level cache between the subtraction and the Gram matrix.
    const std::int64_t block = block_columns(k * static_cast<std::int64_t>(sizeof(S)) + b * 8, 1, 384 * 1024);
    const std::int64_t gram_size = gram != nullptr ? k * b : 0;
    const std::int64_t self_size = self_gram != nullptr ? b * b : 0;
    const ChunkSums sums(w.columns, gram_size + self_size);
    const Scratch rows(most_threads() * b * block);
    const Scratch negative(k * b);
    for (std::int64_t i = 0; i < k * b; ++i) {
        negative.data()[i] = -coefficients[i];
    }
    const S* v_data = static_cast<const S*>(v.data);
    T* w_data = static_cast<T*>(w.data);
    for_each_block(w.columns, block, [&](std::int64_t chunk, int thread, std::int64_t column, std::int64_t length) {
        double* w_rows = rows.data() + thread * b * block;
        load_rows(w_data + column, w.stride, b, length, w_rows, block);
        combine_block(v_data + column, v.stride, k, negative.data(), b, 1, w_rows, block, b, length);
        store_rows(w_rows, block, b, length, w_data + column, w.stride);
        if (gram_size > 0) {
            gram_block(v_data + column, v.stride, k, w_rows, block, b, length, sums.of(chunk));
        }
        if (self_size > 0) {
            gram_block(w_rows, block, b, w_rows, block, b, length, sums.of(chunk) + gram_size);
        }
    });
    sums.total(0, gram_size, gram);
    sums.total(gram_size, self_size, self_gram);
}

}  // namespace

void panel_project(const Panel& w, const Panel& v, const double* coefficients, double* gram, double* self_gram) {
    with_storage(v.precision, [&](auto* storage) {
        with_working(w.precision, [&](auto* working) {
            project<std::remove_pointer_t<decltype(storage)>, std::remove_pointer_t<decltype(working)>>(
                w, v, coefficients, gram, self_gram);
        });
    });
}

}  // namespace hesd::HESD_TARGET
