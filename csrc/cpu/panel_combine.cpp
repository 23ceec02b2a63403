#include "hesd/panel_combine.hpp"

#include "cpu/targets.hpp"
#include "cpu/tiles.hpp"

namespace hesd::HESD_TARGET {
namespace {

template <typename S, typename T>
void combine(const double* s, const Panel& v, const Panel& x) {
    typedef typename Common<S, T>::type C;
    const std::int64_t r = x.rows;
    const std::int64_t k = v.rows;
    const std::int64_t block = block_columns(r * static_cast<std::int64_t>(sizeof(C)), 64 * 1024);
    const std::int64_t stride = scratch_stride<C>(block);
    const Scratch<C> rows(most_threads() * r * stride);
    const Scratch<C> factors(r * k);
    for (std::int64_t i = 0; i < r * k; ++i) {
        factors.data()[i] = static_cast<C>(s != nullptr ? s[i] : i / k == i % k ? 1.0 : 0.0);
    }
    const S* v_data = static_cast<const S*>(v.data);
    T* x_data = static_cast<T*>(x.data);
    for_each_block(x.columns, block, [&](std::int64_t, int thread, std::int64_t column, std::int64_t length) {
        C* x_rows = rows.data() + thread * r * stride;
        for (std::int64_t i = 0; i < r * stride; ++i) {
            x_rows[i] = C(0);
        }
        combine_block(v_data + column, v.stride, k, factors.data(), 1, k, x_rows, stride, r, length);
        store_rows(x_rows, stride, r, length, x_data + column, x.stride);
    });
}

}  // namespace

void panel_combine(const double* s, const Panel& v, const Panel& x) {
    with_storage(v.precision, [&](auto* storage) {
        with_storage(x.precision, [&](auto* working) {
            combine<std::remove_pointer_t<decltype(storage)>, std::remove_pointer_t<decltype(working)>>(s, v, x);
        });
    });
}

}  // namespace hesd::HESD_TARGET
