// Vectors of doubles for the CPU kernels, in the compiler's vector extension: the same source for each instruction set.
// Included only by files that are compiled once per target; everything has internal linkage, so that code
// generated for one instruction set never stands in for another.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <new>

#include "cpu/parallel.hpp"
#include "hesd/panel.hpp"

namespace hesd {
namespace {

constexpr int kLanes = HESD_LANES;
typedef double DoubleVector __attribute__((vector_size(kLanes * 8)));
typedef float FloatVector __attribute__((vector_size(kLanes * 4)));
typedef std::uint32_t WordVector __attribute__((vector_size(kLanes * 4)));
typedef std::uint16_t HalfWordVector __attribute__((vector_size(kLanes * 2)));

#define HESD_INLINE inline __attribute__((always_inline))

HESD_INLINE float bits_to_float(std::uint32_t bits) {
    float value;
    __builtin_memcpy(&value, &bits, sizeof value);
    return value;
}

HESD_INLINE double to_double(double value) { return value; }
HESD_INLINE double to_double(float value) { return value; }
HESD_INLINE double to_double(BFloat16 value) { return bits_to_float(static_cast<std::uint32_t>(value.bits) << 16); }
// The exponent and fraction move into float32's fields; multiplying by 2^112 corrects the exponent bias and
// makes subnormals normal. Infinities and NaNs get float32's largest exponent.
HESD_INLINE double to_double(Float16 value) {
    const std::uint32_t sign = static_cast<std::uint32_t>(value.bits & 0x8000u) << 16;
    std::uint32_t magnitude = static_cast<std::uint32_t>(value.bits & 0x7fffu) << 13;
    if (magnitude >= 0x0f800000u) {
        magnitude |= 0x7f800000u;
        return bits_to_float(magnitude | sign);
    }
    const float scaled = bits_to_float(magnitude) * 0x1p112f;
    return sign != 0 ? -scaled : scaled;
}

HESD_INLINE DoubleVector load(const double* source) {
    DoubleVector value;
    __builtin_memcpy(&value, source, sizeof value);
    return value;
}
HESD_INLINE DoubleVector load(const float* source) {
    FloatVector value;
    __builtin_memcpy(&value, source, sizeof value);
    return __builtin_convertvector(value, DoubleVector);
}
// A cast between vector types of one size keeps the bits.
HESD_INLINE DoubleVector load(const BFloat16* source) {
    HalfWordVector bits;
    __builtin_memcpy(&bits, source, sizeof bits);
    const WordVector wide = __builtin_convertvector(bits, WordVector) << 16;
    return __builtin_convertvector((FloatVector)wide, DoubleVector);
}
HESD_INLINE DoubleVector load(const Float16* source) {
    HalfWordVector bits;
    __builtin_memcpy(&bits, source, sizeof bits);
    const WordVector wide = __builtin_convertvector(bits, WordVector);
    const WordVector sign = (wide & 0x8000u) << 16;
    const WordVector magnitude = (wide & 0x7fffu) << 13;
    const FloatVector scaled = (FloatVector)magnitude * 0x1p112f;
    const WordVector is_special = (WordVector)(magnitude >= 0x0f800000u);
    const WordVector merged = (is_special & (magnitude | 0x7f800000u)) | (~is_special & (WordVector)scaled);
    return __builtin_convertvector((FloatVector)(merged | sign), DoubleVector);
}

HESD_INLINE void store(double* target, DoubleVector value) { __builtin_memcpy(target, &value, sizeof value); }
HESD_INLINE void store(float* target, DoubleVector value) {
    const FloatVector narrow = __builtin_convertvector(value, FloatVector);
    __builtin_memcpy(target, &narrow, sizeof narrow);
}

HESD_INLINE double horizontal_sum(DoubleVector value) {
    double sum = 0.0;
    for (int lane = 0; lane < kLanes; ++lane) {
        sum += value[lane];
    }
    return sum;
}

// Cache-line aligned doubles for one kernel call.
class Scratch {
   public:
    explicit Scratch(std::int64_t count) {
        const std::size_t bytes = (static_cast<std::size_t>(count > 0 ? count : 1) * sizeof(double) + 63) / 64 * 64;
        data_ = static_cast<double*>(std::aligned_alloc(64, bytes));
        if (data_ == nullptr) {
            throw std::bad_alloc();
        }
    }
    ~Scratch() { std::free(data_); }
    Scratch(const Scratch&) = delete;
    Scratch& operator=(const Scratch&) = delete;

    [[nodiscard]] double* data() const { return data_; }

   private:
    double* data_;
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

   private:
    std::int64_t count_;
    std::int64_t size_;
    Scratch memory_;
};

template <typename T>
HESD_INLINE void load_rows(const T* source, std::int64_t stride, std::int64_t rows, std::int64_t length, double* target,
                           std::int64_t target_stride) {
    for (std::int64_t row = 0; row < rows; ++row) {
        const T* from = source + row * stride;
        double* to = target + row * target_stride;
        std::int64_t c = 0;
        for (; c + kLanes <= length; c += kLanes) {
            store(to + c, load(from + c));
        }
        for (; c < length; ++c) {
            to[c] = to_double(from[c]);
        }
    }
}

// Rounds the doubles to T, in place as well, so that what follows uses the stored values.
template <typename T>
HESD_INLINE void store_rows(double* source, std::int64_t source_stride, std::int64_t rows, std::int64_t length,
                            T* target, std::int64_t stride) {
    for (std::int64_t row = 0; row < rows; ++row) {
        double* from = source + row * source_stride;
        T* to = target + row * stride;
        std::int64_t c = 0;
        for (; c + kLanes <= length; c += kLanes) {
            store(to + c, load(from + c));
            store(from + c, load(to + c));
        }
        for (; c < length; ++c) {
            to[c] = static_cast<T>(from[c]);
            from[c] = to[c];
        }
    }
}

// Register tiles: V rows times W rows held in accumulators at once.
constexpr int kRowTile = 4;
constexpr int kColumnTile = kLanes >= 8 ? 4 : 2;

template <typename S, int Rows, int Columns>
HESD_INLINE void gram_tile(const S* v, std::int64_t v_stride, const double* w, std::int64_t w_stride,
                           std::int64_t length, double* gram, std::int64_t gram_stride) {
    DoubleVector sums[Rows][Columns] = {};
    std::int64_t c = 0;
    for (; c + kLanes <= length; c += kLanes) {
        DoubleVector right[Columns];
        for (int j = 0; j < Columns; ++j) {
            right[j] = load(w + j * w_stride + c);
        }
        for (int i = 0; i < Rows; ++i) {
            const DoubleVector left = load(v + i * v_stride + c);
            for (int j = 0; j < Columns; ++j) {
                sums[i][j] += left * right[j];
            }
        }
    }
    for (int i = 0; i < Rows; ++i) {
        for (int j = 0; j < Columns; ++j) {
            double sum = horizontal_sum(sums[i][j]);
            for (std::int64_t tail = c; tail < length; ++tail) {
                sum += to_double(v[i * v_stride + tail]) * w[j * w_stride + tail];
            }
            gram[i * gram_stride + j] += sum;
        }
    }
}

template <typename S, int Rows>
HESD_INLINE void gram_row_tile(const S* v, std::int64_t v_stride, const double* w, std::int64_t w_stride,
                               std::int64_t columns, std::int64_t length, double* gram, std::int64_t gram_stride) {
    std::int64_t j = 0;
    for (; j + kColumnTile <= columns; j += kColumnTile) {
        gram_tile<S, Rows, kColumnTile>(v, v_stride, w + j * w_stride, w_stride, length, gram + j, gram_stride);
    }
    for (; j < columns; ++j) {
        gram_tile<S, Rows, 1>(v, v_stride, w + j * w_stride, w_stride, length, gram + j, gram_stride);
    }
}

// gram (k, b) += V W^T over `length` columns; W as doubles.
template <typename S>
void gram_block(const S* v, std::int64_t v_stride, std::int64_t k, const double* w, std::int64_t w_stride,
                std::int64_t b, std::int64_t length, double* gram) {
    std::int64_t i = 0;
    for (; i + kRowTile <= k; i += kRowTile) {
        gram_row_tile<S, kRowTile>(v + i * v_stride, v_stride, w, w_stride, b, length, gram + i * b, b);
    }
    for (; i < k; ++i) {
        gram_row_tile<S, 1>(v + i * v_stride, v_stride, w, w_stride, b, length, gram + i * b, b);
    }
}

template <typename S, int Rows>
HESD_INLINE void combine_tile(const S* v, std::int64_t v_stride, const double* coefficients,
                              std::int64_t coefficient_stride, double* w, std::int64_t length) {
    std::int64_t c = 0;
    for (; c + kLanes <= length; c += kLanes) {
        DoubleVector sum = load(w + c);
        for (int i = 0; i < Rows; ++i) {
            sum += coefficients[i * coefficient_stride] * load(v + i * v_stride + c);
        }
        store(w + c, sum);
    }
    for (; c < length; ++c) {
        double sum = w[c];
        for (int i = 0; i < Rows; ++i) {
            sum += coefficients[i * coefficient_stride] * to_double(v[i * v_stride + c]);
        }
        w[c] = sum;
    }
}

// W (b, length doubles) += coefficients^T V, where coefficient (i, j) lies at [i * row_step + j * column_step].
template <typename S>
void combine_block(const S* v, std::int64_t v_stride, std::int64_t k, const double* coefficients, std::int64_t row_step,
                   std::int64_t column_step, double* w, std::int64_t w_stride, std::int64_t b, std::int64_t length) {
    std::int64_t i = 0;
    for (; i + kRowTile <= k; i += kRowTile) {
        for (std::int64_t j = 0; j < b; ++j) {
            combine_tile<S, kRowTile>(v + i * v_stride, v_stride, coefficients + i * row_step + j * column_step,
                                      row_step, w + j * w_stride, length);
        }
    }
    for (; i < k; ++i) {
        for (std::int64_t j = 0; j < b; ++j) {
            combine_tile<S, 1>(v + i * v_stride, v_stride, coefficients + i * row_step + j * column_step, row_step,
                               w + j * w_stride, length);
        }
    }
}

// Columns per block such that `rows` rows of `bytes`-sized elements stay within about `cache` bytes.
HESD_INLINE std::int64_t block_columns(std::int64_t rows, std::int64_t bytes, std::int64_t cache) {
    std::int64_t columns = cache / (rows > 0 ? rows * bytes : 1) / 64 * 64;
    columns = columns < 64 ? 64 : columns;
    return columns > 4096 ? 4096 : columns;
}

// Calls `body` with a typed null pointer of the panel's element type.
template <typename Body>
HESD_INLINE void with_storage(Precision precision, Body body) {
    switch (precision) {
        case Precision::float64:
            body(static_cast<double*>(nullptr));
            return;
        case Precision::float32:
            body(static_cast<float*>(nullptr));
            return;
        case Precision::bfloat16:
            body(static_cast<BFloat16*>(nullptr));
            return;
        case Precision::float16:
            body(static_cast<Float16*>(nullptr));
            return;
    }
}
template <typename Body>
HESD_INLINE void with_working(Precision precision, Body body) {
    if (precision == Precision::float64) {
        body(static_cast<double*>(nullptr));
    } else {
        body(static_cast<float*>(nullptr));
    }
}

}  // namespace
}  // namespace hesd
