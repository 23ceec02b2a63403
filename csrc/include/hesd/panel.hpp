// The plain types that every kernel sees: panels, precisions, the reduction hook, the error.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

namespace hesd {

enum class Precision { float64, float32, bfloat16, float16 };

// Storage-only 16-bit formats: their value is read through a conversion, never computed with.
struct BFloat16 {
    std::uint16_t bits;
};
struct Float16 {
    std::uint16_t bits;
};

constexpr std::int64_t element_bytes(Precision precision) {
    return precision == Precision::float64 ? 8 : precision == Precision::float32 ? 4 : 2;
}

// Unit roundoff spacing (machine epsilon) of a precision.
constexpr double machine_epsilon(Precision precision) {
    switch (precision) {
        case Precision::float64:
            return 0x1p-52;
        case Precision::float32:
            return 0x1p-23;
        case Precision::bfloat16:
            return 0x1p-7;
        case Precision::float16:
            return 0x1p-10;
    }
    return 0.0;
}

// A row-major block of vectors: `rows` vectors of `columns` contiguous elements, `stride` elements apart.
// The memory belongs to the caller.
struct Panel {
    void* data;
    Precision precision;
    std::int64_t rows;
    std::int64_t columns;
    std::int64_t stride;

    // The same memory, rows [first, first + count).
    [[nodiscard]] Panel slice(std::int64_t first, std::int64_t count) const {
        return {static_cast<char*>(data) + first * stride * element_bytes(precision), precision, count, columns,
                stride};
    }
};

// Sums `count` doubles over all shards of the vectors, in place, with the same result on each shard.
// A null function means that the vectors are whole.
struct Reduction {
    void (*sum)(void* context, double* values, std::int64_t count) = nullptr;
    void* context = nullptr;

    inline __attribute__((always_inline)) void operator()(double* values, std::int64_t count) const {
        if (sum != nullptr) {
            sum(context, values, count);
        }
    }
};

// Raised for a panel that cannot be used, and where a device does not do what it should.
class EngineError : public std::runtime_error {
   public:
    using std::runtime_error::runtime_error;
};

// Raised for numbers that are not finite, or too large or small to be squared.
class NumericalError : public EngineError {
   public:
    using EngineError::EngineError;
};

}  // namespace hesd
