#include "orthonormalize_plan.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <string>
#include <utility>

namespace hesd {
namespace {

// A scaled pivot (squared sine) is wrong by about epsilon over the least pivot taken before it. Products of the two
// below this are not trusted: the Gram matrix has lost them to rounding.
constexpr double kPivotFloor = 1e-10;
// A Gram matrix this close to the identity, in the largest row sum, makes the next transform the last one.
constexpr double kNearIdentity = 0.1;

}  // namespace

OrthonormalizePlan::OrthonormalizePlan(std::int64_t rows, double tolerance, std::int64_t max_rank)
    : rows_(rows),
      tolerance_(tolerance),
      max_rank_(std::max<std::int64_t>(0, std::min(rows, max_rank))),
      live_(rows),
      weakest_(std::numeric_limits<double>::infinity()),
      transform_(static_cast<std::size_t>(rows * rows)),
      factor_(static_cast<std::size_t>(rows * rows)) {
    for (std::int64_t i = 0; i < rows; ++i) {
        factor_[static_cast<std::size_t>(i * rows + i)] = 1.0;
    }
}

OrthonormalizePlan::~OrthonormalizePlan() = default;

const double* OrthonormalizePlan::transform() const { return transform_.data(); }

bool OrthonormalizePlan::next(const double* gram) {
    const std::int64_t b = rows_;
    // Two rounds are enough for a well-conditioned panel, and each further dependent direction takes at most two more.
    if (++rounds_ > 2 * b + 8) {
        throw EngineError("panel_orthonormalize: no convergence in " + std::to_string(rounds_) +
                          " rounds; the vectors may be too small or too large to square in float64. Rescale them");
    }
    const auto at = [b](std::int64_t i, std::int64_t j) { return static_cast<std::size_t>(i * b + j); };
    for (std::int64_t i = 0; i < live_ * b; ++i) {
        if (!std::isfinite(gram[i])) {
            throw EngineError("panel_orthonormalize: W has non-finite values (its Gram matrix is not finite)");
        }
    }

    // Row norms; residual rows that are too short are dropped.
    std::vector<double> norm(static_cast<std::size_t>(b));
    std::vector<std::int64_t> order;  // current row numbers, in the order of the new rows
    for (std::int64_t i = 0; i < live_; ++i) {
        norm[static_cast<std::size_t>(i)] = std::sqrt(std::max(gram[at(i, i)], 0.0));
        if (i < resolved_ || norm[static_cast<std::size_t>(i)] > tolerance_) {
            order.push_back(i);
        }
    }
    const auto candidates = static_cast<std::int64_t>(order.size());

    // Cholesky factorization, by rows of `order`, of the Gram matrix scaled to a unit diagonal. Resolved rows keep
    // their places; among the residual rows the longest remainder comes next, as long as it is trusted and above the
    // tolerance.
    std::vector<double> cholesky(static_cast<std::size_t>(b * b));
    std::vector<double> pivot(static_cast<std::size_t>(b), 1.0);  // by position: squared sine left
    std::vector<double> row_sum(static_cast<std::size_t>(b));     // by row: off-diagonal entries of the scaled matrix
    const auto scaled = [&](std::int64_t p, std::int64_t q) {
        const std::int64_t i = order[static_cast<std::size_t>(p)];
        const std::int64_t j = order[static_cast<std::size_t>(q)];
        return gram[at(i, j)] / (norm[static_cast<std::size_t>(i)] * norm[static_cast<std::size_t>(j)]);
    };
    std::int64_t accepted = 0;
    double least_pivot = 1.0;
    while (accepted < candidates && accepted < max_rank_) {
        if (accepted >= resolved_) {
            std::int64_t best = accepted;
            double longest = -1.0;
            double untrusted = 0.0;  // what a row that is not trusted may have left
            for (std::int64_t p = accepted; p < candidates; ++p) {
                const double length = norm[static_cast<std::size_t>(order[static_cast<std::size_t>(p)])];
                const double remainder = pivot[static_cast<std::size_t>(p)] * length * length;
                if (pivot[static_cast<std::size_t>(p)] * least_pivot <= kPivotFloor) {
                    untrusted = std::max(untrusted, kPivotFloor / least_pivot * length * length);
                } else if (remainder > tolerance_ * tolerance_ && remainder > longest) {
                    longest = remainder;
                    best = p;
                }
            }
            if (longest < untrusted || longest < 0.0) {
                break;  // the next round measures what is left of the others
            }
            std::swap(order[static_cast<std::size_t>(accepted)], order[static_cast<std::size_t>(best)]);
            std::swap(pivot[static_cast<std::size_t>(accepted)], pivot[static_cast<std::size_t>(best)]);
            for (std::int64_t q = 0; q < accepted; ++q) {
                std::swap(cholesky[at(accepted, q)], cholesky[at(best, q)]);
            }
        }
        const double trusted = std::max(pivot[static_cast<std::size_t>(accepted)], kPivotFloor);
        least_pivot = std::min(least_pivot, trusted);
        const double diagonal = std::sqrt(trusted);
        cholesky[at(accepted, accepted)] = diagonal;
        for (std::int64_t p = accepted + 1; p < candidates; ++p) {
            double sum = scaled(p, accepted);
            row_sum[static_cast<std::size_t>(order[static_cast<std::size_t>(p)])] += std::abs(sum);
            row_sum[static_cast<std::size_t>(order[static_cast<std::size_t>(accepted)])] += std::abs(sum);
            for (std::int64_t q = 0; q < accepted; ++q) {
                sum -= cholesky[at(p, q)] * cholesky[at(accepted, q)];
            }
            cholesky[at(p, accepted)] = sum / diagonal;
            pivot[static_cast<std::size_t>(p)] -= cholesky[at(p, accepted)] * cholesky[at(p, accepted)];
        }
        ++accepted;
    }
    // Rows beyond the largest rank are let go only after a round of their own against the rows that stay, so that their
    // coefficients are as good as those of any other row.
    const bool full = accepted == max_rank_ && resolved_ == max_rank_;
    const std::int64_t kept = full ? accepted : candidates;
    double distance = 0.0;
    for (const double sum : row_sum) {
        distance = std::max(distance, sum);
    }

    // accepted rows:  Y_a = C^-1 D_a^-1 X_a;    residual rows:  Y_r = X_r - D_r C_r Y_a
    std::fill(transform_.begin(), transform_.end(), 0.0);
    for (std::int64_t p = 0; p < kept; ++p) {
        const std::int64_t row = order[static_cast<std::size_t>(p)];
        const double length = norm[static_cast<std::size_t>(row)];
        const bool residual = p >= accepted;
        transform_[at(p, row)] = residual ? 1.0 : 1.0 / length;
        for (std::int64_t q = 0; q < std::min(p, accepted); ++q) {
            const double coefficient = cholesky[at(p, q)] * (residual ? length : 1.0);
            for (std::int64_t i = 0; i < live_; ++i) {
                transform_[at(p, i)] -= coefficient * transform_[at(q, i)];
            }
        }
        if (!residual) {
            const double diagonal = cholesky[at(p, p)];
            for (std::int64_t i = 0; i < live_; ++i) {
                transform_[at(p, i)] /= diagonal;
            }
        }
    }

    // original = factor X with X_a = D_a C Y_a, X_r = Y_r + D_r C_r Y_a
    std::vector<double> updated(static_cast<std::size_t>(b * b));
    for (std::int64_t i = 0; i < b; ++i) {
        for (std::int64_t p = 0; p < candidates; ++p) {
            const std::int64_t row = order[static_cast<std::size_t>(p)];
            const double weight = factor_[at(i, row)] * norm[static_cast<std::size_t>(row)];
            for (std::int64_t q = 0; q <= std::min(p, accepted - 1); ++q) {
                updated[at(i, q)] += weight * cholesky[at(p, q)];
            }
            if (p >= accepted && p < kept) {
                updated[at(i, p)] = factor_[at(i, row)];
            }
        }
    }
    factor_ = std::move(updated);

    for (std::int64_t p = resolved_; p < accepted; ++p) {
        const double length = norm[static_cast<std::size_t>(order[static_cast<std::size_t>(p)])];
        weakest_ = std::min(weakest_, length * cholesky[at(p, p)]);
    }
    for (std::int64_t p = 0; p < resolved_; ++p) {
        const double length = norm[static_cast<std::size_t>(order[static_cast<std::size_t>(p)])];
        distance = std::max(distance, std::abs(length * length - 1.0));
    }
    resolved_ = accepted;
    live_ = kept;
    return kept == accepted && distance <= kNearIdentity;
}

OrthonormalizeResult OrthonormalizePlan::finish(double* factor) const {
    std::copy(factor_.begin(), factor_.end(), factor);
    return {resolved_, weakest_};
}

}  // namespace hesd
