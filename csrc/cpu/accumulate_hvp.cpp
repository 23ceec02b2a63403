#include "hesd/accumulate_hvp.hpp"

#include "cpu/targets.hpp"
#include "cpu/tiles.hpp"

// Compiled without contraction of multiply and add: two-sum needs each operation rounded on its own.

namespace hesd::HESD_TARGET {
namespace {

constexpr std::int64_t kPiece = 16384;

template <typename T>
HESD_INLINE T read(const T* source) {
    return *source;
}
template <typename T>
HESD_INLINE T read(const float* source) {
    return static_cast<T>(*source);
}
template <typename T>
HESD_INLINE T read(const BFloat16* source) {
    return static_cast<T>(widen(*source));
}
template <typename T>
HESD_INLINE T read(const Float16* source) {
    return static_cast<T>(widen(*source));
}

template <typename T, typename S>
void accumulate(T* out, const S* part, T alpha, T* compensation, std::int64_t length) {
    if (compensation == nullptr) {
        for (std::int64_t i = 0; i < length; ++i) {
            out[i] += alpha * read<T>(part + i);
        }
        return;
    }
    for (std::int64_t i = 0; i < length; ++i) {
        const T old = out[i];
        const T term = alpha * read<T>(part + i);
        const T sum = old + term;
        const T shared = sum - old;
        compensation[i] += (old - (sum - shared)) + (term - shared);
        out[i] = sum;
    }
}

template <typename T>
void accumulate_piece(const Panel& out, const HvpPart& part, std::int64_t row, std::int64_t column, std::int64_t length,
                      double alpha, const Panel* compensation) {
    T* to = static_cast<T*>(out.data) + row * out.stride + part.offset + column;
    T* errors = compensation == nullptr
                    ? nullptr
                    : static_cast<T*>(compensation->data) + row * compensation->stride + part.offset + column;
    with_storage(part.values.precision, [&](auto* storage) {
        using S = std::remove_pointer_t<decltype(storage)>;
        if constexpr (sizeof(S) <= sizeof(T)) {  // parts wider than out are refused on entry
            accumulate<T, S>(to, static_cast<const S*>(part.values.data) + row * part.values.stride + column,
                             static_cast<T>(alpha), errors, length);
        }
    });
}

}  // namespace

void accumulate_hvp(const Panel& out, const HvpPart* parts, std::int64_t part_count, double alpha,
                    const Panel* compensation) {
    // One list of equal pieces over all parts, so that many small tensors and one large one share the threads alike.
    const Scratch<std::int64_t> starts_memory(part_count + 1);
    std::int64_t* starts = starts_memory.data();
    starts[0] = 0;
    for (std::int64_t i = 0; i < part_count; ++i) {
        starts[i + 1] = starts[i] + (parts[i].values.columns + kPiece - 1) / kPiece;
    }
    const std::int64_t pieces = starts[part_count];
    parallel_for(pieces * out.rows, [&](std::int64_t work, int) {
        const std::int64_t row = work / pieces;
        const std::int64_t piece = work % pieces;
        std::int64_t low = 0;
        std::int64_t high = part_count;
        while (high - low > 1) {
            const std::int64_t middle = (low + high) / 2;
            (starts[middle] <= piece ? low : high) = middle;
        }
        const std::int64_t column = (piece - starts[low]) * kPiece;
        const std::int64_t rest = parts[low].values.columns - column;
        const std::int64_t length = rest < kPiece ? rest : kPiece;
        if (out.precision == Precision::float64) {
            accumulate_piece<double>(out, parts[low], row, column, length, alpha, compensation);
        } else {
            accumulate_piece<float>(out, parts[low], row, column, length, alpha, compensation);
        }
    });
}

}  // namespace hesd::HESD_TARGET
