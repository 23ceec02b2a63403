#include "hesd/panel_gram.hpp"

#include "cpu/targets.hpp"
#include "cpu/vector.hpp"

namespace hesd::HESD_TARGET {
namespace {

template <typename S, typename T>
void gram(const Panel& v, const Panel& w, double* out) {
    const std::int64_t k = v.rows;
    const std::int64_t b = w.rows;
    // W's doubles stay in the first-level cache while V's rows pass by.
    const std::int64_t block = block_columns(b, 8, 32 * 1024);
    const ChunkSums sums(w.columns, k * b);
    const Scratch rows(most_threads() * b * block);
    const S* v_data = static_cast<const S*>(v.data);
    const T* w_data = static_cast<const T*>(w.data);
    for_each_block(w.columns, block, [&](std::int64_t chunk, int thread, std::int64_t column, std::int64_t length) {
        double* w_rows = rows.data() + thread * b * block;
        load_rows(w_data + column, w.stride, b, length, w_rows, block);
        gram_block(v_data + column, v.stride, k, w_rows, block, b, length, sums.of(chunk));
    });
    sums.total(0, k * b, out);
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
