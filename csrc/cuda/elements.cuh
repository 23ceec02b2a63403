// Elements of panels on the device: 16-byte loads, conversions, warp sums.
#pragma once

#include <cstdint>

#include "cuda/runtime.cuh"
#include "kernels/element_types.hpp"

namespace hesd::cuda {

// A panel as a kernel sees it.
template <typename S>
struct Rows {
    S* data;
    std::int64_t stride;
    bool aligned;  // every row starts on 16 bytes

    HESD_DEVICE S* at(std::int64_t row, std::int64_t column) const { return data + row * stride + column; }
};

inline bool aligned(const Panel& panel) {
    return reinterpret_cast<std::uintptr_t>(panel.data) % 16 == 0 &&
           panel.stride * element_bytes(panel.precision) % 16 == 0;
}

template <typename S>
Rows<S> rows_of(const Panel& panel) {
    return {static_cast<S*>(panel.data), panel.stride, aligned(panel)};
}

template <typename C>
HESD_DEVICE C widen(double value) {
    return static_cast<C>(value);
}
template <typename C>
HESD_DEVICE C widen(float value) {
    return static_cast<C>(value);
}
template <typename C>
HESD_DEVICE C widen(BFloat16 value) {
    return static_cast<C>(__uint_as_float(static_cast<unsigned>(value.bits) << 16));
}
template <typename C>
HESD_DEVICE C widen(Float16 value) {
    return static_cast<C>(__half2float(__ushort_as_half(value.bits)));
}

// To nearest, ties to even; float64 to 16 bits through float32.
template <typename C>
HESD_DEVICE void narrow(C value, double* target) {
    *target = static_cast<double>(value);
}
template <typename C>
HESD_DEVICE void narrow(C value, float* target) {
    *target = static_cast<float>(value);
}
template <typename C>
HESD_DEVICE void narrow(C value, BFloat16* target) {
    target->bits = __bfloat16_as_ushort(__float2bfloat16_rn(static_cast<float>(value)));
}
template <typename C>
HESD_DEVICE void narrow(C value, Float16* target) {
    target->bits = __half_as_ushort(__float2half_rn(static_cast<float>(value)));
}

// 16 bytes of a row.
template <typename S>
struct alignas(16) Vector {
    static constexpr int length = 16 / static_cast<int>(sizeof(S));
    S values[length];
};

// `valid` elements from `source` on, the rest zeros. Where all are valid and the rows are aligned, one 16-byte load.
// `again`: the block has read them shortly before, and should find them in the cache.
template <typename S>
HESD_DEVICE Vector<S> load(const S* source, std::int64_t valid, bool aligned, bool again = false) {
    Vector<S> vector;
    count_read(valid < Vector<S>::length ? valid * sizeof(S) : 16, again);
    if (aligned && valid >= Vector<S>::length) {
        const uint4 bits = load_whole<uint4>(source);
        memcpy(&vector, &bits, sizeof vector);
        return vector;
    }
#pragma unroll
    for (int e = 0; e < Vector<S>::length; ++e) {
        vector.values[e] = e < valid ? source[e] : S{};
    }
    return vector;
}

template <typename S>
HESD_DEVICE void store(S* target, const Vector<S>& vector, std::int64_t valid, bool aligned) {
    count_written(valid < Vector<S>::length ? valid * sizeof(S) : 16);
    if (aligned && valid >= Vector<S>::length) {
        uint4 bits;
        memcpy(&bits, &vector, sizeof bits);
        store_16_bytes(target, bits);
        return;
    }
#pragma unroll
    for (int e = 0; e < Vector<S>::length; ++e) {
        if (e < valid) {
            target[e] = vector.values[e];
        }
    }
}

// Sums Count values over the lanes of a warp, in a fixed order, by Count - 1 + log2(32 / Count) shuffles: at each step
// a lane hands over one half of its values and keeps the other. The lane l gets the sum of value l * Count / 32.
template <int Count, typename C>
HESD_DEVICE C sum_over_warp(C (&values)[Count], int lane) {
    static_assert(Count >= 1 && Count <= kWarp && (Count & (Count - 1)) == 0, "as many values as lanes, or fewer");
    int lane_bit = kWarp / 2;
#pragma unroll
    for (int half = Count / 2; half >= 1; half /= 2) {
        const bool upper = (lane & lane_bit) != 0;
#pragma unroll
        for (int i = 0; i < Count / 2; ++i) {
            if (i < half) {
                const C give = upper ? values[i] : values[i + half];
                const C keep = upper ? values[i + half] : values[i];
                values[i] = keep + __shfl_xor_sync(0xffffffffu, give, lane_bit);
            }
        }
        lane_bit /= 2;
    }
    C sum = values[0];
#pragma unroll
    for (int step = 0; step < 5; ++step) {
        if (lane_bit >= 1) {
            sum += __shfl_xor_sync(0xffffffffu, sum, lane_bit);
            lane_bit /= 2;
        }
    }
    return sum;
}

}  // namespace hesd::cuda
