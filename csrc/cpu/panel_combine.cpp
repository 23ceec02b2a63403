#include "hesd/panel_combine.hpp"

#include "cpu/targets.hpp"
#include "cpu/vector.hpp"

namespace hesd::HESD_TARGET {
namespace {

template <typename S, typename T>
void combine(const double* s, const Panel& v, const Panel& x) {
    const std::int64_t r = x.rows;
    const std::int64_t block = block_columns(r, 8, 32 * 1024);
    const Scratch rows(most_threads() * r * block);
    const S* v_data = static_cast<const S*>(v.data);
    T* x_data = static_cast<T*>(x.data);
    for_each_block(x.columns, block, [&](std::int64_t, int thread, std::int64_t column, std::int64_t length) {
        double* x_rows = rows.data() + thread * r * block;
        for (std::int64_t i = 0; i < r * block; ++i) {
            x_rows[i] = 0.0;
        }
        combine_block(v_data + column, v.stride, v.rows, s, 1, v.rows, x_rows, block, r, length);
        store_rows(x_rows, block, r, length, x_data + column, x.stride);
    });
}

}  // namespace

void panel_combine(const double* s, const Panel& v, const Panel& x) {
    with_storage(v.precision, [&](auto* storage) {
        with_working(x.precision, [&](auto* working) {
            combine<std::remove_pointer_t<decltype(storage)>, std::remove_pointer_t<decltype(working)>>(s, v, x);
        });
    });
}

}  // namespace hesd::HESD_TARGET
