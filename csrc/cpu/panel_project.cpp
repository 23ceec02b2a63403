#include "hesd/panel_project.hpp"

#include <omp.h>

#include "cpu/targets.hpp"
#include "cpu/vector.hpp"

namespace hesd::HESD_TARGET {
namespace {

template <typename S, typename T>
void project(const Panel& w, const Panel& v, const double* coefficients, double* gram, double* self_gram) {
    const std::int64_t k = v.rows;
    const std::int64_t b = w.rows;
    const Chunks chunks = chunks_of(w.columns);
    // V's block stays in the second-level cache between the subtraction and the Gram matrix.
    const std::int64_t block = block_columns(k * static_cast<std::int64_t>(sizeof(S)) + b * 8, 1, 384 * 1024);
    const std::int64_t gram_size = gram != nullptr ? k * b : 0;
    const std::int64_t self_size = self_gram != nullptr ? b * b : 0;
    const std::int64_t size = gram_size + self_size;
    const Scratch partials(chunks.count * size);
    const Scratch rows(omp_get_max_threads() * b * block);
    const Scratch negative(k * b);
    for (std::int64_t i = 0; i < k * b; ++i) {
        negative.data()[i] = -coefficients[i];
    }
    const S* v_data = static_cast<const S*>(v.data);
    T* w_data = static_cast<T*>(w.data);
#pragma omp parallel for schedule(dynamic, 1)
    for (std::int64_t chunk = 0; chunk < chunks.count; ++chunk) {
        double* partial = partials.data() + chunk * size;
        double* w_rows = rows.data() + omp_get_thread_num() * b * block;
        for (std::int64_t i = 0; i < size; ++i) {
            partial[i] = 0.0;
        }
        const std::int64_t first = chunk * chunks.length;
        const std::int64_t last = first + chunks.length < w.columns ? first + chunks.length : w.columns;
        for (std::int64_t column = first; column < last; column += block) {
            const std::int64_t length = last - column < block ? last - column : block;
            load_rows(w_data + column, w.stride, b, length, w_rows, block);
            combine_block(v_data + column, v.stride, k, negative.data(), b, 1, w_rows, block, b, length);
            store_rows(w_rows, block, b, length, w_data + column, w.stride);
            if (gram_size > 0) {
                gram_block(v_data + column, v.stride, k, w_rows, block, b, length, partial);
            }
            if (self_size > 0) {
                gram_block(w_rows, block, b, w_rows, block, b, length, partial + gram_size);
            }
        }
    }
    if (size > 0) {
        const Scratch total(size);
        sum_partials(partials.data(), chunks.count, size, total.data());
        for (std::int64_t i = 0; i < gram_size; ++i) {
            gram[i] = total.data()[i];
        }
        for (std::int64_t i = 0; i < self_size; ++i) {
            self_gram[i] = total.data()[gram_size + i];
        }
    }
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
