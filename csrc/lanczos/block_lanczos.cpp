#include "lanczos/block_lanczos.hpp"

#include <algorithm>
#include <cmath>
#include <string>
#include <utility>

namespace hesd {
namespace {

// A new block this much weaker than its product gets one more orthogonalization sweep.
constexpr double kWeakBlock = 1.0 / 64.0;
// And one of which the last projection left no more than this part of a row.
constexpr double kCancelled = 0.5;
// A product's noise shows in the projections; its rounding alone is at least this part of epsilon * scale.
constexpr double kLeastNoise = 0.125;

[[noreturn]] void refuse(const std::string& what) { throw EngineError("BlockLanczos: " + what); }

BlockLanczosOptions checked(BlockLanczosOptions options) {
    if (options.block < 1 || options.max_steps < 1) {
        refuse("block size " + std::to_string(options.block) + " and max_steps " + std::to_string(options.max_steps) +
               " must both be at least 1");
    }
    return options;
}

bool is_weak(const StepStatus& status) {
    const SmallMatrix& c = status.factor;
    double strongest = 0.0;
    for (std::int64_t i = 0; i < c.rows; ++i) {
        double square = 0.0;
        for (std::int64_t j = 0; j < c.columns; ++j) {
            square += c.at(i, j) * c.at(i, j);
        }
        strongest = std::max(strongest, std::sqrt(square));
    }
    return status.block.weakest < kWeakBlock * strongest || status.facts.cancellation < kCancelled;
}

}  // namespace

BlockLanczos::BlockLanczos(const Kernels& kernels, BasisPanel history, Panel working, BlockLanczosOptions options,
                           Reduction reduction)
    : options_(checked(options)),
      basis_(kernels, std::move(history), working, options_),
      gram_schmidt_(kernels, reduction, basis_, options_) {
    require_options(reduction);
    if (options.reorthogonalization == Reorthogonalization::partial) {
        partial_.emplace(basis_, options.global_size);
    }
}

// Those that do not say where blocks lie.
void BlockLanczos::require_options(const Reduction& reduction) const {
    if (options_.global_size < basis_.columns()) {
        refuse("global_size " + std::to_string(options_.global_size) + " is smaller than the panel's " +
               std::to_string(basis_.columns()) + " columns");
    }
    if (options_.global_size > basis_.columns() && reduction.sum == nullptr) {
        refuse("global_size " + std::to_string(options_.global_size) + " is larger than the panel's " +
               std::to_string(basis_.columns()) + " columns, but there is no reduction over shards");
    }
    if (!(options_.breakdown_multiple >= 0.0 && std::isfinite(options_.breakdown_multiple))) {
        refuse("breakdown_multiple must be finite and not negative");
    }
    if (options_.block > options_.global_size) {
        refuse("block size " + std::to_string(options_.block) + " is larger than the dimension " +
               std::to_string(options_.global_size));
    }
}

void BlockLanczos::require_ready() const {
    if (!started_ || finished()) {
        refuse(started_ ? "advance() after the recurrence has finished" : "advance() before start()");
    }
    if (failed_) {
        refuse("an earlier step ended with an error, so the recurrence is not whole; start a new one");
    }
}

void BlockLanczos::start() {
    if (started_ || failed_) {
        refuse("start() was called twice");
    }
    failed_ = true;
    // Z = L_0 Q_0
    StepStatus status = gram_schmidt_.orthonormalize_probes(basis_.work(options_.block), basis_.newest(options_.block),
                                                            options_.global_size);
    if (status.block.rank == 0) {
        throw NumericalError("BlockLanczos: all probes are zero");
    }
    start_ = std::move(status.factor);
    width_ = rank_ = start_.columns;
    basis_.start(width_);
    if (partial_) {
        partial_->start(width_);
    }
    started_ = true;
    failed_ = false;
}

void BlockLanczos::advance() {
    require_ready();
    failed_ = true;
    // W = H Q_j
    const Panel w = basis_.work(width_);
    // W <- W - B^T (B W^T), B the blocks that it is projected against; twice where that takes much out
    const Projection projection = gram_schmidt_.project(w, partial_ ? basis_.last_two() : basis_.all());
    // W = C_j Q_{j+1}
    const std::int64_t directions = options_.keeps_whole_basis() ? options_.global_size - rank_ : width_;
    StepStatus status = gram_schmidt_.orthonormalize_product(w, projection, directions);
    // A_j = the part of H Q_j along Q_j
    record_diagonal_block(status.removed);
    compare_with_recurrence(status.removed);
    const bool weak = is_weak(status);
    SmallMatrix c = std::move(status.factor);
    if (weak && c.columns > 0) {
        c = product(c, gram_schmidt_.sweep(w.slice(0, c.columns), basis_, {basis_.whole_history()}).factor);
        ++extra_sweeps_;
    }
    if (partial_ && c.columns > 0) {
        partial_->advance(diagonal_, offdiagonal_, c, noise());
        if (weak) {
            partial_->swept_by_all(basis_.whole_history());
        }
        c = partial_->sweep_where_needed(w, std::move(c), basis_, gram_schmidt_);
    }
    if (steps() < options_.max_steps && c.columns > 0) {
        basis_.append(c.columns);
    }
    width_ = c.columns;
    rank_ += width_;
    offdiagonal_.push_back(std::move(c));
    failed_ = false;
}

double BlockLanczos::noise() const {
    return std::max(recurrence_error_, kLeastNoise * machine_epsilon(basis_.precision()) * scale());
}

// A_j is the symmetric part of its projection.
void BlockLanczos::record_diagonal_block(const SmallMatrix& removed) {
    const std::int64_t here = removed.rows - basis_.recent().count + basis_.newest_in_recent();
    SmallMatrix a(width_, width_);
    for (std::int64_t i = 0; i < width_; ++i) {
        for (std::int64_t j = 0; j < width_; ++j) {
            const double entry = removed.at(here + i, j);
            const double mirrored = removed.at(here + j, i);
            a.at(i, j) = 0.5 * (entry + mirrored);
            recurrence_error_ = std::max(recurrence_error_, 0.5 * std::abs(entry - mirrored));
        }
    }
    diagonal_.push_back(std::move(a));
}

// The rest of the projection ought to repeat C_{j-1} and be zero before.
void BlockLanczos::compare_with_recurrence(const SmallMatrix& removed) {
    const std::int64_t in_history = removed.rows - basis_.recent().count;
    if (!offdiagonal_.empty()) {
        const SmallMatrix& c = offdiagonal_.back();
        const std::int64_t before = in_history + options_.block - basis_.newest_in_recent();
        for (std::int64_t i = 0; i < options_.block; ++i) {
            for (std::int64_t j = 0; j < width_; ++j) {
                const double expected = i < c.rows ? c.at(i, j) : 0.0;
                recurrence_error_ = std::max(recurrence_error_, std::abs(removed.at(before + i, j) - expected));
            }
        }
    }
    // Projections onto a rounded history show its rounding, not the operator's noise.
    if (options_.reorthogonalization == Reorthogonalization::full && basis_.history_rounding() == 0.0) {
        for (std::int64_t i = 0; i < in_history * width_; ++i) {
            recurrence_error_ = std::max(recurrence_error_, std::abs(removed.values[static_cast<std::size_t>(i)]));
        }
    }
}

double BlockLanczos::measure_orthogonality() {
    if (!started_ || failed_) {
        refuse("there is no basis to measure");
    }
    const std::int64_t width = finished() ? diagonal_.back().rows : width_;
    double largest = 0.0;
    const auto compare = [&](const BasisRows& rows, std::int64_t own) {
        const SmallMatrix overlaps = gram_schmidt_.overlaps(rows, basis_.newest(width));
        for (std::int64_t i = 0; i < overlaps.rows; ++i) {
            for (std::int64_t j = 0; j < width; ++j) {
                const double expected = i == own + j ? 1.0 : 0.0;
                largest = std::max(largest, std::abs(overlaps.at(i, j) - expected));
            }
        }
    };
    compare(basis_.recent(), basis_.newest_in_recent());
    compare(basis_.history(basis_.whole_history()), -width);
    return largest;
}

}  // namespace hesd
