#include "lanczos/partial_reorthogonalization.hpp"

#include <algorithm>
#include <cmath>
#include <utility>

namespace hesd {
namespace {

// Sweeps begin when an estimate passes this part of sqrt(epsilon), and are of the blocks whose estimates have passed
// this part of epsilon^(3/4): one draw of random signs may be too small by such a factor.
constexpr double kLimitMargin = 0.5;
constexpr double kTargetMargin = 1.0 / 32.0;

}  // namespace

// A stored vector is off by its rounding, which in a vector of n entries points nowhere in particular.
PartialReorthogonalization::PartialReorthogonalization(const KrylovBasis& basis, std::int64_t global_size)
    : epsilon_(machine_epsilon(basis.precision())),
      fresh_(epsilon_ + basis.history_rounding() / std::sqrt(static_cast<double>(global_size))) {}

void PartialReorthogonalization::swept_by_all(BlockRange history) {
    estimate_.removed(history.first, history.last, fresh_);
    pending_.clear();
}

bool PartialReorthogonalization::is_needed(std::int64_t blocks) const {
    double largest = 0.0;
    for (std::int64_t i = 0; i < blocks; ++i) {
        largest = std::max(largest, estimate_.with(i));
    }
    return largest > kLimitMargin * std::sqrt(epsilon_) || !pending_.empty();
}

// Of the `blocks` in the history: those whose overlaps have grown, those that are pending and their neighbours.
std::vector<BlockRange> PartialReorthogonalization::ranges_to_sweep(std::int64_t blocks) const {
    const double target = kTargetMargin * std::pow(epsilon_, 0.75);
    std::vector<bool> wanted(static_cast<std::size_t>(blocks));
    for (std::int64_t i = 0; i < blocks; ++i) {
        wanted[static_cast<std::size_t>(i)] = estimate_.with(i) > target;
    }
    for (const BlockRange range : pending_) {
        for (std::int64_t i = range.first; i < std::min(range.last + 1, blocks); ++i) {
            wanted[static_cast<std::size_t>(i)] = true;
        }
    }
    std::vector<BlockRange> ranges;
    for (std::int64_t i = 0; i < blocks; ++i) {
        if (!wanted[static_cast<std::size_t>(i)]) {
            continue;
        }
        if (!ranges.empty() && i - ranges.back().last <= 1) {  // one block between two ranges costs less than a new one
            ranges.back().last = i + 1;
        } else {
            ranges.push_back({i, i + 1});
        }
    }
    return ranges;
}

SmallMatrix PartialReorthogonalization::sweep_where_needed(const Panel& w, SmallMatrix next, const KrylovBasis& basis,
                                                           BlockGramSchmidt& gram_schmidt) {
    const auto sweep = [&](const std::vector<BlockRange>& ranges) {
        const Sweep swept = gram_schmidt.sweep(w.slice(0, next.columns), basis, ranges);
        next = product(next, swept.factor);
        estimate_.rewritten(swept.factor);
        for (const BlockRange range : ranges) {
            estimate_.removed(range.first, range.last, fresh_);
        }
        return swept.largest_overlap;
    };
    if (!is_needed(basis.history_blocks())) {
        return next;
    }
    const std::vector<BlockRange> ranges = ranges_to_sweep(basis.history_blocks());
    pending_ = pending_.empty() ? ranges : std::vector<BlockRange>{};
    if (ranges.empty()) {
        return next;
    }
    ++sweeps_;
    if (sweep(ranges) > std::pow(epsilon_, 0.25) && next.columns > 0) {
        // One sweep of blocks that are orthogonal to sqrt(epsilon) leaves too much of this: everything once more.
        pending_ = {basis.whole_history()};
        sweep(pending_);
    }
    return next;
}

}  // namespace hesd
