// Every CPU kernel on every target that this processor runs, against plain loops in float64, without Python: a program
// that can be cross-compiled and run under an emulator. Exits with 1 and names kernel, target, sizes and error.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

#include "dispatch/dispatch.hpp"
#include "small/pivoted_cholesky_qr.hpp"

using hesd::Panel;
using hesd::Precision;

namespace {

const Precision kPrecisions[] = {Precision::float64, Precision::float32, Precision::bfloat16, Precision::float16};
const Precision kWorking[] = {Precision::float64, Precision::float32};

const char* name_of(Precision precision) {
    switch (precision) {
        case Precision::float64:
            return "float64";
        case Precision::float32:
            return "float32";
        case Precision::bfloat16:
            return "bfloat16";
        case Precision::float16:
            return "float16";
    }
    return "?";
}

double epsilon(Precision precision) { return hesd::machine_epsilon(precision); }

int failures = 0;
std::int64_t checks = 0;
std::string where;  // kernel, target, sizes

// Not a number counts as a failure.
void check(double error, double allowed, const char* what) {
    ++checks;
    if (!(error <= allowed)) {
        if (++failures <= 20) {
            std::printf("FAILED %s: %s: error %.3g, allowed %.3g\n", where.c_str(), what, error, allowed);
        }
    }
}

template <typename... Arguments>
std::string text(const char* format, Arguments... arguments) {
    char buffer[256];
    std::snprintf(buffer, sizeof buffer, format, arguments...);
    return buffer;
}

// The value of a 16-bit pattern, from its fields.
double value_of(std::uint16_t bits, int fraction_bits) {
    const int exponent_bits = 15 - fraction_bits;
    const int bias = (1 << (exponent_bits - 1)) - 1;
    const int exponent = (bits & 0x7fff) >> fraction_bits;
    const int fraction = bits & ((1 << fraction_bits) - 1);
    double value;
    if (exponent == (1 << exponent_bits) - 1) {
        value = fraction != 0 ? std::numeric_limits<double>::quiet_NaN() : std::numeric_limits<double>::infinity();
    } else if (exponent == 0) {
        value = std::ldexp(fraction, 1 - bias - fraction_bits);
    } else {
        value = std::ldexp(fraction + (1 << fraction_bits), exponent - bias - fraction_bits);
    }
    return (bits & 0x8000) != 0 ? -value : value;
}

// The values of all patterns, computed once.
std::vector<double> table_of(int fraction_bits) {
    std::vector<double> values(65536);
    for (std::size_t bits = 0; bits < values.size(); ++bits) {
        values[bits] = value_of(static_cast<std::uint16_t>(bits), fraction_bits);
    }
    return values;
}
const std::vector<double> kBFloat16Values = table_of(7);
const std::vector<double> kFloat16Values = table_of(10);

// The nearest value with so many bits of fraction and such a least exponent, ties to even; infinite beyond `largest`.
double rounded(double value, int fraction_bits, int least_exponent, double largest) {
    if (value == 0.0 || !std::isfinite(value)) {
        return value;
    }
    const int exponent = std::max(std::ilogb(value), least_exponent);
    const double step = std::ldexp(1.0, exponent - fraction_bits);
    const double result = std::nearbyint(value / step) * step;
    return std::fabs(result) > largest ? std::copysign(std::numeric_limits<double>::infinity(), value) : result;
}

// As the kernels store: float64 goes to 16 bits through float32.
double stored(double value, Precision precision) {
    switch (precision) {
        case Precision::float64:
            return value;
        case Precision::float32:
            return static_cast<float>(value);
        case Precision::bfloat16:
            return rounded(static_cast<float>(value), 7, -126, 0x1.fep127);
        case Precision::float16:
            return rounded(static_cast<float>(value), 10, -14, 65504.0);
    }
    return value;
}

// The pattern of a finite value that the format has: patterns are in the order of the magnitudes.
std::uint16_t pattern_of(double value, const std::vector<double>& values, int fraction_bits) {
    const std::ptrdiff_t infinity = 0x8000 - (std::ptrdiff_t{1} << fraction_bits);
    const auto found = std::lower_bound(values.begin(), values.begin() + infinity, std::fabs(value));
    return static_cast<std::uint16_t>((found - values.begin()) | (std::signbit(value) ? 0x8000 : 0));
}

// A panel in memory of its own that starts off the vectors' boundaries. Everything around the rows is NaN in each
// precision: it spoils what reads it, and must still be there in the end.
class Rows {
   public:
    Rows(Precision precision, std::int64_t rows, std::int64_t columns)
        : precision_(precision),
          rows_(rows),
          columns_(columns),
          stride_(columns + 3),
          bytes_(static_cast<std::size_t>((rows * (columns + 3) + 2) * hesd::element_bytes(precision)), 0xff) {}

    [[nodiscard]] Panel panel() { return {at(0, 0), precision_, rows_, columns_, stride_}; }
    [[nodiscard]] Precision precision() const { return precision_; }
    [[nodiscard]] std::int64_t rows() const { return rows_; }
    [[nodiscard]] std::int64_t columns() const { return columns_; }

    [[nodiscard]] double get(std::int64_t i, std::int64_t c) const {
        const void* from = bytes_.data() + offset(i, c);
        if (precision_ == Precision::float64) {
            double value;
            std::memcpy(&value, from, sizeof value);
            return value;
        }
        if (precision_ == Precision::float32) {
            float value;
            std::memcpy(&value, from, sizeof value);
            return value;
        }
        std::uint16_t bits;
        std::memcpy(&bits, from, sizeof bits);
        return (precision_ == Precision::bfloat16 ? kBFloat16Values : kFloat16Values)[bits];
    }
    void set_bits(std::int64_t i, std::int64_t c, std::uint16_t bits) { std::memcpy(at(i, c), &bits, sizeof bits); }
    void set(std::int64_t i, std::int64_t c, double value) {
        if (precision_ == Precision::float64) {
            std::memcpy(at(i, c), &value, sizeof value);
        } else if (precision_ == Precision::float32) {
            const auto narrow = static_cast<float>(value);
            std::memcpy(at(i, c), &narrow, sizeof narrow);
        } else {
            const bool brain = precision_ == Precision::bfloat16;
            set_bits(i, c,
                     pattern_of(stored(value, precision_), brain ? kBFloat16Values : kFloat16Values, brain ? 7 : 10));
        }
    }
    // All rows, one after the other.
    [[nodiscard]] std::vector<double> values() const {
        std::vector<double> all;
        all.reserve(static_cast<std::size_t>(rows_ * columns_));
        for (std::int64_t i = 0; i < rows_; ++i) {
            for (std::int64_t c = 0; c < columns_; ++c) {
                all.push_back(get(i, c));
            }
        }
        return all;
    }
    void check_surroundings() const {
        double written = 0.0;
        std::size_t byte = 0;
        for (std::int64_t i = 0; i <= rows_; ++i) {
            const std::size_t next = i < rows_ ? offset(i, 0) : bytes_.size();
            for (; byte < next; ++byte) {
                written += bytes_[byte] != 0xff ? 1.0 : 0.0;
            }
            byte = i < rows_ ? offset(i, columns_) : byte;
        }
        check(written, 0.0, "bytes written outside the rows");
    }

   private:
    [[nodiscard]] std::size_t offset(std::int64_t i, std::int64_t c) const {
        return static_cast<std::size_t>((1 + i * stride_ + c) * hesd::element_bytes(precision_));
    }
    [[nodiscard]] unsigned char* at(std::int64_t i, std::int64_t c) { return bytes_.data() + offset(i, c); }

    Precision precision_;
    std::int64_t rows_;
    std::int64_t columns_;
    std::int64_t stride_;
    std::vector<unsigned char> bytes_;
};

// Uniform in (-1, 1), the same everywhere.
class Random {
   public:
    double operator()() {
        state_ = state_ * 6364136223846793005u + 1442695040888963407u;
        return static_cast<double>(static_cast<std::int64_t>(state_) >> 11) * 0x1p-52;
    }

   private:
    std::uint64_t state_ = 2024;
};

void fill(Rows& rows, Random& random) {
    for (std::int64_t i = 0; i < rows.rows(); ++i) {
        for (std::int64_t c = 0; c < rows.columns(); ++c) {
            rows.set(i, c, random());
        }
    }
}

std::vector<double> numbers(std::int64_t count, Random& random) {
    std::vector<double> values(static_cast<std::size_t>(count));
    for (double& value : values) {
        value = random();
    }
    return values;
}

// A sum of products by Kahan's rule, so that its own error is below that of the kernels.
double product(const double* v, const double* w, std::int64_t n) {
    double sum = 0.0;
    double rest = 0.0;
    for (std::int64_t c = 0; c < n; ++c) {
        const double term = v[c] * w[c] + rest;
        const double next = sum + term;
        rest = term - (next - sum);
        sum = next;
    }
    return sum;
}

// All inner products of the rows of v (k, n) and w (b, n).
std::vector<double> products(const std::vector<double>& v, std::int64_t k, const std::vector<double>& w, std::int64_t b,
                             std::int64_t n) {
    std::vector<double> gram;
    for (std::int64_t i = 0; i < k; ++i) {
        for (std::int64_t j = 0; j < b; ++j) {
            gram.push_back(product(v.data() + i * n, w.data() + j * n, n));
        }
    }
    return gram;
}

std::vector<double> norms(const std::vector<double>& v, std::int64_t k, std::int64_t n) {
    std::vector<double> lengths;
    for (std::int64_t i = 0; i < k; ++i) {
        lengths.push_back(std::sqrt(product(v.data() + i * n, v.data() + i * n, n)));
    }
    return lengths;
}

// Around the vectors of each target, the runs of 64 of them, the blocks and the chunks.
const std::int64_t kColumns[] = {0, 1, 2, 3, 4, 5, 7, 8, 9, 15, 17, 33, 127, 257, 513, 1029, 4097, 8195};
const std::int64_t kVectors[] = {1, 2, 3, 4, 5, 8, 9};
const std::int64_t kBlock[] = {1, 2, 3, 4, 5, 7, 8};

// Long panels in few shapes, because an emulator is slow; all k and b occur.
bool skip(std::int64_t n, std::int64_t k, std::int64_t b) {
    return (n > 40 && (k + b) % 4 != 0) || (n > 2000 && (k + b) % 8 != 0);
}

Precision arithmetic(Precision v, Precision w) {
    return v == Precision::float64 || w == Precision::float64 ? Precision::float64 : Precision::float32;
}

// In units of epsilon times the norms. Sums in float64 are a random walk of at most n roundings; those in float32 are
// cut into runs of 64, so that a few epsilon do.
void check_gram(const Rows& v, const Rows& w, const std::vector<double>& gram, double eps, const char* what) {
    const std::vector<double> v_values = v.values();
    const std::vector<double> w_values = w.values();
    const std::vector<double> v_norms = norms(v_values, v.rows(), v.columns());
    const std::vector<double> w_norms = norms(w_values, w.rows(), w.columns());
    const std::vector<double> wanted = products(v_values, v.rows(), w_values, w.rows(), w.columns());
    const bool in_float64 = eps == epsilon(Precision::float64);
    const double steps = 4.0 + (in_float64 ? std::sqrt(static_cast<double>(v.columns())) : 0.0);
    for (std::size_t i = 0; i < v_norms.size(); ++i) {
        for (std::size_t j = 0; j < w_norms.size(); ++j) {
            const std::size_t at = i * w_norms.size() + j;
            check(std::fabs(gram[at] - wanted[at]), steps * eps * v_norms[i] * w_norms[j], what);
        }
    }
}

// The sum of coefficients[i * step] * v[i * n] over k rows, and the sum of the magnitudes.
struct Combination {
    double sum = 0.0;
    double size = 0.0;
};
Combination combination(const double* coefficients, std::int64_t step, const double* v, std::int64_t n,
                        std::int64_t k) {
    Combination result;
    for (std::int64_t i = 0; i < k; ++i) {
        const double term = coefficients[i * step] * v[i * n];
        result.sum += term;
        result.size += std::fabs(term);
    }
    return result;
}

void panel_gram(const hesd::Kernels& kernels) {
    Random random;
    for (const Precision storage : kPrecisions) {
        for (const Precision working : kWorking) {
            for (const std::int64_t n : kColumns) {
                for (const std::int64_t k : kVectors) {
                    for (const std::int64_t b : kBlock) {
                        if (skip(n, k, b)) {
                            continue;
                        }
                        where = text("panel_gram on %s, V %s %lldx%lld, W %s of %lld", kernels.name, name_of(storage),
                                     static_cast<long long>(k), static_cast<long long>(n), name_of(working),
                                     static_cast<long long>(b));
                        Rows v(storage, k, n);
                        Rows w(working, b, n);
                        fill(v, random);
                        fill(w, random);
                        std::vector<double> gram(static_cast<std::size_t>(k * b), NAN);
                        kernels.panel_gram(v.panel(), w.panel(), gram.data());
                        check_gram(v, w, gram, epsilon(arithmetic(storage, working)), "inner product");
                    }
                }
            }
        }
    }
    for (const Precision working : kWorking) {
        for (const std::int64_t n : kColumns) {
            for (const std::int64_t b : kBlock) {
                where = text("panel_gram on %s, W W^T, %s %lldx%lld", kernels.name, name_of(working),
                             static_cast<long long>(b), static_cast<long long>(n));
                Rows w(working, b, n);
                fill(w, random);
                std::vector<double> gram(static_cast<std::size_t>(b * b), NAN);
                kernels.panel_gram(w.panel(), w.panel(), gram.data());
                check_gram(w, w, gram, epsilon(Precision::float64), "inner product");
            }
        }
    }
}

void panel_project(const hesd::Kernels& kernels) {
    Random random;
    for (const Precision storage : kPrecisions) {
        for (const Precision working : kWorking) {
            for (const std::int64_t n : kColumns) {
                for (const std::int64_t k : {0, 1, 3, 4, 5, 8, 9}) {
                    for (const std::int64_t b : kBlock) {
                        if (skip(n, k, b)) {
                            continue;
                        }
                        where = text("panel_project on %s, V %s %lldx%lld, W %s of %lld", kernels.name,
                                     name_of(storage), static_cast<long long>(k), static_cast<long long>(n),
                                     name_of(working), static_cast<long long>(b));
                        Rows v(storage, k, n);
                        Rows w(working, b, n);
                        fill(v, random);
                        fill(w, random);
                        const Rows old = w;
                        const std::vector<double> values = v.values();
                        const std::int64_t gram_only = n % (k + 1);
                        const std::vector<double> c = numbers((k - gram_only) * b, random);
                        std::vector<double> gram(static_cast<std::size_t>(k * b), NAN);
                        std::vector<double> self(static_cast<std::size_t>(b * b), NAN);
                        const bool wants_gram = n % 4 != 3;
                        const bool wants_self = n % 5 != 4;
                        kernels.panel_project(w.panel(), v.panel(), gram_only, c.data(),
                                              wants_gram ? gram.data() : nullptr, wants_self ? self.data() : nullptr);
                        const double eps = epsilon(arithmetic(storage, working));
                        for (std::int64_t j = 0; j < b; ++j) {
                            for (std::int64_t x = 0; x < n; ++x) {
                                const Combination terms =
                                    combination(c.data() + j, b, values.data() + gram_only * n + x, n, k - gram_only);
                                const double before = old.get(j, x);
                                const double allowed = static_cast<double>(k + 2) * eps * terms.size +
                                                       epsilon(working) * (std::fabs(before) + terms.size);
                                check(std::fabs(w.get(j, x) - (before - terms.sum)), k == 0 ? 0.0 : allowed, "W");
                            }
                        }
                        w.check_surroundings();
                        if (wants_gram) {
                            check_gram(v, w, gram, eps, "gram");
                        }
                        if (wants_self) {
                            check_gram(w, w, self, epsilon(Precision::float64), "self_gram");
                        }
                    }
                }
            }
        }
    }
}

void panel_combine(const hesd::Kernels& kernels) {
    Random random;
    for (const Precision storage : kPrecisions) {
        for (const Precision target : kPrecisions) {
            for (const std::int64_t n : kColumns) {
                for (const std::int64_t k : {0, 1, 3, 4, 5, 8, 9}) {
                    for (const std::int64_t r : kBlock) {
                        if (skip(n, k, r)) {
                            continue;
                        }
                        where = text("panel_combine on %s, V %s %lldx%lld, X %s of %lld", kernels.name,
                                     name_of(storage), static_cast<long long>(k), static_cast<long long>(n),
                                     name_of(target), static_cast<long long>(r));
                        Rows v(storage, k, n);
                        Rows x(target, r, n);
                        fill(v, random);
                        const std::vector<double> s = numbers(r * k, random);
                        const std::vector<double> values = v.values();
                        kernels.panel_combine(s.data(), v.panel(), x.panel());
                        const double eps = epsilon(arithmetic(storage, target));
                        for (std::int64_t j = 0; j < r; ++j) {
                            for (std::int64_t c = 0; c < n; ++c) {
                                const Combination terms = combination(s.data() + j * k, 1, values.data() + c, n, k);
                                const double least = target == Precision::float16 ? 0x1p-24 : 0.0;
                                const double allowed = static_cast<double>(k + 2) * eps * terms.size +
                                                       0.51 * epsilon(target) * std::fabs(terms.sum) + least;
                                check(std::fabs(x.get(j, c) - terms.sum), allowed, "X");
                            }
                        }
                        x.check_surroundings();
                    }
                }
            }
        }
    }
}

// panel_combine with the identity must round as a plain conversion does: all 16-bit values, the points halfway between
// two of them, and the numbers next to those.
void conversions(const hesd::Kernels& kernels) {
    const double one = 1.0;
    bool given = false;  // by turns, or null for the identity
    for (const Precision storage : {Precision::bfloat16, Precision::float16}) {
        const int fraction_bits = storage == Precision::bfloat16 ? 7 : 10;
        Rows all(storage, 1, 65536);
        for (std::int64_t bits = 0; bits < 65536; ++bits) {
            all.set_bits(0, bits, static_cast<std::uint16_t>(bits));
        }
        std::vector<double> between;
        for (std::uint16_t bits = 0; !std::isnan(value_of(bits, fraction_bits)); ++bits) {
            const double low = value_of(bits, fraction_bits);
            double high = value_of(static_cast<std::uint16_t>(bits + 1), fraction_bits);
            if (!std::isfinite(high)) {  // the step goes on beyond the largest number
                high = 2.0 * low - value_of(static_cast<std::uint16_t>(bits - 1), fraction_bits);
            }
            const auto middle = static_cast<float>(std::isfinite(low) ? 0.5 * (low + high) : low);
            const float infinity = std::numeric_limits<float>::infinity();
            for (const float value : {std::nextafter(middle, 0.0f), middle, std::nextafter(middle, infinity)}) {
                between.push_back(value);
                between.push_back(-value);
            }
        }
        between.push_back(std::numeric_limits<double>::quiet_NaN());
        Rows finer(Precision::float32, 1, static_cast<std::int64_t>(between.size()));
        Rows finest(Precision::float64, 1, static_cast<std::int64_t>(between.size()));
        for (std::size_t c = 0; c < between.size(); ++c) {
            finer.set(0, static_cast<std::int64_t>(c), between[c]);
            finest.set(0, static_cast<std::int64_t>(c), between[c]);
        }
        for (const Precision target : kPrecisions) {
            for (Rows* source : {&all, &finer, &finest}) {
                Rows x(target, 1, source->columns());
                kernels.panel_combine(given ? &one : nullptr, source->panel(), x.panel());
                given = !given;
                for (std::int64_t c = 0; c < source->columns(); ++c) {
                    const double value = source->get(0, c);
                    const double wanted = stored(value, target);
                    const double got = x.get(0, c);
                    const bool same = std::isnan(wanted) ? std::isnan(got) : got == wanted;
                    if (!same) {
                        where = text("panel_combine on %s, %.9g from %s to %s, got %.9g, wanted %.9g", kernels.name,
                                     value, name_of(source->precision()), name_of(target), got, wanted);
                    }
                    check(same ? 0.0 : 1.0, 0.0, "conversion");
                }
                where = text("panel_combine on %s, conversion to %s", kernels.name, name_of(target));
                x.check_surroundings();
            }
        }
    }
}

// Elementwise, each operation rounded: the same bits as here.
template <typename T>
void accumulate(const hesd::Kernels& kernels, Precision working, bool compensated) {
    Random random;
    for (const std::int64_t b : {1, 3}) {
        for (const std::int64_t n : {1, 2, 7, 8, 17, 255, 16385}) {
            // Each precision not wider than `working` for a part of n columns, with one column between the parts.
            std::vector<Rows> values;
            std::vector<hesd::HvpPart> parts;
            std::int64_t offset = 1;
            for (const Precision precision : kPrecisions) {
                if (hesd::element_bytes(precision) <= static_cast<std::int64_t>(sizeof(T))) {
                    values.emplace_back(precision, b, n);
                }
            }
            for (Rows& part : values) {
                fill(part, random);
                parts.push_back({part.panel(), offset});
                offset += n + 1;
            }
            where = text("accumulate_hvp on %s, %s %lldx%lld, %s", kernels.name, name_of(working),
                         static_cast<long long>(b), static_cast<long long>(n), compensated ? "compensated" : "plain");
            Rows out(working, b, offset);
            Rows errors(working, b, offset);
            fill(out, random);
            fill(errors, random);
            Rows wanted = out;
            Rows wanted_errors = errors;
            const double alpha = 0.3;
            const auto factor = static_cast<T>(alpha);
            for (std::size_t part = 0; part < parts.size(); ++part) {
                for (std::int64_t i = 0; i < b; ++i) {
                    for (std::int64_t c = 0; c < n; ++c) {
                        const std::int64_t at = parts[part].offset + c;
                        const auto old = static_cast<T>(out.get(i, at));
                        const T term = factor * static_cast<T>(values[part].get(i, c));
                        const T sum = old + term;
                        const T shared = sum - old;
                        const T error = (old - (sum - shared)) + (term - shared);
                        wanted.set(i, at, sum);
                        wanted_errors.set(i, at, static_cast<T>(errors.get(i, at)) + error);
                    }
                }
            }
            const Panel compensation = errors.panel();
            kernels.accumulate_hvp(out.panel(), parts.data(), static_cast<std::int64_t>(parts.size()), alpha,
                                   compensated ? &compensation : nullptr);
            for (std::int64_t i = 0; i < b; ++i) {
                for (std::int64_t c = 0; c < offset; ++c) {
                    check(std::fabs(out.get(i, c) - wanted.get(i, c)), 0.0, "sum");
                    if (compensated) {
                        check(std::fabs(errors.get(i, c) - wanted_errors.get(i, c)), 0.0, "compensation");
                    }
                }
            }
            out.check_surroundings();
            errors.check_surroundings();
        }
    }
}

void accumulate_hvp(const hesd::Kernels& kernels) {
    for (const bool compensated : {false, true}) {
        accumulate<double>(kernels, Precision::float64, compensated);
        accumulate<float>(kernels, Precision::float32, compensated);
    }
}

struct Block {
    std::uint32_t word[4];
};

Block philox(std::uint64_t block, std::uint32_t probe, std::uint32_t kind, std::uint64_t seed) {
    Block x = {{static_cast<std::uint32_t>(block), static_cast<std::uint32_t>(block >> 32), probe, kind}};
    auto low_key = static_cast<std::uint32_t>(seed);
    auto high_key = static_cast<std::uint32_t>(seed >> 32);
    for (int round = 0; round < 10; ++round) {
        const std::uint64_t first = 0xD2511F53ull * x.word[0];
        const std::uint64_t second = 0xCD9E8D57ull * x.word[2];
        x = {{static_cast<std::uint32_t>(second >> 32) ^ x.word[1] ^ low_key, static_cast<std::uint32_t>(second),
              static_cast<std::uint32_t>(first >> 32) ^ x.word[3] ^ high_key, static_cast<std::uint32_t>(first)}};
        low_key += 0x9E3779B9u;
        high_key += 0xBB67AE85u;
    }
    return x;
}

// A digest of 3 x 1001 Gaussian numbers in float64: the same on every target and every processor.
constexpr std::uint64_t kGaussianDigest = 0x43aeaf7e8d45a2a2u;

void fill_probes(const hesd::Kernels& kernels) {
    const std::uint64_t seed = 0x0123456789abcdefu;
    const double pi = 3.14159265358979323846;
    for (const Precision working : kWorking) {
        for (const std::int64_t n : {1, 3, 4, 5, 127, 129, 1001, 16389}) {
            for (const std::uint64_t first : {std::uint64_t{0}, std::uint64_t{2}, (std::uint64_t{1} << 40) + 125}) {
                where = text("fill_probes on %s, %s, %lld from %llu", kernels.name, name_of(working),
                             static_cast<long long>(n), static_cast<unsigned long long>(first));
                Rows signs(working, 3, n);
                Rows gaussian(working, 3, n);
                kernels.fill_probes(signs.panel(), seed, 7, first, hesd::ProbeKind::rademacher);
                kernels.fill_probes(gaussian.panel(), seed, 7, first, hesd::ProbeKind::gaussian);
                for (std::int64_t i = 0; i < 3; ++i) {
                    const auto probe = static_cast<std::uint32_t>(7 + i);
                    for (std::int64_t c = 0; c < n; ++c) {
                        const std::uint64_t index = first + static_cast<std::uint64_t>(c);
                        const std::uint32_t word = philox(index / 128, probe, 0, seed).word[index % 128 / 32];
                        const double sign = (word >> (index % 32) & 1u) != 0 ? 1.0 : -1.0;
                        check(std::fabs(signs.get(i, c) - sign), 0.0, "sign");
                        const Block words = philox(index / 4, probe, 1, seed);
                        const std::uint64_t pair = index % 4 / 2 * 2;
                        const double radius = std::sqrt(-2.0 * std::log((words.word[pair] + 1.0) * 0x1p-32));
                        const double angle = 2.0 * pi * 0x1p-32 * words.word[pair + 1];
                        const double wanted = radius * (index % 2 == 0 ? std::cos(angle) : std::sin(angle));
                        // the angle here is rounded: up to 4 epsilon of a full turn
                        check(std::fabs(gaussian.get(i, c) - wanted),
                              16.0 * epsilon(Precision::float64) * radius + epsilon(working) * std::fabs(wanted),
                              "Gaussian number");
                    }
                }
                signs.check_surroundings();
                gaussian.check_surroundings();
            }
        }
    }
    where = text("fill_probes on %s", kernels.name);
    Rows gaussian(Precision::float64, 3, 1001);
    kernels.fill_probes(gaussian.panel(), seed, 7, 2, hesd::ProbeKind::gaussian);
    std::uint64_t digest = 0xcbf29ce484222325u;  // FNV-1a over the words
    for (std::int64_t i = 0; i < 3; ++i) {
        for (std::int64_t c = 0; c < 1001; ++c) {
            const double value = gaussian.get(i, c);
            std::uint64_t bits;
            std::memcpy(&bits, &value, sizeof bits);
            digest = (digest ^ bits) * 0x100000001b3u;
        }
    }
    if (digest != kGaussianDigest) {
        where += text(", digest %016llx", static_cast<unsigned long long>(digest));
    }
    check(digest == kGaussianDigest ? 0.0 : 1.0, 0.0, "bits of the Gaussian numbers");
}

class Orthonormalized {
   public:
    Orthonormalized(const hesd::Kernels& kernels, Rows& w, Rows& out, double tolerance)
        : memory_(static_cast<std::size_t>(hesd::orthonormalization_numbers(w.panel().rows)), NAN),
          state_(hesd::orthonormalization_in(memory_.data(), w.panel().rows, w.panel().rows)) {
        kernels.panel_gram(w.panel(), w.panel(), state_.gram);
        hesd::orthonormalize_begin(state_, tolerance, w.panel().rows);
        facts_ = hesd::orthonormalize(kernels, w.panel(), out.panel(), state_, {});
    }
    [[nodiscard]] std::int64_t rank() const { return facts_.rank; }
    [[nodiscard]] const double* factor() const { return state_.factor; }

   private:
    std::vector<double> memory_;
    hesd::Orthonormalization state_;
    hesd::OrthonormalizeFacts facts_{};
};

void panel_orthonormalize(const hesd::Kernels& kernels) {
    Random random;
    for (const Precision working : kWorking) {
        const double eps = epsilon(working);
        for (const std::int64_t n : {1, 2, 5, 8, 9, 17, 33, 257, 1025, 4097, 8195}) {
            for (const std::int64_t b : {1, 2, 3, 5, 8}) {
                for (const bool dependent : {false, true}) {
                    where = text("panel_orthonormalize on %s, %s %lldx%lld, %s", kernels.name, name_of(working),
                                 static_cast<long long>(b), static_cast<long long>(n),
                                 dependent ? "one row twice another" : "independent rows");
                    if (dependent && (b < 2 || n < b)) {
                        continue;
                    }
                    Rows w(working, b, n);
                    fill(w, random);
                    for (std::int64_t c = 0; dependent && c < n; ++c) {
                        w.set(b - 1, c, 2.0 * w.get(0, c));
                    }
                    const Rows original = w;
                    const std::vector<double> lengths = norms(original.values(), b, n);
                    const double largest = *std::max_element(lengths.begin(), lengths.end());
                    // Far above rounding, far below what independent random rows have left.
                    const double tolerance = 64.0 * eps * largest;
                    Rows out(working, b, n);
                    Orthonormalized result(kernels, w, out, tolerance);
                    const double* factor = result.factor();
                    const std::int64_t wanted = std::min(n, dependent ? b - 1 : b);
                    check(std::fabs(static_cast<double>(result.rank() - wanted)), 0.0, "rank");
                    const std::vector<double> q = out.values();
                    const std::vector<double> inner = products(q, b, q, b, n);
                    for (std::int64_t i = 0; i < b; ++i) {
                        for (std::int64_t j = 0; j < b; ++j) {
                            const double identity = i == j && i < result.rank() ? 1.0 : 0.0;
                            check(std::fabs(inner[static_cast<std::size_t>(i * b + j)] - identity),
                                  i < result.rank() && j < result.rank() ? 2.0 * static_cast<double>(b + 2) * eps : 0.0,
                                  "inner product of Q's rows");
                        }
                        double error = 0.0;
                        for (std::int64_t c = 0; c < n; ++c) {
                            double value = original.get(i, c);
                            for (std::int64_t j = 0; j < b; ++j) {
                                value -= factor[i * b + j] * q[static_cast<std::size_t>(j * n + c)];
                            }
                            error += value * value;
                        }
                        check(std::sqrt(error), tolerance, "norm of W - L Q");
                    }
                    out.check_surroundings();
                    w.check_surroundings();
                }
            }
        }
        where = text("panel_orthonormalize on %s, %s", kernels.name, name_of(working));
        Rows w(working, 2, 9);
        fill(w, random);
        w.set(1, 8, std::numeric_limits<double>::quiet_NaN());
        bool refused = false;
        try {
            const Orthonormalized result(kernels, w, w, 0.0);
        } catch (const hesd::EngineError&) {
            refused = true;
        }
        check(refused ? 0.0 : 1.0, 0.0, "NaN in W is refused");
    }
}

}  // namespace

int main() {
    for (const std::string& target : hesd::available_targets()) {
        hesd::select_target(target);
        const hesd::Kernels& kernels = hesd::cpu_kernels();
        const std::int64_t before = checks;
        accumulate_hvp(kernels);
        fill_probes(kernels);
        panel_gram(kernels);
        panel_project(kernels);
        panel_combine(kernels);
        conversions(kernels);
        panel_orthonormalize(kernels);
        std::printf("%s: %lld checks\n", target.c_str(), static_cast<long long>(checks - before));
    }
    if (failures > 0) {
        std::printf("%d of %lld checks failed\n", failures, static_cast<long long>(checks));
    }
    return failures > 0 ? 1 : 0;
}
