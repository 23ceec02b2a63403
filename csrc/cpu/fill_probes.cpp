#include "hesd/fill_probes.hpp"

#include "cpu/parallel.hpp"
#include "cpu/targets.hpp"
#include "cpu/vector.hpp"

// Compiled without contraction of multiply and add, so that Gaussian probes have the same bits on every target.

namespace hesd::HESD_TARGET {
namespace {

struct Words {
    std::uint32_t value[4];
};

HESD_INLINE Words philox(std::uint64_t block, std::uint32_t probe, std::uint32_t kind, std::uint64_t seed) {
    std::uint32_t c0 = static_cast<std::uint32_t>(block);
    std::uint32_t c1 = static_cast<std::uint32_t>(block >> 32);
    std::uint32_t c2 = probe;
    std::uint32_t c3 = kind;
    std::uint32_t k0 = static_cast<std::uint32_t>(seed);
    std::uint32_t k1 = static_cast<std::uint32_t>(seed >> 32);
    for (int round = 0; round < 10; ++round) {
        const std::uint64_t p0 = static_cast<std::uint64_t>(0xD2511F53u) * c0;
        const std::uint64_t p1 = static_cast<std::uint64_t>(0xCD9E8D57u) * c2;
        const std::uint32_t n0 = static_cast<std::uint32_t>(p1 >> 32) ^ c1 ^ k0;
        const std::uint32_t n2 = static_cast<std::uint32_t>(p0 >> 32) ^ c3 ^ k1;
        c1 = static_cast<std::uint32_t>(p1);
        c3 = static_cast<std::uint32_t>(p0);
        c0 = n0;
        c2 = n2;
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    return {{c0, c1, c2, c3}};
}

// log of a value in (0, 1]: exponent and fraction apart, then 2 atanh((f - 1) / (f + 1)) by its series to s^21;
// |s| < 0.172, so the truncation is below 1e-16 relative.
HESD_INLINE double logarithm(double value) {
    std::uint64_t bits;
    __builtin_memcpy(&bits, &value, sizeof bits);
    std::int64_t exponent = static_cast<std::int64_t>(bits >> 52) - 1023;
    bits = (bits & 0x000fffffffffffffu) | 0x3ff0000000000000u;
    double fraction;
    __builtin_memcpy(&fraction, &bits, sizeof fraction);
    if (fraction > 1.4142135623730951) {
        fraction *= 0.5;
        exponent += 1;
    }
    const double s = (fraction - 1.0) / (fraction + 1.0);
    const double square = s * s;
    double series = 0.0;
    for (int degree = 21; degree >= 1; degree -= 2) {
        series = series * square + 1.0 / degree;
    }
    return static_cast<double>(exponent) * 0.6931471805599453 + 2.0 * s * series;
}

// cos and sin of 2 pi turn / 2^32. The top two bits are the quadrant; within it the angle is measured from the nearer
// axis, so that the Taylor series (to x^16 and x^17) sees at most pi / 4.
HESD_INLINE void cosine_sine(std::uint32_t turn, double* cosine, double* sine) {
    const std::uint32_t quadrant = turn >> 30;
    const std::uint32_t within = turn & 0x3fffffffu;
    const bool beyond_half = within > 0x20000000u;
    const std::uint32_t offset = beyond_half ? 0x40000000u - within : within;
    const double x = static_cast<double>(offset) * (0.7853981633974483 / 536870912.0);
    const double square = x * x;
    double near = 1.0;
    double far = 1.0;
    for (int degree = 16; degree >= 2; degree -= 2) {
        near = 1.0 - near * square * (1.0 / (degree * (degree - 1)));
        far = 1.0 - far * square * (1.0 / (degree * (degree + 1)));
    }
    far = far * x;
    const double c = beyond_half ? far : near;
    const double s = beyond_half ? near : far;
    switch (quadrant) {
        case 0:
            *cosine = c;
            *sine = s;
            return;
        case 1:
            *cosine = -s;
            *sine = c;
            return;
        case 2:
            *cosine = -c;
            *sine = -s;
            return;
        default:
            *cosine = s;
            *sine = -c;
            return;
    }
}

HESD_INLINE void gaussian_block(const Words& words, double* values) {
    for (int pair = 0; pair < 2; ++pair) {
        const double uniform = (static_cast<double>(words.value[2 * pair]) + 1.0) * 0x1p-32;
        const double radius = __builtin_sqrt(-2.0 * logarithm(uniform));
        double cosine;
        double sine;
        cosine_sine(words.value[2 * pair + 1], &cosine, &sine);
        values[2 * pair] = radius * cosine;
        values[2 * pair + 1] = radius * sine;
    }
}

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
