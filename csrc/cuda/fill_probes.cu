#include <algorithm>

#include "cuda/elements.cuh"
#include "cuda/kernels.hpp"
#include "kernels/probe_values.hpp"

// Compiled without contraction of multiply and add, so that Gaussian probes have the bits that they have on a CPU.

namespace hesd::cuda {
namespace {

template <typename T>
struct FillArguments {
    Rows<T> out;
    std::int64_t rows;
    std::int64_t n;
    std::uint64_t seed;
    std::uint64_t first_index;
    std::uint32_t first_probe;
};

// Each thread makes what one 16-byte store takes, and the Philox block that it comes from: for signs, 32 lanes make the
// same block, which costs less than to hand it round.
template <typename T, ProbeKind Kind>
HESD_KERNEL HESD_LAUNCH_BOUNDS(kThreads, 2) fill_kernel(const FillArguments<T> a) {
    constexpr int step = Vector<T>::length;
    constexpr std::uint64_t per_block = Kind == ProbeKind::rademacher ? 128 : 4;
    const std::int64_t steps = (a.n + step - 1) / step;
    const std::int64_t threads = static_cast<std::int64_t>(gridDim.x) * kThreads;
    for (std::int64_t item = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x; item < steps * a.rows;
         item += threads) {
        const std::int64_t row = item / steps;
        const std::int64_t column = item % steps * step;
        const std::uint32_t probe = a.first_probe + static_cast<std::uint32_t>(row);
        Vector<T> values;
        Words words{};
        double normals[4] = {};
        std::uint64_t made = 0;
#pragma unroll
        for (int e = 0; e < step; ++e) {
            const std::uint64_t index = a.first_index + static_cast<std::uint64_t>(column + e);
            if (e == 0 || index / per_block != made) {
                made = index / per_block;
                words = philox(made, probe, static_cast<std::uint32_t>(Kind), a.seed);
                if constexpr (Kind == ProbeKind::gaussian) {
                    gaussian_block(words, normals);
                }
            }
            const int place = static_cast<int>(index % per_block);
            if constexpr (Kind == ProbeKind::gaussian) {
                double value = normals[0];
#pragma unroll
                for (int i = 1; i < 4; ++i) {
                    value = place == i ? normals[i] : value;
                }
                values.values[e] = static_cast<T>(value);
            } else {
                const std::uint32_t even = (place & 64) != 0 ? words.value[2] : words.value[0];
                const std::uint32_t odd = (place & 64) != 0 ? words.value[3] : words.value[1];
                const std::uint32_t word = (place & 32) != 0 ? odd : even;
                values.values[e] = (word >> (place % 32) & 1u) != 0 ? T(1) : T(-1);
            }
        }
        store(a.out.at(row, column), values, a.n - column, a.out.aligned);
    }
}

template <typename T>
void fill(const Panel& out, std::uint64_t seed, std::uint32_t first_probe, std::uint64_t first_index, ProbeKind kind) {
    const FillArguments<T> a{rows_of<T>(out), out.rows, out.columns, seed, first_index, first_probe};
    constexpr std::int64_t step = Vector<T>::length;
    const std::int64_t items = (out.columns + step - 1) / step * out.rows;
    const std::int64_t blocks = std::min<std::int64_t>((items + kThreads - 1) / kThreads, 16 * kBlocks);
    launch("fill_probes",
           kind == ProbeKind::gaussian ? fill_kernel<T, ProbeKind::gaussian> : fill_kernel<T, ProbeKind::rademacher>,
           blocks, kThreads, 0, a);
}

}  // namespace

void fill_probes(const Panel& out, std::uint64_t seed, std::uint32_t first_probe, std::uint64_t first_index,
                 ProbeKind kind) {
    if (out.rows == 0 || out.columns == 0) {
        return;
    }
    const DeviceScope scope;
    if (out.precision == Precision::float64) {
        fill<double>(out, seed, first_probe, first_index, kind);
    } else {
        fill<float>(out, seed, first_probe, first_index, kind);
    }
}

}  // namespace hesd::cuda
