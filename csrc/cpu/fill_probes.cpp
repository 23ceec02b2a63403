#include "hesd/fill_probes.hpp"

#include "cpu/parallel.hpp"
#include "cpu/targets.hpp"
#include "kernels/probe_values.hpp"

// Compiled without contraction of multiply and add, so that Gaussian probes have the same bits on every target.

namespace hesd::HESD_TARGET {
namespace {

template <typename T>
void fill_rademacher(T* out, std::int64_t length, std::uint64_t seed, std::uint32_t probe, std::uint64_t index) {
    std::int64_t i = 0;
    while (i < length) {
        const std::uint64_t position = index + static_cast<std::uint64_t>(i);
        const Words words = philox(position / 128, probe, static_cast<std::uint32_t>(ProbeKind::rademacher), seed);
        for (std::uint64_t bit = position % 128; bit < 128 && i < length; ++bit, ++i) {
            out[i] = (words.value[bit / 32] >> (bit % 32) & 1u) != 0 ? T(1) : T(-1);
        }
    }
}

template <typename T>
void fill_gaussian(T* out, std::int64_t length, std::uint64_t seed, std::uint32_t probe, std::uint64_t index) {
    std::int64_t i = 0;
    while (i < length) {
        const std::uint64_t position = index + static_cast<std::uint64_t>(i);
        double values[4];
        gaussian_block(philox(position / 4, probe, static_cast<std::uint32_t>(ProbeKind::gaussian), seed), values);
        for (std::uint64_t item = position % 4; item < 4 && i < length; ++item, ++i) {
            out[i] = static_cast<T>(values[item]);
        }
    }
}

constexpr std::int64_t kPiece = 16384;

template <typename T>
void fill(const Panel& out, std::uint64_t seed, std::uint32_t first_probe, std::uint64_t first_index, ProbeKind kind) {
    const std::int64_t pieces = (out.columns + kPiece - 1) / kPiece;
    parallel_for(pieces * out.rows, [&](std::int64_t work, int) {
        const std::int64_t row = work / pieces;
        const std::int64_t column = work % pieces * kPiece;
        const std::int64_t length = out.columns - column < kPiece ? out.columns - column : kPiece;
        T* to = static_cast<T*>(out.data) + row * out.stride + column;
        const std::uint32_t probe = first_probe + static_cast<std::uint32_t>(row);
        const std::uint64_t index = first_index + static_cast<std::uint64_t>(column);
        if (kind == ProbeKind::rademacher) {
            fill_rademacher(to, length, seed, probe, index);
        } else {
            fill_gaussian(to, length, seed, probe, index);
        }
    });
}

}  // namespace

void fill_probes(const Panel& out, std::uint64_t seed, std::uint32_t first_probe, std::uint64_t first_index,
                 ProbeKind kind) {
    if (out.precision == Precision::float64) {
        fill<double>(out, seed, first_probe, first_index, kind);
    } else {
        fill<float>(out, seed, first_probe, first_index, kind);
    }
}

}  // namespace hesd::HESD_TARGET
