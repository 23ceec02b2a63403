// Vectors of float32 and float64 for the CPU kernels, in the compiler's vector extension: the same source for each
// instruction set. Included only by files that are compiled once per target; everything has internal linkage, so that
// code generated for one instruction set never stands in for another.
#pragma once

#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__aarch64__) && HESD_VECTOR_BYTES == 16
#include <arm_neon.h>
#endif

#include <cstdint>

#include "hesd/panel.hpp"
#include "kernels/element_types.hpp"

namespace hesd {
namespace {

constexpr int kVectorBytes = HESD_VECTOR_BYTES;
typedef double DoubleVector __attribute__((vector_size(kVectorBytes)));
typedef float FloatVector __attribute__((vector_size(kVectorBytes)));
typedef std::uint32_t WordVector __attribute__((vector_size(kVectorBytes)));
typedef std::uint16_t ShortVector __attribute__((vector_size(kVectorBytes / 2)));
typedef double HalfDoubleVector __attribute__((vector_size(kVectorBytes / 2)));
typedef float HalfFloatVector __attribute__((vector_size(kVectorBytes / 2)));
typedef std::uint32_t HalfWordVector __attribute__((vector_size(kVectorBytes / 2)));
typedef std::uint16_t HalfShortVector __attribute__((vector_size(kVectorBytes / 4)));

// The arithmetic that a kernel computes in.
template <typename C>
struct As;
template <>
struct As<double> {
    typedef DoubleVector Vector;
    static constexpr int lanes = kVectorBytes / 8;
};
template <>
struct As<float> {
    typedef FloatVector Vector;
    static constexpr int lanes = kVectorBytes / 4;
};

// Keeps a loaded vector in a register: GCC would rather read the memory again in each use.
#if defined(__AVX2__)
#define HESD_IN_REGISTER(vector) asm("" : "+v"(vector))
#elif defined(__aarch64__) && HESD_VECTOR_BYTES == 16
#define HESD_IN_REGISTER(vector) asm("" : "+w"(vector))
#else
#define HESD_IN_REGISTER(vector) static_cast<void>(0)
#endif

template <typename Vector, typename S>
HESD_INLINE Vector bytes_at(const S* source) {
    Vector value;
    __builtin_memcpy(&value, source, sizeof value);
    return value;
}

// A cast between vector types of one size keeps the bits.
template <typename Floats, typename Words>
HESD_INLINE Floats from_bfloat16(Words bits) {
    return (Floats)(bits << 16);
}
// The exponent and fraction move into float32's fields; multiplying by 2^112 corrects the exponent bias and
// makes subnormals normal. Infinities and NaNs get float32's largest exponent.
template <typename Floats, typename Words>
HESD_INLINE Floats from_float16(Words bits) {
    const Words sign = (bits & 0x8000u) << 16;
    const Words magnitude = (bits & 0x7fffu) << 13;
    const Floats scaled = (Floats)magnitude * 0x1p112f;
    const Words is_special = (Words)(magnitude >= 0x0f800000u);
    const Words merged = (is_special & (magnitude | 0x7f800000u)) | (~is_special & (Words)scaled);
    return (Floats)(merged | sign);
}

HESD_INLINE double widen(double value) { return value; }
HESD_INLINE float widen(float value) { return value; }
HESD_INLINE float widen(BFloat16 value) {
    const std::uint32_t bits = static_cast<std::uint32_t>(value.bits) << 16;
    return bytes_at<float>(&bits);
}
HESD_INLINE float widen(Float16 value) {
    const std::uint32_t sign = static_cast<std::uint32_t>(value.bits & 0x8000u) << 16;
    std::uint32_t magnitude = static_cast<std::uint32_t>(value.bits & 0x7fffu) << 13;
    if (magnitude >= 0x0f800000u) {
        magnitude |= 0x7f800000u | sign;
        return bytes_at<float>(&magnitude);
    }
    const float scaled = bytes_at<float>(&magnitude) * 0x1p112f;
    return sign != 0 ? -scaled : scaled;
}

HESD_INLINE DoubleVector load(As<double>, const double* source) { return bytes_at<DoubleVector>(source); }
HESD_INLINE DoubleVector load(As<double>, const float* source) {
    return __builtin_convertvector(bytes_at<HalfFloatVector>(source), DoubleVector);
}
HESD_INLINE DoubleVector load(As<double>, const BFloat16* source) {
    const auto bits = __builtin_convertvector(bytes_at<HalfShortVector>(source), HalfWordVector);
    return __builtin_convertvector(from_bfloat16<HalfFloatVector>(bits), DoubleVector);
}
HESD_INLINE DoubleVector load(As<double>, const Float16* source) {
#if defined(__aarch64__) && HESD_VECTOR_BYTES == 16
    const float16x4_t twice = vreinterpret_f16_u32(vdup_n_u32(bytes_at<std::uint32_t>(source)));
    return (DoubleVector)vcvt_f64_f32(vget_low_f32(vcvt_f32_f16(twice)));
#else
    const auto bits = __builtin_convertvector(bytes_at<HalfShortVector>(source), HalfWordVector);
    return __builtin_convertvector(from_float16<HalfFloatVector>(bits), DoubleVector);
#endif
}
HESD_INLINE FloatVector load(As<float>, const float* source) { return bytes_at<FloatVector>(source); }
HESD_INLINE FloatVector load(As<float>, const BFloat16* source) {
#if defined(__AVX512F__)
    const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(source));
    return (FloatVector)_mm512_maskz_slli_epi32(0xffff, _mm512_maskz_cvtepu16_epi32(0xffff, bits), 16);
#elif defined(__AVX2__)
    const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(source));
    return (FloatVector)_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16);
#else
    return from_bfloat16<FloatVector>(__builtin_convertvector(bytes_at<ShortVector>(source), WordVector));
#endif
}
HESD_INLINE FloatVector load(As<float>, const Float16* source) {
#if defined(__AVX512F__)  // the unmasked form sets off -Wmaybe-uninitialized in GCC 12
    return (FloatVector)_mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(source)));
#elif defined(__aarch64__) && HESD_VECTOR_BYTES == 16
    return (FloatVector)vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(reinterpret_cast<const std::uint16_t*>(source))));
#elif defined(__F16C__)
    return (FloatVector)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(source)));
#else
    return from_float16<FloatVector>(__builtin_convertvector(bytes_at<ShortVector>(source), WordVector));
#endif
}

HESD_INLINE void store(double* target, DoubleVector value) { __builtin_memcpy(target, &value, sizeof value); }
HESD_INLINE void store(float* target, FloatVector value) { __builtin_memcpy(target, &value, sizeof value); }
HESD_INLINE void store(float* target, DoubleVector value) {
    const HalfFloatVector narrow = __builtin_convertvector(value, HalfFloatVector);
    __builtin_memcpy(target, &narrow, sizeof narrow);
}

// Rounds to nearest even; a NaN stays one.
template <typename Words, typename Floats>
HESD_INLINE Words to_bfloat16(Floats value) {
    const Words bits = (Words)value;
    const Words rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    const Words is_nan = (Words)((bits & 0x7fffffffu) > 0x7f800000u);
    return (is_nan & ((bits >> 16) | 0x40u)) | (~is_nan & rounded);
}
// In the normal range the exponent is biased anew and the fraction rounded where it is cut; below it the number is
// added to 1/2, whose last place is float16's smallest step.
template <typename Words, typename Floats>
HESD_INLINE Words to_float16(Floats value) {
    const Words bits = (Words)value;
    const Words sign = (bits >> 16) & 0x8000u;
    const Words magnitude = bits & 0x7fffffffu;
    const Words normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
    const Words subnormal = (Words)((Floats)magnitude + 0.5f) - 0x3f000000u;
    const Words is_small = (Words)(magnitude < 0x38800000u);
    const Words is_large = (Words)(magnitude >= 0x477ff000u);  // rounds to 65536 or more
    const Words is_nan = (Words)(magnitude > 0x7f800000u);
    const Words finite = (is_small & subnormal) | (~is_small & normal);
    const Words rounded = (is_large & ((is_nan & 0x7e00u) | (~is_nan & 0x7c00u))) | (~is_large & finite);
    return sign | rounded;
}
HESD_INLINE void store(BFloat16* target, FloatVector value) {
    const ShortVector narrow = __builtin_convertvector(to_bfloat16<WordVector>(value), ShortVector);
    __builtin_memcpy(target, &narrow, sizeof narrow);
}
HESD_INLINE void store(Float16* target, FloatVector value) {
    const ShortVector narrow = __builtin_convertvector(to_float16<WordVector>(value), ShortVector);
    __builtin_memcpy(target, &narrow, sizeof narrow);
}
HESD_INLINE void store(BFloat16* target, DoubleVector value) {
    const auto words = to_bfloat16<HalfWordVector>(__builtin_convertvector(value, HalfFloatVector));
    const HalfShortVector narrow = __builtin_convertvector(words, HalfShortVector);
    __builtin_memcpy(target, &narrow, sizeof narrow);
}
HESD_INLINE void store(Float16* target, DoubleVector value) {
    const auto words = to_float16<HalfWordVector>(__builtin_convertvector(value, HalfFloatVector));
    const HalfShortVector narrow = __builtin_convertvector(words, HalfShortVector);
    __builtin_memcpy(target, &narrow, sizeof narrow);
}
// One number goes the way of a vector.
template <typename T, typename C>
HESD_INLINE void store_one(T* target, C value) {
    if constexpr (sizeof(T) >= 4) {
        *target = static_cast<T>(value);
    } else {
        typename As<C>::Vector values{};
        values[0] = value;
        T rounded[As<C>::lanes];
        store(rounded, values);
        *target = rounded[0];
    }
}

// Pairwise, the same order for any caller.
HESD_INLINE double sum_of_lanes(DoubleVector value) {
    double lanes[As<double>::lanes];
    __builtin_memcpy(lanes, &value, sizeof value);
    for (int half = As<double>::lanes / 2; half > 0; half /= 2) {
        for (int lane = 0; lane < half; ++lane) {
            lanes[lane] += lanes[lane + half];
        }
    }
    return lanes[0];
}
HESD_INLINE double sum_of_lanes(FloatVector value) {
    HalfFloatVector halves[2];
    __builtin_memcpy(halves, &value, sizeof value);
    return sum_of_lanes(__builtin_convertvector(halves[0], DoubleVector) +
                        __builtin_convertvector(halves[1], DoubleVector));
}

// out[j] += the sum of the lanes of values[j].
template <int Count, typename Vector>
HESD_INLINE void add_sums_of_lanes(const Vector* values, double* out) {
#if defined(__AVX2__)
    if constexpr (Count == 4 && sizeof(values[0][0]) == 4) {
        __m256 pairs[4];
        for (int j = 0; j < 4; ++j) {
#if defined(__AVX512F__)
            HalfFloatVector halves[2];
            __builtin_memcpy(halves, values + j, sizeof halves);
            pairs[j] = (__m256)(halves[0] + halves[1]);
#else
            pairs[j] = (__m256)values[j];
#endif
        }
        const __m256 both = _mm256_hadd_ps(_mm256_hadd_ps(pairs[0], pairs[1]), _mm256_hadd_ps(pairs[2], pairs[3]));
        const __m256d sums = _mm256_cvtps_pd(_mm_add_ps(_mm256_castps256_ps128(both), _mm256_extractf128_ps(both, 1)));
        _mm256_storeu_pd(out, _mm256_add_pd(_mm256_loadu_pd(out), sums));
        return;
    }
#endif
#pragma GCC unroll 16
    for (int j = 0; j < Count; ++j) {
        out[j] += sum_of_lanes(values[j]);
    }
}

}  // namespace
}  // namespace hesd
