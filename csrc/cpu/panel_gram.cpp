#include "hesd/panel_gram.hpp"

#include <omp.h>

#include "cpu/targets.hpp"
#include "cpu/vector.hpp"

namespace hesd::HESD_TARGET {
namespace {

template <typename S, typename T>
void gram(const Panel& v, const Panel& w, double* out) {
    const std::int64_t k = v.rows;
    const std::int64_t b = w.rows;
    const Chunks chunks = chunks_of(w.columns);
    // W's doubles stay in the first-level cache while V's rows pass by.
    const std::int64_t block = block_columns(b, 8, 32 * 1024);
    const Scratch partials(chunks.count * k * b);
    const Scratch rows(omp_get_max_threads() * b * block);
    const S* v_data = static_cast<const S*>(v.data);
    const T* w_data = static_cast<const T*>(w.data);
#pragma omp parallel for schedule(dynamic, 1)
    for (std::int64_t chunk = 0; chunk < chunks.count; ++chunk) {
        double* partial = partials.data() + chunk * k * b;
        double* w_rows = rows.data() + omp_get_thread_num() * b * block;
        for (std::int64_t i = 0; i < k * b; ++i) {
            partial[i] = 0.0;
        }
        const std::int64_t first = chunk * chunks.length;
        const std::int64_t last = first + chunks.length < w.columns ? first + chunks.length : w.columns;
        for (std::int64_t column = first; column < last; column += block) {
            const std::int64_t length = last - column < block ? last - column : block;
            load_rows(w_data + column, w.stride, b, length, w_rows, block);
            gram_block(v_data + column, v.stride, k, w_rows, block, b, length, partial);
        }
    }
    sum_partials(partials.data(), chunks.count, k * b, out);
}

}  // namespace

void panel_gram(const Panel& v, const Panel& w, double* out) {
    with_storage(v.precision, [&](auto* storage) {
        with_working(w.precision, [&](auto* working) {
            gram<std::remove_pointer_t<decltype(storage)>, std::remove_pointer_t<decltype(working)>>(v, w, out);
        });
    });
}

}  // namespace hesd::HESD_TARGET
