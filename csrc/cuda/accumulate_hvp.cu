#include <algorithm>

#include "cuda/elements.cuh"
#include "cuda/kernels.hpp"

// Compiled without contraction of multiply and add: two-sum needs each operation rounded on its own.

namespace hesd::cuda {
namespace {

constexpr std::int64_t kPiece = 4096;
// Parts of one launch: they travel with its arguments, so that nothing is copied to the device before it.
constexpr std::int64_t kFewParts = 32;
constexpr std::int64_t kMostParts = 512;

struct PartEntry {
    const void* data;
    std::int64_t stride;
    std::int64_t offset;
    std::int64_t columns;
    std::int64_t first_piece;
    Precision precision;
};

template <typename T, std::int64_t Parts>
struct AccumulateArguments {
    T* out;
    T* compensation;  // null: none
    std::int64_t out_stride;
    std::int64_t compensation_stride;
    std::int64_t part_count;
    std::int64_t pieces;
    std::int64_t rows;
    T alpha;
    PartEntry parts[Parts];
};
static_assert(sizeof(AccumulateArguments<double, kMostParts>) <= 32764, "what a launch takes from CUDA 12.1 on");

// As many elements of a part as 16 bytes of out hold.
template <typename S, int Count>
struct alignas(Count * sizeof(S)) Chunk {
    S values[Count];
};

template <typename T>
HESD_DEVICE void add(T& out, T& error, T term) {
    const T sum = out + term;
    const T shared = sum - out;
    error += (out - (sum - shared)) + (term - shared);
    out = sum;
}

// One piece of one row of one part: single elements up to out's next 16 bytes, then 16 bytes of out for each thread.
template <typename T, typename S>
HESD_DEVICE void accumulate_piece(T* out, T* compensation, const S* part, std::int64_t length, T alpha, int thread) {
    constexpr int count = Vector<T>::length;
    const auto address = reinterpret_cast<std::uintptr_t>(out);
    std::int64_t head = static_cast<std::int64_t>((16 - address % 16) % 16 / sizeof(T));
    head = head < length ? head : length;
    const std::int64_t chunks = (length - head) / count;
    const bool part_aligned =
        (reinterpret_cast<std::uintptr_t>(part) + head * sizeof(S)) % sizeof(Chunk<S, count>) == 0;
    const bool compensation_aligned = (reinterpret_cast<std::uintptr_t>(compensation) + head * sizeof(T)) % 16 == 0;
    for (std::int64_t chunk = thread; chunk < chunks; chunk += kThreads) {
        const std::int64_t c = head + chunk * count;
        Chunk<S, count> terms;
        count_read(sizeof terms, false);
        if (part_aligned) {
            terms = load_whole<Chunk<S, count>>(part + c);
        } else {
#pragma unroll
            for (int e = 0; e < count; ++e) {
                terms.values[e] = part[c + e];
            }
        }
        Vector<T> sums = load<T>(out + c, count, true);
        Vector<T> errors{};
        if (compensation != nullptr) {
            errors = load<T>(compensation + c, count, compensation_aligned);
        }
#pragma unroll
        for (int e = 0; e < count; ++e) {
            add(sums.values[e], errors.values[e], alpha * widen<T>(terms.values[e]));
        }
        store(out + c, sums, count, true);
        if (compensation != nullptr) {
            store(compensation + c, errors, count, compensation_aligned);
        }
    }
    // what is left at both ends: fewer than two times `count` elements
    const std::int64_t ends = length - chunks * count;
    if (thread < ends) {
        const std::int64_t c = thread < head ? thread : thread + chunks * count;
        const std::int64_t moved = (compensation != nullptr ? 2 : 1) * sizeof(T);
        count_read(moved + sizeof(S), false);
        count_written(moved);
        T error = compensation != nullptr ? compensation[c] : T(0);
        add(out[c], error, alpha * widen<T>(part[c]));
        if (compensation != nullptr) {
            compensation[c] = error;
        }
    }
}

template <typename T, std::int64_t Parts>
HESD_KERNEL HESD_LAUNCH_BOUNDS(kThreads, 2) accumulate_kernel(HESD_ARGUMENT(AccumulateArguments<T, Parts>) a) {
    const int thread = static_cast<int>(threadIdx.x);
    for (std::int64_t work = blockIdx.x; work < a.pieces * a.rows; work += gridDim.x) {
        const std::int64_t row = work / a.pieces;
        const std::int64_t piece = work % a.pieces;
        std::int64_t low = 0;
        std::int64_t high = a.part_count;
        while (high - low > 1) {
            const std::int64_t middle = (low + high) / 2;
            (a.parts[middle].first_piece <= piece ? low : high) = middle;
        }
        const PartEntry part = a.parts[low];
        const std::int64_t column = (piece - part.first_piece) * kPiece;
        const std::int64_t rest = part.columns - column;
        const std::int64_t length = rest < kPiece ? rest : kPiece;
        T* out = a.out + row * a.out_stride + part.offset + column;
        T* compensation =
            a.compensation == nullptr ? nullptr : a.compensation + row * a.compensation_stride + part.offset + column;
        const std::int64_t first = row * part.stride + column;
        switch (part.precision) {
            case Precision::float64:
                if constexpr (sizeof(T) == 8) {  // parts wider than out are refused on entry
                    accumulate_piece(out, compensation, static_cast<const double*>(part.data) + first, length, a.alpha,
                                     thread);
                }
                break;
            case Precision::float32:
                accumulate_piece(out, compensation, static_cast<const float*>(part.data) + first, length, a.alpha,
                                 thread);
                break;
            case Precision::bfloat16:
                accumulate_piece(out, compensation, static_cast<const BFloat16*>(part.data) + first, length, a.alpha,
                                 thread);
                break;
            case Precision::float16:
                accumulate_piece(out, compensation, static_cast<const Float16*>(part.data) + first, length, a.alpha,
                                 thread);
                break;
        }
    }
}

template <typename T, std::int64_t Parts>
void accumulate(const Panel& out, const HvpPart* parts, std::int64_t part_count, double alpha,
                const Panel* compensation) {
    AccumulateArguments<T, Parts> a{};
    for (std::int64_t i = 0; i < part_count; ++i) {
        const Panel& values = parts[i].values;
        if (values.columns > 0) {
            a.parts[a.part_count++] = {values.data,    values.stride, parts[i].offset,
                                       values.columns, a.pieces,      values.precision};
            a.pieces += (values.columns + kPiece - 1) / kPiece;
        }
    }
    if (a.pieces == 0 || out.rows == 0) {
        return;
    }
    a.out = static_cast<T*>(out.data);
    a.out_stride = out.stride;
    if (compensation != nullptr) {
        a.compensation = static_cast<T*>(compensation->data);
        a.compensation_stride = compensation->stride;
    }
    a.rows = out.rows;
    a.alpha = static_cast<T>(alpha);
    launch("accumulate_hvp", accumulate_kernel<T, Parts>, std::min<std::int64_t>(a.pieces * out.rows, 16 * kBlocks),
           kThreads, 0, a);
}

template <typename T>
void accumulate(const Panel& out, const HvpPart* parts, std::int64_t part_count, double alpha,
                const Panel* compensation) {
    for (std::int64_t first = 0; first < part_count; first += kMostParts) {
        const std::int64_t count = std::min(kMostParts, part_count - first);
        const auto run = count <= kFewParts ? accumulate<T, kFewParts> : accumulate<T, kMostParts>;
        run(out, parts + first, count, alpha, compensation);
    }
}

}  // namespace

void accumulate_hvp(const Panel& out, const HvpPart* parts, std::int64_t part_count, double alpha,
                    const Panel* compensation) {
    const DeviceScope scope;
    if (out.precision == Precision::float64) {
        accumulate<double>(out, parts, part_count, alpha, compensation);
    } else {
        accumulate<float>(out, parts, part_count, alpha, compensation);
    }
}

}  // namespace hesd::cuda
