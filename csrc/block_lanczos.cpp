#include "block_lanczos.hpp"

#include <algorithm>
#include <cmath>

namespace hesd {
namespace {

// A new block this much weaker than its product gets one more orthogonalization sweep.
constexpr double kWeakBlock = 1.0 / 64.0;
// In that sweep a unit vector that loses more than this lay in the span of the basis: it was rounding noise.
constexpr double kInSpan = 0.1;

std::vector<double> zeros(std::int64_t count) { return std::vector<double>(static_cast<std::size_t>(count)); }

SmallMatrix leading_columns(const std::vector<double>& values, std::int64_t rows, std::int64_t stride,
                            std::int64_t columns) {
    SmallMatrix matrix{rows, columns, zeros(rows * columns)};
    for (std::int64_t i = 0; i < rows; ++i) {
        for (std::int64_t j = 0; j < columns; ++j) {
            matrix.values[static_cast<std::size_t>(i * columns + j)] = values[static_cast<std::size_t>(i * stride + j)];
        }
    }
    return matrix;
}

SmallMatrix product(const SmallMatrix& left, const SmallMatrix& right) {
    SmallMatrix result{left.rows, right.columns, zeros(left.rows * right.columns)};
    for (std::int64_t i = 0; i < left.rows; ++i) {
        for (std::int64_t k = 0; k < left.columns; ++k) {
            for (std::int64_t j = 0; j < right.columns; ++j) {
                result.values[static_cast<std::size_t>(i * right.columns + j)] +=
                    left.values[static_cast<std::size_t>(i * left.columns + k)] *
                    right.values[static_cast<std::size_t>(k * right.columns + j)];
            }
        }
    }
    return result;
}

double largest_row_norm(const std::vector<double>& self_gram, std::int64_t width) {
    double largest = 0.0;
    for (std::int64_t i = 0; i < width; ++i) {
        largest = std::max(largest, self_gram[static_cast<std::size_t>(i * width + i)]);
    }
    return std::sqrt(largest);
}

void require_finite(const std::vector<double>& values) {
    for (const double value : values) {
        if (!std::isfinite(value)) {
            throw EngineError("BlockLanczos: the panel `work` has non-finite values after the product");
        }
    }
}

}  // namespace

BlockLanczos::BlockLanczos(const Kernels& kernels, Panel basis, Panel work, BlockLanczosOptions options,
                           Reduction reduction)
    : kernels_(&kernels),
      basis_(basis),
      work_(work),
      options_(options),
      reduction_(reduction),
      slots_(options.block > 0 ? basis.rows / options.block : 0) {
    const auto refuse = [](const std::string& what) { throw EngineError("BlockLanczos: " + what); };
    if (options.block < 1 || options.max_steps < 1) {
        refuse("block size " + std::to_string(options.block) + " and max_steps " + std::to_string(options.max_steps) +
               " must both be at least 1");
    }
    if (work.rows != options.block || work.columns != basis.columns || work.precision != basis.precision) {
        refuse("`work` must have block size rows and the columns and precision of `basis`");
    }
    if (options.global_size < basis.columns) {
        refuse("global_size " + std::to_string(options.global_size) + " is smaller than the panel's " +
               std::to_string(basis.columns) + " columns");
    }
    if (options.global_size > basis.columns && reduction.sum == nullptr) {
        refuse("global_size " + std::to_string(options.global_size) + " is larger than the panel's " +
               std::to_string(basis.columns) + " columns, but there is no reduction over shards");
    }
    if (!(options.breakdown_multiple >= 0.0 && std::isfinite(options.breakdown_multiple))) {
        refuse("breakdown_multiple must be finite and not negative");
    }
    if (options.block > options.global_size) {
        refuse("block size " + std::to_string(options.block) + " is larger than the dimension " +
               std::to_string(options.global_size));
    }
    std::int64_t needed = 2;
    if (options.reorthogonalization == Reorthogonalization::full) {
        needed = options.max_steps;
    } else if (options.reorthogonalization == Reorthogonalization::none) {
        slots_ = std::min<std::int64_t>(slots_, 2);
        needed = std::min<std::int64_t>(2, options.max_steps);
    }
    if (slots_ < std::min(needed, options.max_steps)) {
        refuse("`basis` has " + std::to_string(basis.rows) + " rows; this mode needs " +
               std::to_string(needed * options.block));
    }
}

Panel BlockLanczos::current() const { return basis_.slice(current_row(), width_); }

std::int64_t BlockLanczos::current_row() const { return slot(step_) * options_.block; }

// All blocks kept so far, the current one included; the order of the slots does not matter for a projection.
Panel BlockLanczos::stored() const { return basis_.slice(0, std::min(step_ + 1, slots_) * options_.block); }

void BlockLanczos::start() {
    if (started_ || failed_) {
        throw EngineError("BlockLanczos: start() was called twice");
    }
    failed_ = true;
    const std::int64_t b = options_.block;
    std::vector<double> gram = zeros(b * b);
    kernels_->panel_gram(work_, work_, gram.data());
    reduction_(gram.data(), b * b);
    require_finite(gram);
    const double tolerance = options_.breakdown_multiple * machine_epsilon(work_.precision) * largest_row_norm(gram, b);
    std::vector<double> factor = zeros(b * b);
    const OrthonormalizeResult result = kernels_->panel_orthonormalize(work_, basis_.slice(0, b), tolerance,
                                                                       options_.global_size, reduction_, factor.data());
    if (result.rank == 0) {
        throw EngineError("BlockLanczos: all probes are zero");
    }
    start_ = leading_columns(factor, b, b, result.rank);
    width_ = result.rank;
    rank_ = result.rank;
    started_ = true;
    failed_ = false;
}

void BlockLanczos::advance() {
    if (!started_ || finished_) {
        throw EngineError(started_ ? "BlockLanczos: advance() after the recurrence has finished"
                                   : "BlockLanczos: advance() before start()");
    }
    if (failed_) {
        throw EngineError(
            "BlockLanczos: an earlier step ended with an error, so the recurrence is not whole; start a new one");
    }
    failed_ = true;
    const Panel v = stored();
    const Panel w = work_.slice(0, width_);
    const std::int64_t k = v.rows;

    // S1 = V W^T                                        reads V
    std::vector<double> first = zeros(k * width_);
    kernels_->panel_gram(v, w, first.data());
    reduction_(first.data(), k * width_);
    require_finite(first);

    // W <- W - S1^T V,  S2 = V W^T                      reads V, reads and writes W
    std::vector<double> second = zeros(k * width_);
    kernels_->panel_project(w, v, first.data(), second.data(), nullptr);
    reduction_(second.data(), k * width_);

    // W <- W - S2^T V,  W W^T                           reads V, reads and writes W
    std::vector<double> self_gram = zeros(width_ * width_);
    kernels_->panel_project(w, v, second.data(), nullptr, self_gram.data());
    reduction_(self_gram.data(), width_ * width_);
    require_finite(self_gram);

    double cancellation = 1.0;  // least fraction of a row's norm that outlived the second projection
    for (std::int64_t j = 0; j < width_; ++j) {
        double removed_first = 0.0;
        double removed_second = 0.0;
        for (std::int64_t i = 0; i < k; ++i) {
            auto& total = first[static_cast<std::size_t>(i * width_ + j)];
            const double correction = second[static_cast<std::size_t>(i * width_ + j)];
            removed_second += correction * correction;
            total += correction;
            removed_first += total * total;
        }
        const double left = self_gram[static_cast<std::size_t>(j * width_ + j)];
        scale_ = std::max(scale_, std::sqrt(removed_first + left));
        if (removed_second > 0.0) {
            cancellation = std::min(cancellation, std::sqrt(left / (left + removed_second)));
        }
    }
    record_coefficients(first, width_);

    const double tolerance = options_.breakdown_multiple * machine_epsilon(work_.precision) * scale_;
    offdiagonal_.push_back(next_block(tolerance, cancellation));
    ++step_;
    width_ = offdiagonal_.back().columns;
    rank_ += width_;
    invariant_ = width_ == 0;
    finished_ = invariant_ || step_ == options_.max_steps;
    failed_ = false;
}

// A_j is the symmetric part of its projection; the rest of the projection ought to repeat C_{j-1} and be zero before.
void BlockLanczos::record_coefficients(const std::vector<double>& projection, std::int64_t width) {
    const std::int64_t b = options_.block;
    const auto at = [&](std::int64_t row, std::int64_t column) {
        return projection[static_cast<std::size_t>(row * width + column)];
    };
    const std::int64_t here = current_row();
    SmallMatrix a{width, width, zeros(width * width)};
    for (std::int64_t i = 0; i < width; ++i) {
        for (std::int64_t j = 0; j < width; ++j) {
            a.values[static_cast<std::size_t>(i * width + j)] = 0.5 * (at(here + i, j) + at(here + j, i));
            recurrence_error_ = std::max(recurrence_error_, 0.5 * std::abs(at(here + i, j) - at(here + j, i)));
        }
    }
    diagonal_.push_back(std::move(a));
    const std::int64_t blocks = std::min(step_ + 1, slots_);
    for (std::int64_t other = 0; other < blocks; ++other) {
        if (other == slot(step_)) {
            continue;
        }
        const bool previous = step_ > 0 && other == slot(step_ - 1);
        const SmallMatrix* c = previous ? &offdiagonal_.back() : nullptr;
        for (std::int64_t i = 0; i < b; ++i) {
            for (std::int64_t j = 0; j < width; ++j) {
                const double expected =
                    c != nullptr && i < c->rows ? c->values[static_cast<std::size_t>(i * c->columns + j)] : 0.0;
                if (previous || options_.reorthogonalization == Reorthogonalization::full) {
                    recurrence_error_ = std::max(recurrence_error_, std::abs(at(other * b + i, j) - expected));
                }
            }
        }
    }
}

// Orthonormalizes work[0 : width] into the next slot (into work itself after the last step) and returns C_j.
SmallMatrix BlockLanczos::next_block(double tolerance, double cancellation) {
    const std::int64_t b = options_.block;
    const Panel v = stored();
    const bool last = step_ + 1 == options_.max_steps;
    const Panel w = work_.slice(0, width_);
    const Panel target = last ? w : basis_.slice(slot(step_ + 1) * b, width_);
    const std::int64_t room = options_.global_size - rank_;
    const bool full = options_.reorthogonalization == Reorthogonalization::full;
    // With a ring of slots the next block takes the place of one that is still projected against: it is made in `work`.
    const bool in_place = full || last;
    const Panel made = in_place ? target : w;

    std::vector<double> factor = zeros(width_ * width_);
    OrthonormalizeResult result =
        kernels_->panel_orthonormalize(w, made, tolerance, full ? room : width_, reduction_, factor.data());
    SmallMatrix c = leading_columns(factor, width_, width_, result.rank);
    double strongest = 0.0;
    for (std::int64_t i = 0; i < width_; ++i) {
        double square = 0.0;
        for (std::int64_t j = 0; j < result.rank; ++j) {
            const double value = c.values[static_cast<std::size_t>(i * result.rank + j)];
            square += value * value;
        }
        strongest = std::max(strongest, std::sqrt(square));
    }

    const bool weak = result.weakest < kWeakBlock * strongest || cancellation < 0.5;
    if (result.rank > 0 && weak) {
        // Q <- Q - (V Q^T)^T V, then orthonormal again; the change of C_j is of the order of epsilon * ||W||.
        const Panel q = made.slice(0, result.rank);
        std::vector<double> overlap = zeros(v.rows * result.rank);
        kernels_->panel_gram(v, q, overlap.data());
        reduction_(overlap.data(), v.rows * result.rank);
        kernels_->panel_project(q, v, overlap.data(), nullptr, nullptr);
        std::vector<double> again = zeros(result.rank * result.rank);
        const OrthonormalizeResult second =
            kernels_->panel_orthonormalize(q, q, kInSpan, result.rank, reduction_, again.data());
        c = product(c, leading_columns(again, result.rank, result.rank, second.rank));
        ++extra_sweeps_;
    }
    if (!in_place) {
        std::vector<double> identity = zeros(width_ * width_);
        for (std::int64_t i = 0; i < width_; ++i) {
            identity[static_cast<std::size_t>(i * width_ + i)] = 1.0;
        }
        kernels_->panel_combine(identity.data(), made, target);
    }
    // Rows of the slot beyond the block's width may hold an older block: they must not take part in projections.
    if (!last) {
        for (std::int64_t row = width_; row < b; ++row) {
            const Panel rest = basis_.slice(slot(step_ + 1) * b + row, 1);
            char* bytes = static_cast<char*>(rest.data);
            std::fill(bytes, bytes + rest.columns * element_bytes(rest.precision), 0);
        }
    }
    return c;
}

}  // namespace hesd
