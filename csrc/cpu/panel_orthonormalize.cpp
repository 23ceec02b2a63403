#include "hesd/panel_orthonormalize.hpp"

#include "cpu/targets.hpp"
#include "cpu/tiles.hpp"
#include "small/pivoted_cholesky_qr.hpp"

namespace hesd::HESD_TARGET {
namespace {

// target <- transform (b, b) times source, rounded to T; the Gram matrix of the rounded rows unless null.
template <typename T>
void transform_rows(const Panel& source, const double* transform, const Panel& target, double* gram) {
    const std::int64_t b = source.rows;
    const std::int64_t block = block_columns(2 * b * 8, 64 * 1024);
    const std::int64_t size = gram != nullptr ? b * b : 0;
    const ChunkSums sums(source.columns, size);
    const Scratch<double> rows(most_threads() * 2 * b * block);
    const T* from = static_cast<const T*>(source.data);
    T* to = static_cast<T*>(target.data);
    for_each_block(source.columns, block,
                   [&](std::int64_t chunk, int thread, std::int64_t column, std::int64_t length) {
                       double* before = rows.data() + thread * 2 * b * block;
                       double* after = before + b * block;
                       load_rows(from + column, source.stride, b, length, before, block);
                       for (std::int64_t i = 0; i < b * block; ++i) {
                           after[i] = 0.0;
                       }
                       combine_block(before, block, b, transform, 1, b, after, block, b, length);
                       store_rows(after, block, b, length, to + column, target.stride);
                       load_rows(to + column, target.stride, b, length, after, block);
                       if (size > 0) {
                           self_gram_block(after, block, b, length, sums.of(chunk));
                       }
                   });
    if (size > 0) {
        sums.symmetric_total(0, b, gram);
    }
}

void transform_rows(const Panel& source, const double* transform, const Panel& target, double* gram) {
    if (source.precision == Precision::float64) {
        transform_rows<double>(source, transform, target, gram);
    } else {
        transform_rows<float>(source, transform, target, gram);
    }
}

}  // namespace

void panel_orthonormalize(const Panel& w, const Panel& out, const Orthonormalization& state, bool,
                          const Reduction& reduction) {
    for (;;) {
        orthonormalize_next(state);
        if (state.facts->stage == OrthonormalizeStage::last) {
            transform_rows(w, state.transform, out, nullptr);
            return;
        }
        if (state.facts->stage != OrthonormalizeStage::more) {
            return;
        }
        transform_rows(w, state.transform, w, state.gram);
        reduction(state.gram, state.rows * state.rows);
    }
}

}  // namespace hesd::HESD_TARGET
