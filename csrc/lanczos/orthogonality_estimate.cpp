#include "lanczos/orthogonality_estimate.hpp"

#include <algorithm>
#include <utility>

namespace hesd {

void OrthogonalityEstimate::start(std::int64_t width) {
    newest_.clear();
    previous_.clear();
    width_ = width;
    state_ = 0x9e3779b97f4a7c15u;
}

// A linear congruential generator (Knuth's MMIX constants): the same signs in every run.
double OrthogonalityEstimate::sign() {
    state_ = state_ * 6364136223846793005u + 1442695040888963407u;
    return (state_ >> 63) != 0 ? 1.0 : -1.0;
}

void OrthogonalityEstimate::advance(const std::vector<SmallMatrix>& diagonal,
                                    const std::vector<SmallMatrix>& offdiagonal, const SmallMatrix& c, double noise,
                                    double fresh) {
    const std::size_t j = diagonal.size() - 1;
    std::vector<SmallMatrix> next;
    for (std::size_t i = 0; i <= j; ++i) {
        const std::int64_t other = diagonal[i].rows;
        if (i + 1 >= j) {  // the last two blocks are projected out explicitly
            next.emplace_back(c.columns, other);
            for (double& value : next.back().values) {
                value = fresh * sign();
            }
            continue;
        }
        SmallMatrix right(width_, other);
        for (double& value : right.values) {
            value = noise * sign();
        }
        if (i > 0) {
            add_product(right, 1.0, newest_[i - 1], false, offdiagonal[i - 1], false);
        }
        add_product(right, 1.0, newest_[i], false, diagonal[i], false);
        add_product(right, 1.0, newest_[i + 1], false, offdiagonal[i], true);
        add_product(right, -1.0, offdiagonal[j - 1], true, previous_[i], false);
        add_product(right, -1.0, diagonal[j], false, newest_[i], false);
        next.push_back(least_squares(c, right));
    }
    previous_ = std::move(newest_);
    newest_ = std::move(next);
    width_ = c.columns;
}

double OrthogonalityEstimate::with(std::int64_t i) const { return newest_[static_cast<std::size_t>(i)].largest(); }

double OrthogonalityEstimate::largest() const {
    double result = 0.0;
    for (const SmallMatrix& overlap : newest_) {
        result = std::max(result, overlap.largest());
    }
    return result;
}

void OrthogonalityEstimate::rewritten(const SmallMatrix& factor) {
    for (SmallMatrix& overlap : newest_) {
        overlap = least_squares(factor, overlap);
    }
    width_ = factor.columns;
}

void OrthogonalityEstimate::removed(std::int64_t first, std::int64_t last, double fresh) {
    for (std::int64_t i = first; i < last; ++i) {
        for (double& value : newest_[static_cast<std::size_t>(i)].values) {
            value = fresh * sign();
        }
    }
}

}  // namespace hesd
