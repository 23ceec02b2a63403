// The inner loops of the panel kernels: columns in chunks, chunks in blocks that fit a cache, blocks in register tiles.
// Internal linkage throughout, as in vector.hpp.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <new>

#include "cpu/parallel.hpp"
#include "cpu/vector.hpp"
#include "hesd/panel.hpp"

namespace hesd {
namespace {

// Cache-line aligned memory for one kernel call.
template <typename C>
class Scratch {
   public:
    explicit Scratch(std::int64_t count) {
        const std::size_t bytes = (static_cast<std::size_t>(count > 0 ? count : 1) * sizeof(C) + 63) / 64 * 64;
        data_ = static_cast<C*>(std::aligned_alloc(64, bytes));
        if (data_ == nullptr) {
            throw std::bad_alloc();
        }
    }
    ~Scratch() { std::free(data_); }
    Scratch(const Scratch&) = delete;
    Scratch& operator=(const Scratch&) = delete;

    [[nodiscard]] C* data() const { return data_; }

   private:
    C* data_;
};

// The columns of a panel in pieces that depend on n alone, so that a reduction over them has one order whatever
// the number of threads. At most 256 pieces keep the partial sums small.
struct Chunks {
    std::int64_t length;
    std::int64_t count;
};
HESD_INLINE Chunks chunks_of(std::int64_t columns) {
    constexpr std::int64_t smallest = 4096;
    constexpr std::int64_t most = 256;
    std::int64_t length = (columns + most - 1) / most;
    length = (length + smallest - 1) / smallest * smallest;
    length = length < smallest ? smallest : length;
    return {length, (columns + length - 1) / length};
}

// Runs body(chunk, thread, column, length) over all columns: chunks in parallel, the blocks of a chunk in order.
template <typename Body>
HESD_INLINE void for_each_block(std::int64_t columns, std::int64_t block, Body body) {
    const Chunks chunks = chunks_of(columns);
    parallel_for(chunks.count, [&](std::int64_t chunk, int thread) {
        const std::int64_t first = chunk * chunks.length;
        const std::int64_t last = first + chunks.length < columns ? first + chunks.length : columns;
        for (std::int64_t column = first; column < last; column += block) {
            body(chunk, thread, column, last - column < block ? last - column : block);
        }
    });
}

// Sums of `size` doubles, one set for each chunk, added up in the order of the chunks.
class ChunkSums {
   public:
    ChunkSums(std::int64_t columns, std::int64_t size)
        : count_(chunks_of(columns).count), size_(size), memory_(count_ * size) {
        for (std::int64_t i = 0; i < count_ * size_; ++i) {
            memory_.data()[i] = 0.0;
        }
    }

    [[nodiscard]] double* of(std::int64_t chunk) const { return memory_.data() + chunk * size_; }

    // Writes `length` totals, those that start at `first`, to out.
    void total(std::int64_t first, std::int64_t length, double* out) const {
        for (std::int64_t i = 0; i < length; ++i) {
            out[i] = 0.0;
        }
        for (std::int64_t chunk = 0; chunk < count_; ++chunk) {
            const double* sums = of(chunk) + first;
            for (std::int64_t i = 0; i < length; ++i) {
                out[i] += sums[i];
            }
        }
    }

    // The same for a symmetric (b, b) matrix of which the upper triangle was summed.
    void symmetric_total(std::int64_t first, std::int64_t b, double* out) const {
        total(first, b * b, out);
        for (std::int64_t i = 0; i < b; ++i) {
            for (std::int64_t j = 0; j < i; ++j) {
                out[i * b + j] = out[j * b + i];
            }
        }
    }

   private:
    std::int64_t count_;
    std::int64_t size_;
    Scratch<double> memory_;
};

// Columns per block such that `column_bytes` of each column stay within about `cache` bytes: a multiple of 256 up
// to 4096.
HESD_INLINE std::int64_t block_columns(std::int64_t column_bytes, std::int64_t cache) {
    std::int64_t columns = cache / (column_bytes > 0 ? column_bytes : 1) / 256 * 256;
    columns = columns < 256 ? 256 : columns;
    return columns > 4096 ? 4096 : columns;
}

// Distance between scratch rows of `columns` elements: 512 bytes more than a multiple of the page, so that eight rows
// spread evenly over the sets of a first-level cache.
template <typename C>
HESD_INLINE std::int64_t scratch_stride(std::int64_t columns) {
    const std::int64_t bytes = columns * static_cast<std::int64_t>(sizeof(C));
    return ((bytes + 4095) / 4096 * 4096 + 512) / static_cast<std::int64_t>(sizeof(C));
}

template <typename C, typename S>
HESD_INLINE void load_rows(const S* source, std::int64_t stride, std::int64_t rows, std::int64_t length, C* target,
                           std::int64_t target_stride) {
    for (std::int64_t row = 0; row < rows; ++row) {
        const S* from = source + row * stride;
        C* to = target + row * target_stride;
        std::int64_t c = 0;
        for (; c + As<C>::lanes <= length; c += As<C>::lanes) {
            store(to + c, load(As<C>(), from + c));
        }
        for (; c < length; ++c) {
            to[c] = static_cast<C>(widen(from[c]));
        }
    }
}

// Rounds the rows to T.
template <typename C, typename T>
HESD_INLINE void store_rows(const C* source, std::int64_t source_stride, std::int64_t rows, std::int64_t length,
                            T* target, std::int64_t stride) {
    for (std::int64_t row = 0; row < rows; ++row) {
        const C* from = source + row * source_stride;
        T* to = target + row * stride;
        std::int64_t c = 0;
        for (; c + As<C>::lanes <= length; c += As<C>::lanes) {
            store(to + c, load(As<C>(), from + c));
        }
        for (; c < length; ++c) {
            store_one(to + c, from[c]);
        }
    }
}

// target <- target - source, rounded to T; source receives the new rows too.
template <typename C, typename T>
HESD_INLINE void subtract_rows(C* source, std::int64_t source_stride, std::int64_t rows, std::int64_t length, T* target,
                               std::int64_t stride) {
    for (std::int64_t row = 0; row < rows; ++row) {
        C* from = source + row * source_stride;
        T* to = target + row * stride;
        std::int64_t c = 0;
        for (; c + As<C>::lanes <= length; c += As<C>::lanes) {
            store(to + c, load(As<C>(), to + c) - load(As<C>(), from + c));
            store(from + c, load(As<C>(), to + c));
        }
        for (; c < length; ++c) {
            to[c] = static_cast<T>(to[c] - from[c]);
            from[c] = to[c];
        }
    }
}

// Register tiles of the Gram matrix: kGramRows<j> rows of V times j rows of W in accumulators at once.
#if defined(HESD_WIDE_REGISTER_FILE)
template <int Columns>
constexpr int kGramRows = Columns == 4 ? 4 : 8;
#else
template <int Columns>
constexpr int kGramRows = Columns == 4 ? 2 : 4;
#endif
// Columns that are summed in the arithmetic C before the sum goes on in float64: 64 products a lane.
template <typename C>
constexpr std::int64_t kRun = 64 * As<C>::lanes;

// Calls body(column, first) for every vector of `length` columns, a multiple of the lanes; `first` is true for one
// vector of each cache line of S. Four vectors a turn: with fewer, the loops below do not fill the multipliers.
template <typename C, typename S, typename Body>
HESD_INLINE void for_each_line(std::int64_t length, Body body) {
    constexpr int lanes = As<C>::lanes;
    constexpr int per_line =
        64 / (lanes * static_cast<int>(sizeof(S))) > 1 ? 64 / (lanes * static_cast<int>(sizeof(S))) : 1;
    std::int64_t c = 0;
    for (; c + 4 * lanes <= length; c += 4 * lanes) {
#pragma GCC unroll 16
        for (int vector = 0; vector < 4; ++vector) {
            body(c + vector * lanes, vector % per_line == 0);
        }
    }
    for (; c < length; c += lanes) {
        body(c, false);
    }
}

// `length` is a multiple of the lanes in the tiles; the rest of a block goes through the *_rest functions.
template <typename C, int Rows, int Columns, bool Prefetch, typename S, typename U>
HESD_INLINE void gram_tile(const S* v, std::int64_t v_stride, const S* ahead, const U* w, std::int64_t w_stride,
                           std::int64_t length, double* gram, std::int64_t gram_stride) {
    typedef typename As<C>::Vector Vector;
    Vector sums[Rows][Columns];
#pragma GCC unroll 16
    for (int i = 0; i < Rows; ++i) {
#pragma GCC unroll 16
        for (int j = 0; j < Columns; ++j) {
            sums[i][j] = Vector{};
        }
    }
    const auto add = [&](std::int64_t c, bool fetch) __attribute__((always_inline)) {
        Vector right[Columns];
#pragma GCC unroll 16
        for (int j = 0; j < Columns; ++j) {
            right[j] = load(As<C>(), w + j * w_stride + c);
            HESD_IN_REGISTER(right[j]);
        }
#pragma GCC unroll 16
        for (int i = 0; i < Rows; ++i) {
            Vector left = load(As<C>(), v + i * v_stride + c);
            HESD_IN_REGISTER(left);
            if (fetch) {
                __builtin_prefetch(ahead + i * v_stride + c);
            }
#pragma GCC unroll 16
            for (int j = 0; j < Columns; ++j) {
                sums[i][j] += left * right[j];
            }
        }
    };
    for_each_line<C, S>(length,
                        [&](std::int64_t c, bool first) __attribute__((always_inline)) { add(c, Prefetch && first); });
#pragma GCC unroll 16
    for (int i = 0; i < Rows; ++i) {
        add_sums_of_lanes<Columns>(sums[i], gram + i * gram_stride);
    }
}

template <typename S, typename U>
HESD_INLINE void gram_rest(const S* v, std::int64_t v_stride, std::int64_t k, const U* w, std::int64_t w_stride,
                           std::int64_t b, std::int64_t length, double* gram, std::int64_t gram_stride) {
    for (std::int64_t i = 0; i < k; ++i) {
        for (std::int64_t j = 0; j < b; ++j) {
            for (std::int64_t c = 0; c < length; ++c) {
                gram[i * gram_stride + j] +=
                    static_cast<double>(widen(v[i * v_stride + c])) * widen(w[j * w_stride + c]);
            }
        }
    }
}

// Rows of V against all rows of W, which stays in the first-level cache for as many columns as `length`.
template <typename C, int Rows, int Columns, typename S, typename U>
HESD_INLINE void gram_tiles(const S* v, std::int64_t v_stride, const S* ahead, const U* w, std::int64_t w_stride,
                            std::int64_t b, std::int64_t length, double* gram) {
    std::int64_t j = 0;
    if (ahead != nullptr) {
        gram_tile<C, Rows, Columns, true>(v, v_stride, ahead, w, w_stride, length, gram, b);
        j = Columns;
    }
    for (; j + Columns <= b; j += Columns) {
        gram_tile<C, Rows, Columns, false>(v, v_stride, v, w + j * w_stride, w_stride, length, gram + j, b);
    }
    if constexpr (Columns > 2) {
        if (j + 2 <= b) {
            gram_tile<C, Rows, 2, false>(v, v_stride, v, w + j * w_stride, w_stride, length, gram + j, b);
            j += 2;
        }
    }
    if constexpr (Columns > 1) {
        if (j < b) {
            gram_tile<C, Rows, 1, false>(v, v_stride, v, w + j * w_stride, w_stride, length, gram + j, b);
        }
    }
}

// Each tile fetches the rows of the next one: the hardware's prefetchers lose the track at the end of each run.
template <typename C, int Columns, bool Stream, typename S, typename U>
HESD_INLINE void gram_runs(const S* v, std::int64_t v_stride, std::int64_t k, const U* w, std::int64_t w_stride,
                           std::int64_t b, std::int64_t length, double* gram) {
    constexpr int Rows = kGramRows<Columns>;
    for (std::int64_t c = 0; c < length; c += kRun<C>) {
        const std::int64_t run = length - c < kRun<C> ? length - c : kRun<C>;
        std::int64_t i = 0;
        for (; i + Rows <= k; i += Rows) {
            const S* rows = v + i * v_stride + c;
            const bool more = i + 2 * Rows <= k;
            const S* ahead = !Stream                     ? nullptr
                             : more                      ? rows + Rows * v_stride
                             : c + 2 * kRun<C> <= length ? v + c + kRun<C>
                                                         : nullptr;
            gram_tiles<C, Rows, Columns>(rows, v_stride, ahead, w + c, w_stride, b, run, gram + i * b);
        }
        for (; i < k; ++i) {
            gram_tiles<C, 1, Columns>(v + i * v_stride + c, v_stride, static_cast<const S*>(nullptr), w + c, w_stride,
                                      b, run, gram + i * b);
        }
    }
}

// gram (k, b) += V W^T over `length` columns, products in C. Stream: V comes from memory, not from a cache.
template <typename C, bool Stream, typename S, typename U>
void gram_block(const S* v, std::int64_t v_stride, std::int64_t k, const U* w, std::int64_t w_stride, std::int64_t b,
                std::int64_t length, double* gram) {
    const std::int64_t whole = length / As<C>::lanes * As<C>::lanes;
    if (b >= 4) {
        gram_runs<C, 4, Stream>(v, v_stride, k, w, w_stride, b, whole, gram);
    } else if (b >= 2) {
        gram_runs<C, 2, Stream>(v, v_stride, k, w, w_stride, b, whole, gram);
    } else {
        gram_runs<C, 1, Stream>(v, v_stride, k, w, w_stride, b, whole, gram);
    }
    gram_rest(v + whole, v_stride, k, w + whole, w_stride, b, length - whole, gram, b);
}

// The upper triangle of gram (b, b) += W W^T over `length` columns, products in float64.
template <typename U>
void self_gram_block(const U* w, std::int64_t w_stride, std::int64_t b, std::int64_t length, double* gram) {
    const std::int64_t whole = length / As<double>::lanes * As<double>::lanes;
    std::int64_t i = 0;
    for (; i + 2 <= b; i += 2) {
        const U* rows = w + i * w_stride;
        std::int64_t j = i;
        for (; j + 4 <= b; j += 4) {
            gram_tile<double, 2, 4, false>(rows, w_stride, rows, w + j * w_stride, w_stride, whole, gram + i * b + j,
                                           b);
        }
        for (; j + 2 <= b; j += 2) {
            gram_tile<double, 2, 2, false>(rows, w_stride, rows, w + j * w_stride, w_stride, whole, gram + i * b + j,
                                           b);
        }
        if (j < b) {
            gram_tile<double, 2, 1, false>(rows, w_stride, rows, w + j * w_stride, w_stride, whole, gram + i * b + j,
                                           b);
        }
    }
    if (i < b) {
        const U* row = w + i * w_stride;
        gram_tile<double, 1, 1, false>(row, w_stride, row, row, w_stride, whole, gram + i * b + i, b);
    }
    gram_rest(w + whole, w_stride, b, w + whole, w_stride, b, length - whole, gram, b);
}

constexpr int kCombineRows = 4;

template <typename C, int Rows, int Columns, bool Prefetch, typename S>
HESD_INLINE void combine_tile(const S* v, std::int64_t v_stride, const S* ahead, const C* coefficients,
                              std::int64_t row_step, std::int64_t column_step, C* x, std::int64_t x_stride,
                              std::int64_t length) {
    typedef typename As<C>::Vector Vector;
    Vector factors[Rows][Columns];
#pragma GCC unroll 16
    for (int i = 0; i < Rows; ++i) {
#pragma GCC unroll 16
        for (int j = 0; j < Columns; ++j) {
            factors[i][j] = Vector{} + coefficients[i * row_step + j * column_step];
        }
    }
    for_each_line<C, S>(length, [&](std::int64_t c, bool first) __attribute__((always_inline)) {
        Vector sums[Columns];
#pragma GCC unroll 16
        for (int j = 0; j < Columns; ++j) {
            sums[j] = load(As<C>(), x + j * x_stride + c);
        }
#pragma GCC unroll 16
        for (int i = 0; i < Rows; ++i) {
            Vector row = load(As<C>(), v + i * v_stride + c);
            HESD_IN_REGISTER(row);
            if (Prefetch && first) {
                __builtin_prefetch(ahead + i * v_stride + c);
            }
#pragma GCC unroll 16
            for (int j = 0; j < Columns; ++j) {
                sums[j] += factors[i][j] * row;
            }
        }
#pragma GCC unroll 16
        for (int j = 0; j < Columns; ++j) {
            store(x + j * x_stride + c, sums[j]);
        }
    });
}

template <typename C, typename S>
HESD_INLINE void combine_rest(const S* v, std::int64_t v_stride, std::int64_t k, const C* coefficients,
                              std::int64_t row_step, std::int64_t column_step, C* x, std::int64_t x_stride,
                              std::int64_t b, std::int64_t length) {
    for (std::int64_t i = 0; i < k; ++i) {
        for (std::int64_t j = 0; j < b; ++j) {
            for (std::int64_t c = 0; c < length; ++c) {
                x[j * x_stride + c] +=
                    coefficients[i * row_step + j * column_step] * static_cast<C>(widen(v[i * v_stride + c]));
            }
        }
    }
}

template <typename C, int Rows, int Columns, typename S>
HESD_INLINE void combine_columns(const S* v, std::int64_t v_stride, const S* ahead, const C* coefficients,
                                 std::int64_t row_step, std::int64_t column_step, C* x, std::int64_t x_stride,
                                 std::int64_t length) {
    if (ahead != nullptr) {
        combine_tile<C, Rows, Columns, true>(v, v_stride, ahead, coefficients, row_step, column_step, x, x_stride,
                                             length);
    } else {
        combine_tile<C, Rows, Columns, false>(v, v_stride, v, coefficients, row_step, column_step, x, x_stride, length);
    }
}

template <typename C, int Rows, typename S>
HESD_INLINE void combine_tiles(const S* v, std::int64_t v_stride, const S* ahead, const C* coefficients,
                               std::int64_t row_step, std::int64_t column_step, C* x, std::int64_t x_stride,
                               std::int64_t columns, std::int64_t length) {
    std::int64_t j = 0;
    for (; j + 4 <= columns; j += 4) {
        combine_columns<C, Rows, 4>(v, v_stride, j == 0 ? ahead : nullptr, coefficients + j * column_step, row_step,
                                    column_step, x + j * x_stride, x_stride, length);
    }
    for (; j + 2 <= columns; j += 2) {
        combine_columns<C, Rows, 2>(v, v_stride, j == 0 ? ahead : nullptr, coefficients + j * column_step, row_step,
                                    column_step, x + j * x_stride, x_stride, length);
    }
    if (j < columns) {
        combine_columns<C, Rows, 1>(v, v_stride, j == 0 ? ahead : nullptr, coefficients + j * column_step, row_step,
                                    column_step, x + j * x_stride, x_stride, length);
    }
}

// X (b, length) += coefficients^T V, where coefficient (i, j) lies at [i * row_step + j * column_step].
template <typename C, typename S>
void combine_block(const S* v, std::int64_t v_stride, std::int64_t k, const C* coefficients, std::int64_t row_step,
                   std::int64_t column_step, C* x, std::int64_t x_stride, std::int64_t b, std::int64_t length) {
    const std::int64_t whole = length / As<C>::lanes * As<C>::lanes;
    for (std::int64_t c = 0; c < whole; c += kRun<C>) {
        const std::int64_t run = whole - c < kRun<C> ? whole - c : kRun<C>;
        std::int64_t i = 0;
        for (; i + kCombineRows <= k; i += kCombineRows) {
            const S* rows = v + i * v_stride + c;
            const bool more = i + 2 * kCombineRows <= k;
            const S* ahead = more                       ? rows + kCombineRows * v_stride
                             : c + 2 * kRun<C> <= whole ? v + c + kRun<C>
                                                        : nullptr;
            combine_tiles<C, kCombineRows>(rows, v_stride, ahead, coefficients + i * row_step, row_step, column_step,
                                           x + c, x_stride, b, run);
        }
        for (; i < k; ++i) {
            combine_tiles<C, 1>(v + i * v_stride + c, v_stride, static_cast<const S*>(nullptr),
                                coefficients + i * row_step, row_step, column_step, x + c, x_stride, b, run);
        }
    }
    combine_rest(v + whole, v_stride, k, coefficients, row_step, column_step, x + whole, x_stride, b, length - whole);
}

}  // namespace
}  // namespace hesd
