#include "block_lanczos.hpp"

#include <algorithm>
#include <cmath>
#include <string>
#include <utility>

namespace hesd {
namespace {

// A new block this much weaker than its product gets one more orthogonalization sweep.
constexpr double kWeakBlock = 1.0 / 64.0;
// In that sweep a unit vector that loses more than this lay in the span of the basis: it was rounding noise.
constexpr double kInSpan = 0.1;
// Partial reorthogonalization acts when an estimate passes this part of sqrt(epsilon), and on the blocks whose
// estimates have passed this part of epsilon^(3/4): one draw of random signs may be too small by such a factor.
constexpr double kLimitMargin = 0.5;
constexpr double kTargetMargin = 1.0 / 32.0;

// One projection against the history is enough for a row that keeps all but this part of its norm.
constexpr double kOnePass = 1.0 / 64.0;

std::vector<double> zeros(std::int64_t count) { return std::vector<double>(static_cast<std::size_t>(count)); }

SmallMatrix leading_columns(const std::vector<double>& values, std::int64_t rows, std::int64_t stride,
                            std::int64_t columns) {
    SmallMatrix matrix(rows, columns);
    for (std::int64_t i = 0; i < rows; ++i) {
        for (std::int64_t j = 0; j < columns; ++j) {
            matrix.at(i, j) = values[static_cast<std::size_t>(i * stride + j)];
        }
    }
    return matrix;
}

SmallMatrix product(const SmallMatrix& left, const SmallMatrix& right) {
    SmallMatrix result(left.rows, right.columns);
    add_product(result, 1.0, left, false, right, false);
    return result;
}

double largest_row_norm(const std::vector<double>& self_gram, std::int64_t width) {
    double largest = 0.0;
    for (std::int64_t i = 0; i < width; ++i) {
        largest = std::max(largest, self_gram[static_cast<std::size_t>(i * width + i)]);
    }
    return std::sqrt(largest);
}

// Coefficients as panel_project uses them, so that what is recorded is what was subtracted.
void round_to(Precision precision, std::vector<double>& values) {
    if (precision == Precision::float32) {
        for (double& value : values) {
            value = static_cast<double>(static_cast<float>(value));
        }
    }
}

void reduce(const Reduction& reduction, std::vector<double>* values) {
    if (values != nullptr) {
        reduction(values->data(), static_cast<std::int64_t>(values->size()));
    }
}

void require_finite(const std::vector<double>& values) {
    for (const double value : values) {
        if (!std::isfinite(value)) {
            throw EngineError("BlockLanczos: the panel `work` has non-finite values after the product");
        }
    }
}

}  // namespace

BlockLanczos::BlockLanczos(const Kernels& kernels, TiledPanel history, Panel recent, Panel work,
                           BlockLanczosOptions options, Reduction reduction)
    : kernels_(&kernels),
      history_(std::move(history)),
      recent_(recent),
      recent_tile_({recent}),
      work_(work),
      options_(options),
      reduction_(reduction),
      slots_(options.block > 0 ? history_.rows() / options.block : 0) {
    const auto refuse = [](const std::string& what) { throw EngineError("BlockLanczos: " + what); };
    if (options.block < 1 || options.max_steps < 1) {
        refuse("block size " + std::to_string(options.block) + " and max_steps " + std::to_string(options.max_steps) +
               " must both be at least 1");
    }
    if (work.rows != options.block || recent.rows != 2 * options.block || work.columns != recent.columns ||
        work.columns != history_.columns() || work.precision != recent.precision) {
        refuse(
            "`work` must have block size rows and `recent` twice as many, both of one precision and with the columns "
            "of `history`");
    }
    if (element_bytes(history_.precision()) > element_bytes(work.precision)) {
        refuse("`history` has a higher precision than `work`; wanted the same or a lower one");
    }
    if (options.global_size < work.columns) {
        refuse("global_size " + std::to_string(options.global_size) + " is smaller than the panel's " +
               std::to_string(work.columns) + " columns");
    }
    if (options.global_size > work.columns && reduction.sum == nullptr) {
        refuse("global_size " + std::to_string(options.global_size) + " is larger than the panel's " +
               std::to_string(work.columns) + " columns, but there is no reduction over shards");
    }
    if (!(options.breakdown_multiple >= 0.0 && std::isfinite(options.breakdown_multiple))) {
        refuse("breakdown_multiple must be finite and not negative");
    }
    if (options.block > options.global_size) {
        refuse("block size " + std::to_string(options.block) + " is larger than the dimension " +
               std::to_string(options.global_size));
    }
    if (keeps_all() && slots_ < options.max_steps - 2) {
        refuse("`history` has " + std::to_string(history_.rows()) + " rows; this mode needs " +
               std::to_string((options.max_steps - 2) * options.block));
    }
    if (options.reorthogonalization == Reorthogonalization::none) {
        slots_ = 0;
    }
    // A stored vector is off by its rounding, which in a vector of n entries points nowhere in particular.
    const double rounding = history_.precision() == work.precision ? 0.0 : 0.5 * machine_epsilon(history_.precision());
    fresh_ = epsilon() + rounding / std::sqrt(static_cast<double>(options.global_size));
}

Panel BlockLanczos::current() const { return recent_.slice(current_row(), width_); }

std::int64_t BlockLanczos::current_row() const {
    const std::int64_t step = finished_ && step_ > 0 ? step_ - 1 : step_;
    return step % 2 * options_.block;
}

bool BlockLanczos::keeps_all() const {
    return options_.reorthogonalization == Reorthogonalization::full ||
           options_.reorthogonalization == Reorthogonalization::partial;
}

// Blocks in the history; the order of its slots does not matter for a projection.
std::int64_t BlockLanczos::history_blocks() const { return std::min(stored_, slots_); }

BlockLanczos::Rows BlockLanczos::history_rows(Range range) const {
    return {&history_, range.first * options_.block, (range.last - range.first) * options_.block};
}

BlockLanczos::Rows BlockLanczos::recent_rows() const {
    const std::int64_t last = finished_ && step_ > 0 ? step_ - 1 : step_;
    return {&recent_tile_, 0, std::min<std::int64_t>(last + 1, 2) * options_.block};
}

void BlockLanczos::gram(Rows v, const Panel& w, std::vector<double>& out) {
    out.assign(static_cast<std::size_t>(v.count * w.rows), 0.0);
    v.panel->gram(*kernels_, v.first, v.count, w, out.data());
    reduce(reduction_, &out);
    vectors_read_ += v.count;
}

void BlockLanczos::project(const Panel& w, Rows v, const std::vector<double>& c, std::vector<double>* gram,
                           std::vector<double>* self_gram) {
    if (gram != nullptr) {
        gram->assign(static_cast<std::size_t>(v.count * w.rows), 0.0);
    }
    if (self_gram != nullptr) {
        self_gram->assign(static_cast<std::size_t>(w.rows * w.rows), 0.0);
    }
    v.panel->project(*kernels_, v.first, v.count, w, c.data(), gram != nullptr ? gram->data() : nullptr,
                     self_gram != nullptr ? self_gram->data() : nullptr);
    reduce(reduction_, gram);
    reduce(reduction_, self_gram);
    vectors_read_ += v.count;
}

void BlockLanczos::start() {
    if (started_ || failed_) {
        throw EngineError("BlockLanczos: start() was called twice");
    }
    failed_ = true;
    const std::int64_t b = options_.block;
    std::vector<double> self_gram = zeros(b * b);
    kernels_->panel_gram(work_, work_, self_gram.data());
    reduction_(self_gram.data(), b * b);
    require_finite(self_gram);
    const double tolerance = options_.breakdown_multiple * epsilon() * largest_row_norm(self_gram, b);
    std::vector<double> factor = zeros(b * b);
    const OrthonormalizeResult result = kernels_->panel_orthonormalize(
        work_, recent_.slice(0, b), tolerance, options_.global_size, reduction_, self_gram.data(), factor.data());
    if (result.rank == 0) {
        throw EngineError("BlockLanczos: all probes are zero");
    }
    start_ = leading_columns(factor, b, b, result.rank);
    width_ = result.rank;
    rank_ = result.rank;
    estimate_.start(width_);
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
    const Panel w = work_.slice(0, width_);
    const Rows recent = recent_rows();
    const bool local = options_.reorthogonalization == Reorthogonalization::partial || history_blocks() == 0;
    const Rows history = history_rows({0, history_blocks()});
    std::vector<double> first;
    std::vector<double> second;
    std::vector<double> first_history;
    std::vector<double> second_history;
    std::vector<double> self_gram;

    // The last two blocks R carry nearly all that is taken out:
    // S1 = R W^T,  W <- W - S1^T R,  S2 = R W^T         reads R twice, W once and reads and writes it once
    gram(recent, w, first);
    require_finite(first);
    round_to(work_.precision, first);
    project(w, recent, first, &second, local ? nullptr : &self_gram);
    round_to(work_.precision, second);
    if (!local) {
        // S1 = V W^T,  W <- W - S1^T V                  reads V twice, W once and reads and writes it once
        gram(history, w, first_history);
        require_finite(first_history);
        round_to(work_.precision, first_history);
        const bool twice = removes_much(first_history, self_gram);
        project(w, history, first_history, twice ? &second_history : nullptr, nullptr);
        second_history.resize(first_history.size());
        if (twice) {
            // S2 from the same read of V, then W <- W - S2^T V      reads V and R once more
            round_to(work_.precision, second_history);
            project(w, history, second_history, nullptr, nullptr);
            gram(recent, w, second);
            round_to(work_.precision, second);
        }
    }
    // W <- W - S2^T R                                   reads R, reads and writes W
    project(w, recent, second, nullptr, &self_gram);
    require_finite(self_gram);

    double cancellation = 1.0;  // least fraction of a row's norm that outlived the second projection
    for (std::int64_t j = 0; j < width_; ++j) {
        double removed_first = 0.0;
        double removed_second = 0.0;
        const auto add = [&](std::vector<double>& once, const std::vector<double>& again) {
            for (std::size_t i = static_cast<std::size_t>(j); i < once.size(); i += static_cast<std::size_t>(width_)) {
                removed_second += again[i] * again[i];
                once[i] += again[i];
                removed_first += once[i] * once[i];
            }
        };
        add(first, second);
        add(first_history, second_history);
        const double left = self_gram[static_cast<std::size_t>(j * width_ + j)];
        scale_ = std::max(scale_, std::sqrt(removed_first + left));
        if (removed_second > 0.0) {
            cancellation = std::min(cancellation, std::sqrt(left / (left + removed_second)));
        }
    }
    record_coefficients(first, first_history, width_);

    const double tolerance = options_.breakdown_multiple * epsilon() * scale_;
    offdiagonal_.push_back(next_block(tolerance, cancellation, self_gram));
    ++step_;
    width_ = offdiagonal_.back().columns;
    rank_ += width_;
    invariant_ = width_ == 0;
    finished_ = invariant_ || step_ == options_.max_steps;
    failed_ = false;
}

// Whether the history takes so much out of a row that one projection is not enough: what it leaves of an overlap is the
// rounding of the coefficient and the history's own loss of orthogonality.
bool BlockLanczos::removes_much(const std::vector<double>& overlap, const std::vector<double>& self_gram) const {
    const double limit = history_.precision() == work_.precision ? kOnePass : std::sqrt(epsilon());
    for (std::int64_t j = 0; j < width_; ++j) {
        double square = 0.0;
        for (std::size_t i = static_cast<std::size_t>(j); i < overlap.size(); i += static_cast<std::size_t>(width_)) {
            square += overlap[i] * overlap[i];
        }
        // not a number counts as much
        if (!(square <= limit * limit * self_gram[static_cast<std::size_t>(j * width_ + j)])) {
            return true;
        }
    }
    return false;
}

// A_j is the symmetric part of its projection; the rest of the projection ought to repeat C_{j-1} and be zero before.
void BlockLanczos::record_coefficients(const std::vector<double>& recent, const std::vector<double>& history,
                                       std::int64_t width) {
    const std::int64_t b = options_.block;
    const auto at = [&](std::int64_t row, std::int64_t column) {
        return recent[static_cast<std::size_t>(row * width + column)];
    };
    const std::int64_t here = current_row();
    SmallMatrix a(width, width);
    for (std::int64_t i = 0; i < width; ++i) {
        for (std::int64_t j = 0; j < width; ++j) {
            a.at(i, j) = 0.5 * (at(here + i, j) + at(here + j, i));
            recurrence_error_ = std::max(recurrence_error_, 0.5 * std::abs(at(here + i, j) - at(here + j, i)));
        }
    }
    diagonal_.push_back(std::move(a));
    if (step_ > 0) {
        const SmallMatrix& c = offdiagonal_.back();
        for (std::int64_t i = 0; i < b; ++i) {
            for (std::int64_t j = 0; j < width; ++j) {
                const double expected = i < c.rows ? c.at(i, j) : 0.0;
                recurrence_error_ = std::max(recurrence_error_, std::abs(at(b - here + i, j) - expected));
            }
        }
    }
    // Projections onto a rounded history show its rounding, not the operator's noise.
    if (options_.reorthogonalization == Reorthogonalization::full && history_.precision() == work_.precision) {
        for (const double value : history) {
            recurrence_error_ = std::max(recurrence_error_, std::abs(value));
        }
    }
}

// Q <- Q - (V Q^T)^T V for the blocks asked for, then orthonormal again; returns the factor of the old rows in the new.
SmallMatrix BlockLanczos::sweep(const Panel& q, const std::vector<Range>& ranges) {
    std::vector<double> overlap;
    swept_overlap_ = 0.0;
    const auto note = [&] {
        for (const double value : overlap) {
            swept_overlap_ = std::max(swept_overlap_, std::abs(value));
        }
    };
    for (const Range range : ranges) {
        if (range.first < range.last) {
            gram(history_rows(range), q, overlap);
            note();
            project(q, history_rows(range), overlap, nullptr, nullptr);
        }
    }
    // Last, since older blocks that are not quite orthogonal to the last two bring parts of them back.
    const Rows recent = recent_rows();
    gram(recent, q, overlap);
    note();
    project(q, recent, overlap, nullptr, nullptr);
    std::vector<double> factor = zeros(q.rows * q.rows);
    const OrthonormalizeResult result =
        kernels_->panel_orthonormalize(q, q, kInSpan, q.rows, reduction_, nullptr, factor.data());
    return leading_columns(factor, q.rows, q.rows, result.rank);
}

// The blocks of the history that the newest block has to be swept against, after the estimate has moved on to it.
std::vector<BlockLanczos::Range> BlockLanczos::ranges_to_sweep() {
    const std::int64_t blocks = history_blocks();
    const double limit = kLimitMargin * std::sqrt(epsilon());
    const double target = kTargetMargin * std::pow(epsilon(), 0.75);
    double largest = 0.0;
    for (std::int64_t i = 0; i < blocks; ++i) {
        largest = std::max(largest, estimate_.with(i));
    }
    const bool again = !pending_.empty();
    if (largest <= limit && !again) {
        return {};
    }
    std::vector<bool> wanted(static_cast<std::size_t>(blocks));
    for (std::int64_t i = 0; i < blocks; ++i) {
        wanted[static_cast<std::size_t>(i)] = estimate_.with(i) > target;
    }
    for (const Range range : pending_) {
        for (std::int64_t i = range.first; i < std::min(range.last + 1, blocks); ++i) {
            wanted[static_cast<std::size_t>(i)] = true;
        }
    }
    std::vector<Range> ranges;
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
    pending_ = again ? std::vector<Range>{} : ranges;
    return ranges;
}

// Orthonormalizes work[0 : width] in place, moves it to the recent blocks (not after the last step), returns C_j.
SmallMatrix BlockLanczos::next_block(double tolerance, double cancellation, const std::vector<double>& self_gram) {
    const Panel w = work_.slice(0, width_);
    const std::int64_t room = keeps_all() ? options_.global_size - rank_ : width_;
    std::vector<double> factor = zeros(width_ * width_);
    const OrthonormalizeResult result =
        kernels_->panel_orthonormalize(w, w, tolerance, room, reduction_, self_gram.data(), factor.data());
    SmallMatrix c = leading_columns(factor, width_, width_, result.rank);
    double strongest = 0.0;
    for (std::int64_t i = 0; i < width_; ++i) {
        double square = 0.0;
        for (std::int64_t j = 0; j < result.rank; ++j) {
            square += c.at(i, j) * c.at(i, j);
        }
        strongest = std::max(strongest, std::sqrt(square));
    }

    const bool partial = options_.reorthogonalization == Reorthogonalization::partial;
    const std::int64_t blocks = history_blocks();
    const bool weak = result.weakest < kWeakBlock * strongest || cancellation < 0.5;
    if (result.rank > 0 && weak) {
        c = product(c, sweep(w.slice(0, result.rank), {{0, blocks}}));
        ++extra_sweeps_;
    }
    if (partial && c.columns > 0) {
        offdiagonal_.push_back(c);
        // A product's noise shows in the projections; its rounding alone is at least of this size.
        const double noise = std::max(recurrence_error_, 0.125 * epsilon() * scale_);
        estimate_.advance(diagonal_, offdiagonal_, noise, fresh_);
        offdiagonal_.pop_back();
        if (weak) {
            estimate_.removed(0, blocks, fresh_);
            pending_.clear();
        }
        const std::vector<Range> ranges = ranges_to_sweep();
        if (!ranges.empty()) {
            SmallMatrix old_rows = sweep(w.slice(0, c.columns), ranges);
            c = product(c, old_rows);
            estimate_.rewritten(old_rows);
            for (const Range range : ranges) {
                estimate_.removed(range.first, range.last, fresh_);
            }
            if (swept_overlap_ > std::pow(epsilon(), 0.25) && c.columns > 0) {
                // One sweep of blocks that are orthogonal to sqrt(epsilon) leaves too much of this: everything once
                // more.
                old_rows = sweep(w.slice(0, c.columns), {{0, blocks}});
                c = product(c, old_rows);
                estimate_.rewritten(old_rows);
                estimate_.removed(0, blocks, fresh_);
                pending_ = {{0, blocks}};
            }
            ++partial_sweeps_;
        }
    }
    if (step_ + 1 < options_.max_steps && c.columns > 0) {
        keep(c.columns);
    }
    return c;
}

// Q_{j-1} goes into the history, and Q_{j+1} takes its place.
void BlockLanczos::keep(std::int64_t width) {
    const std::int64_t b = options_.block;
    const std::int64_t row = (step_ + 1) % 2 * b;
    if (step_ > 0 && slots_ > 0) {
        history_.store(*kernels_, stored_ % slots_ * b, recent_.slice(row, b));
        ++stored_;
    }
    recent_tile_.store(*kernels_, row, work_.slice(0, width));
    // Rows beyond the block's width may hold an older block: they must not take part in projections.
    for (std::int64_t empty = width; empty < b; ++empty) {
        const Panel rest = recent_.slice(row + empty, 1);
        std::fill_n(static_cast<char*>(rest.data), rest.columns * element_bytes(rest.precision), '\0');
    }
}

double BlockLanczos::measure_orthogonality() {
    if (!started_ || failed_) {
        throw EngineError("BlockLanczos: there is no basis to measure");
    }
    const std::int64_t width = finished_ ? diagonal_.back().rows : width_;
    const Panel q = recent_.slice(current_row(), width);
    std::vector<double> overlap;
    gram(recent_rows(), q, overlap);
    double largest = 0.0;
    for (std::int64_t i = 0; i < recent_rows().count; ++i) {
        for (std::int64_t j = 0; j < width; ++j) {
            const double expected = i == current_row() + j ? 1.0 : 0.0;
            largest = std::max(largest, std::abs(overlap[static_cast<std::size_t>(i * width + j)] - expected));
        }
    }
    gram(history_rows({0, history_blocks()}), q, overlap);
    for (const double value : overlap) {
        largest = std::max(largest, std::abs(value));
    }
    return largest;
}

}  // namespace hesd
