// Small dense matrices in float64, row-major: the coefficients of the recurrence.
#pragma once

#include <cstdint>
#include <vector>

namespace hesd {

struct SmallMatrix {
    std::int64_t rows = 0;
    std::int64_t columns = 0;
    std::vector<double> values;

    SmallMatrix() = default;
    SmallMatrix(std::int64_t row_count, std::int64_t column_count)
        : rows(row_count), columns(column_count), values(static_cast<std::size_t>(row_count * column_count)) {}

    [[nodiscard]] double& at(std::int64_t i, std::int64_t j) {
        return values[static_cast<std::size_t>(i * columns + j)];
    }
    [[nodiscard]] double at(std::int64_t i, std::int64_t j) const {
        return values[static_cast<std::size_t>(i * columns + j)];
    }
    [[nodiscard]] double largest() const;
};

// target += factor * op(left) op(right), where op transposes when asked to.
void add_product(SmallMatrix& target, double factor, const SmallMatrix& left, bool transpose_left,
                 const SmallMatrix& right, bool transpose_right);

SmallMatrix product(const SmallMatrix& left, const SmallMatrix& right);

// X that minimizes ||matrix X - right||, by modified Gram-Schmidt done twice. A column of the matrix that depends on
// those before it to rounding gets zeros.
SmallMatrix least_squares(const SmallMatrix& matrix, const SmallMatrix& right);

}  // namespace hesd
