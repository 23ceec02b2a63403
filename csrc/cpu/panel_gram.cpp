#include "hesd/panel_gram.hpp"

#include "cpu/targets.hpp"
#include "cpu/tiles.hpp"

namespace hesd::HESD_TARGET {
namespace {

// W's rows stay in the second-level cache while V's rows pass by.
constexpr std::int64_t kCache = 64 * 1024;

template <typename S, typename T>
void gram(const Panel& v, const Panel& w, double* out) {
    typedef typename Common<S, T>::type C;
    const std::int64_t k = v.rows;
    const std::int64_t b = w.rows;
    const std::int64_t block = block_columns(b * static_cast<std::int64_t>(sizeof(C)), kCache);
    const ChunkSums sums(w.columns, k * b);
    const std::int64_t stride = scratch_stride<C>(block);
    const Scratch<C> rows(most_threads() * b * stride);
    const S* v_data = static_cast<const S*>(v.data);
    const T* w_data = static_cast<const T*>(w.data);
    for_each_block(w.columns, block, [&](std::int64_t chunk, int thread, std::int64_t column, std::int64_t length) {
        C* w_rows = rows.data() + thread * b * stride;
        load_rows(w_data + column, w.stride, b, length, w_rows, stride);
        gram_block<C, true>(v_data + column, v.stride, k, w_rows, stride, b, length, sums.of(chunk));
    });
    sums.total(0, k * b, out);
}

template <typename T>
void self_gram(const Panel& w, double* out) {
    const std::int64_t b = w.rows;
    const std::int64_t block = block_columns(b * static_cast<std::int64_t>(sizeof(T)), kCache);
    const ChunkSums sums(w.columns, b * b);
    const T* data = static_cast<const T*>(w.data);
    for_each_block(w.columns, block, [&](std::int64_t chunk, int, std::int64_t column, std::int64_t length) {
        self_gram_block(data + column, w.stride, b, length, sums.of(chunk));
    });
    sums.symmetric_total(0, b, out);
}

}  // namespace

void panel_gram(const Panel& v, const Panel& w, double* out) {
    if (v.data == w.data && v.stride == w.stride && v.rows == w.rows && v.precision == w.precision) {
        with_working(w.precision, [&](auto* working) { self_gram<std::remove_pointer_t<decltype(working)>>(w, out); });
        return;
    }
    with_storage(v.precision, [&](auto* storage) {
        with_working(w.precision, [&](auto* working) {
            gram<std::remove_pointer_t<decltype(storage)>, std::remove_pointer_t<decltype(working)>>(v, w, out);
        });
    });
}

}  // namespace hesd::HESD_TARGET
