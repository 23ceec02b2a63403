#include "small/small_matrix.hpp"

#include <algorithm>
#include <cmath>

namespace hesd {

double SmallMatrix::largest() const {
    double result = 0.0;
    for (const double value : values) {
        result = std::max(result, std::abs(value));
    }
    return result;
}

void add_product(SmallMatrix& target, double factor, const SmallMatrix& left, bool transpose_left,
                 const SmallMatrix& right, bool transpose_right) {
    const std::int64_t inner = transpose_left ? left.rows : left.columns;
    for (std::int64_t i = 0; i < target.rows; ++i) {
        for (std::int64_t k = 0; k < inner; ++k) {
            const double value = factor * (transpose_left ? left.at(k, i) : left.at(i, k));
            for (std::int64_t j = 0; j < target.columns; ++j) {
                target.at(i, j) += value * (transpose_right ? right.at(j, k) : right.at(k, j));
            }
        }
    }
}

SmallMatrix product(const SmallMatrix& left, const SmallMatrix& right) {
    SmallMatrix result(left.rows, right.columns);
    add_product(result, 1.0, left, false, right, false);
    return result;
}

SmallMatrix least_squares(const SmallMatrix& matrix, const SmallMatrix& right) {
    const std::int64_t rows = matrix.rows;
    const std::int64_t columns = matrix.columns;
    SmallMatrix q = matrix;
    SmallMatrix triangle(columns, columns);
    for (std::int64_t j = 0; j < columns; ++j) {
        double before = 0.0;
        for (std::int64_t i = 0; i < rows; ++i) {
            before += q.at(i, j) * q.at(i, j);
        }
        for (int pass = 0; pass < 2; ++pass) {
            for (std::int64_t k = 0; k < j; ++k) {
                double overlap = 0.0;
                for (std::int64_t i = 0; i < rows; ++i) {
                    overlap += q.at(i, k) * q.at(i, j);
                }
                triangle.at(k, j) += overlap;
                for (std::int64_t i = 0; i < rows; ++i) {
                    q.at(i, j) -= overlap * q.at(i, k);
                }
            }
        }
        double norm = 0.0;
        for (std::int64_t i = 0; i < rows; ++i) {
            norm += q.at(i, j) * q.at(i, j);
        }
        const bool dependent = norm <= 0x1p-90 * before;
        norm = dependent ? 0.0 : std::sqrt(norm);
        triangle.at(j, j) = norm;
        for (std::int64_t i = 0; i < rows; ++i) {
            q.at(i, j) = dependent ? 0.0 : q.at(i, j) / norm;
        }
    }
    SmallMatrix x(columns, right.columns);
    add_product(x, 1.0, q, true, right, false);
    for (std::int64_t c = 0; c < x.columns; ++c) {
        for (std::int64_t i = columns - 1; i >= 0; --i) {
            for (std::int64_t k = i + 1; k < columns; ++k) {
                x.at(i, c) -= triangle.at(i, k) * x.at(k, c);
            }
            x.at(i, c) = triangle.at(i, i) > 0.0 ? x.at(i, c) / triangle.at(i, i) : 0.0;
        }
    }
    return x;
}

}  // namespace hesd
