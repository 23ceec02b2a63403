// The values of probes, for the CPU and for CUDA devices: see hesd/fill_probes.hpp. To be compiled without contraction
// of multiply and add. Internal linkage, as in cpu/vector.hpp.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define HESD_ANYWHERE __host__ __device__ __forceinline__
#else
#define HESD_ANYWHERE inline __attribute__((always_inline))
#endif
// On a device numbers that are indexed by a loop's variable are not in registers.
#if defined(__CUDA_ARCH__)
#define HESD_UNROLLED _Pragma("unroll")
#else
#define HESD_UNROLLED
#endif

namespace hesd {
namespace {

struct Words {
    std::uint32_t value[4];
};

HESD_ANYWHERE Words philox(std::uint64_t block, std::uint32_t probe, std::uint32_t kind, std::uint64_t seed) {
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
HESD_ANYWHERE double logarithm(double value) {
    std::uint64_t bits;
    memcpy(&bits, &value, sizeof bits);
    std::int64_t exponent = static_cast<std::int64_t>(bits >> 52) - 1023;
    bits = (bits & 0x000fffffffffffffu) | 0x3ff0000000000000u;
    double fraction;
    memcpy(&fraction, &bits, sizeof fraction);
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
HESD_ANYWHERE void cosine_sine(std::uint32_t turn, double* cosine, double* sine) {
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

HESD_ANYWHERE void gaussian_block(const Words& words, double* values) {
    HESD_UNROLLED
    for (int pair = 0; pair < 2; ++pair) {
        const double uniform = (static_cast<double>(words.value[2 * pair]) + 1.0) * 0x1p-32;
        const double radius = sqrt(-2.0 * logarithm(uniform));
        double cosine;
        double sine;
        cosine_sine(words.value[2 * pair + 1], &cosine, &sine);
        values[2 * pair] = radius * cosine;
        values[2 * pair + 1] = radius * sine;
    }
}

}  // namespace
}  // namespace hesd
