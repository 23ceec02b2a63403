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
            throw EngineError("BlockLanczos: the panel `working` has non-finite values after the product");
        }
    }
}

}  // namespace

BlockLanczos::BlockLanczos(const Kernels& kernels, TiledPanel history, Panel working, BlockLanczosOptions options,
                           Reduction reduction)
    : kernels_(&kernels),
      history_(std::move(history)),
      working_(working),
      working_tile_({working}),
      options_(options),
      reduction_(reduction),
      slots_(options.block > 0 ? history_.rows() / options.block : 0) {
    const auto refuse = [](const std::string& what) { throw EngineError("BlockLanczos: " + what); };
    if (options.block < 1 || options.max_steps < 1) {
        refuse("block size " + std::to_string(options.block) + " and max_steps " + std::to_string(options.max_steps) +
               " must both be at least 1");
    }
    if (working.rows < 3 * options.block || working.columns != history_.columns()) {
        refuse("`working` must have at least three times block size rows (it has " + std::to_string(working.rows) +
               ") and the columns of `history`");
    }
    in_place_ = keeps_all() && working.rows > 3 * options.block;
    if (in_place_ && (working.rows < (options.max_steps + 1) * options.block || history_.rows() > 0)) {
        refuse("`working` with more than three blocks keeps the whole basis: " +
               std::to_string((options.max_steps + 1) * options.block) + " rows are needed, and no `history`; got " +
               std::to_string(working.rows) + " rows and a history of " + std::to_string(history_.rows()));
    }
    if (element_bytes(history_.precision()) > element_bytes(working.precision)) {
        refuse("`history` has a higher precision than `working`; wanted the same or a lower one");
    }
    if (options.global_size < working.columns) {
        refuse("global_size " + std::to_string(options.global_size) + " is smaller than the panel's " +
               std::to_string(working.columns) + " columns");
    }
    if (options.global_size > working.columns && reduction.sum == nullptr) {
        refuse("global_size " + std::to_string(options.global_size) + " is larger than the panel's " +
               std::to_string(working.columns) + " columns, but there is no reduction over shards");
    }
    if (!(options.breakdown_multiple >= 0.0 && std::isfinite(options.breakdown_multiple))) {
        refuse("breakdown_multiple must be finite and not negative");
    }
    if (options.block > options.global_size) {
        refuse("block size " + std::to_string(options.block) + " is larger than the dimension " +
               std::to_string(options.global_size));
    }
    if (keeps_all() && !in_place_ && slots_ < options.max_steps - 2) {
        refuse("`history` has " + std::to_string(history_.rows()) + " rows; this mode needs " +
               std::to_string((options.max_steps - 2) * options.block));
    }
    if (options.reorthogonalization == Reorthogonalization::none) {
        slots_ = 0;
    }
    // A stored vector is off by its rounding, which in a vector of n entries points nowhere in particular.
    const double rounding =
        history_.precision() == working.precision ? 0.0 : 0.5 * machine_epsilon(history_.precision());
    fresh_ = epsilon() + rounding / std::sqrt(static_cast<double>(options.global_size));
}

Panel BlockLanczos::current() const { return working_.slice(current_row(), width_); }

std::int64_t BlockLanczos::work_row() const { return (in_place_ ? newest_ + 1 : 2) * options_.block; }

bool BlockLanczos::keeps_all() const {
    return options_.reorthogonalization == Reorthogonalization::full ||
           options_.reorthogonalization == Reorthogonalization::partial;
}

// Blocks in the history; the order of its slots does not matter for a projection.
std::int64_t BlockLanczos::history_blocks() const {
    return in_place_ ? std::max<std::int64_t>(newest_ - 1, 0) : std::min(stored_, slots_);
}

BlockLanczos::Rows BlockLanczos::history_rows(Range range) const {
    return {in_place_ ? &working_tile_ : &history_, range.first * options_.block,
            (range.last - range.first) * options_.block};
}

BlockLanczos::Rows BlockLanczos::recent_rows() const {
    const std::int64_t first = in_place_ ? std::max<std::int64_t>(newest_ - 1, 0) : 0;
    return {&working_tile_, first * options_.block, recent_blocks_ * options_.block};
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

// W <- W - C^T R for the last two blocks R, then B W^T for the whole basis; in place it is one read of it.
void BlockLanczos::project_recent(const Panel& w, const Basis& basis, const std::vector<double>& c,
                                  std::vector<double>& gram, std::vector<double>& self_gram) {
    if (in_place_) {
        std::vector<double> padded(static_cast<std::size_t>(basis.history.count * w.rows));
        padded.insert(padded.end(), c.begin(), c.end());
        project(w, basis.whole(), padded, &gram, &self_gram);
        return;
    }
    std::vector<double> recent;
    project(w, basis.recent, c, &recent, &self_gram);
    this->gram(basis.history, w, gram);
    gram.insert(gram.end(), recent.begin(), recent.end());
}

// W <- W - C^T B for the whole basis; where gram is given, B W^T from the same read of B.
void BlockLanczos::project(const Panel& w, const Basis& basis, const std::vector<double>& c, std::vector<double>* gram,
                           std::vector<double>* self_gram) {
    if (in_place_) {
        project(w, basis.whole(), c, gram, self_gram);
        return;
    }
    const auto middle = c.begin() + static_cast<std::ptrdiff_t>(basis.history.count * w.rows);
    if (basis.history.count > 0) {
        project(w, basis.history, {c.begin(), middle}, gram, nullptr);
    } else if (gram != nullptr) {
        gram->clear();
    }
    // Last, since older blocks that are not quite orthogonal to the last two bring parts of them back.
    project(w, basis.recent, {middle, c.end()}, nullptr, self_gram);
    if (gram != nullptr) {
        std::vector<double> recent;
        this->gram(basis.recent, w, recent);
        gram->insert(gram->end(), recent.begin(), recent.end());
    }
}

void BlockLanczos::start() {
    if (started_ || failed_) {
        throw EngineError("BlockLanczos: start() was called twice");
    }
    failed_ = true;
    const std::int64_t b = options_.block;
    std::vector<double> self_gram = zeros(b * b);
    const Panel probes = working_.slice(work_row(), b);
    kernels_->panel_gram(probes, probes, self_gram.data());
    reduction_(self_gram.data(), b * b);
    require_finite(self_gram);
    const double tolerance = options_.breakdown_multiple * epsilon() * largest_row_norm(self_gram, b);
    std::vector<double> factor = zeros(b * b);
    const OrthonormalizeResult result = kernels_->panel_orthonormalize(
        probes, working_.slice(0, b), tolerance, options_.global_size, reduction_, self_gram.data(), factor.data());
    if (result.rank == 0) {
        throw EngineError("BlockLanczos: all probes are zero");
    }
    start_ = leading_columns(factor, b, b, result.rank);
    width_ = result.rank;
    clear_rows(width_, b - width_);
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
    const Panel w = working_.slice(work_row(), width_);
    const bool local = options_.reorthogonalization == Reorthogonalization::partial;
    const Basis basis{history_rows({0, local ? 0 : history_blocks()}), recent_rows()};
    const auto in_history = static_cast<std::size_t>(basis.history.count * width_);
    std::vector<double> removed(in_history);
    std::vector<double> overlap;
    std::vector<double> next;
    std::vector<double> self_gram;
    // Coefficients as panel_project uses them, so that what is recorded is what was subtracted.
    const auto note = [&](std::vector<double>& coefficients) {
        require_finite(coefficients);
        round_to(working_.precision, coefficients);
    };
    const auto add_to_removed = [&] {
        for (std::size_t i = 0; i < removed.size(); ++i) {
            removed[i] += overlap[i];
        }
    };

    // The last two blocks R carry nearly all that is taken out:
    // S = R W^T                                         reads R and W once
    gram(basis.recent, w, overlap);
    note(overlap);
    removed.insert(removed.end(), overlap.begin(), overlap.end());
    // W <- W - S^T R,  S = B W^T                        B is V and R; reads B once, reads and writes W once
    project_recent(w, basis, overlap, next, self_gram);
    note(next);
    overlap.swap(next);
    add_to_removed();
    // W <- W - S^T B                                    reads B once, reads and writes W once
    const bool twice = removes_much(overlap, in_history, self_gram);
    project(w, basis, overlap, twice ? &next : nullptr, &self_gram);
    if (twice) {
        // S = B W^T from the same read of B, then W <- W - S^T B      reads B once more
        note(next);
        overlap.swap(next);
        add_to_removed();
        project(w, basis, overlap, nullptr, &self_gram);
    }
    require_finite(self_gram);

    double cancellation = 1.0;  // least fraction of a row's norm that outlived the last projection
    for (std::int64_t j = 0; j < width_; ++j) {
        double all = 0.0;
        double last = 0.0;
        for (std::size_t i = static_cast<std::size_t>(j); i < removed.size(); i += static_cast<std::size_t>(width_)) {
            all += removed[i] * removed[i];
            last += overlap[i] * overlap[i];
        }
        const double left = self_gram[static_cast<std::size_t>(j * width_ + j)];
        scale_ = std::max(scale_, std::sqrt(all + left));
        if (last > 0.0) {
            cancellation = std::min(cancellation, std::sqrt(left / (left + last)));
        }
    }
    record_coefficients(removed, in_history, width_);

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
bool BlockLanczos::removes_much(const std::vector<double>& overlap, std::size_t in_history,
                                const std::vector<double>& self_gram) const {
    const double limit = history_.precision() == working_.precision ? kOnePass : std::sqrt(epsilon());
    for (std::int64_t j = 0; j < width_; ++j) {
        double square = 0.0;
        for (std::size_t i = static_cast<std::size_t>(j); i < in_history; i += static_cast<std::size_t>(width_)) {
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
void BlockLanczos::record_coefficients(const std::vector<double>& removed, std::size_t in_history, std::int64_t width) {
    const std::int64_t b = options_.block;
    const auto at = [&](std::int64_t row, std::int64_t column) {
        return removed[in_history + static_cast<std::size_t>(row * width + column)];
    };
    const std::int64_t here = current_row() - recent_rows().first;
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
    if (options_.reorthogonalization == Reorthogonalization::full && history_.precision() == working_.precision) {
        for (std::size_t i = 0; i < in_history; ++i) {
            recurrence_error_ = std::max(recurrence_error_, std::abs(removed[i]));
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

// Orthonormalizes the work rows in place, makes them the newest block (not after the last step), returns C_j.
SmallMatrix BlockLanczos::next_block(double tolerance, double cancellation, const std::vector<double>& self_gram) {
    const Panel w = working_.slice(work_row(), width_);
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

// The work rows become the newest block: where they are, or in the place of the older of the last two, which goes into
// the history.
void BlockLanczos::keep(std::int64_t width) {
    const std::int64_t b = options_.block;
    if (in_place_) {
        ++newest_;
    } else {
        const std::int64_t work = work_row();
        newest_ = 1 - newest_;
        if (recent_blocks_ == 2 && slots_ > 0) {
            history_.store(*kernels_, stored_ % slots_ * b, working_.slice(current_row(), b));
            ++stored_;
        }
        working_tile_.store(*kernels_, current_row(), working_.slice(work, width));
    }
    recent_blocks_ = 2;
    clear_rows(current_row() + width, b - width);
}

// Rows beyond a block's width may hold an older block: they must not take part in projections.
void BlockLanczos::clear_rows(std::int64_t first, std::int64_t count) const {
    if (count > 0) {
        const Panel nothing{nullptr, working_.precision, 0, working_.columns, working_.columns};
        kernels_->panel_combine(nullptr, nothing, working_.slice(first, count));
    }
}

double BlockLanczos::measure_orthogonality() {
    if (!started_ || failed_) {
        throw EngineError("BlockLanczos: there is no basis to measure");
    }
    const std::int64_t width = finished_ ? diagonal_.back().rows : width_;
    const Panel q = working_.slice(current_row(), width);
    const std::int64_t here = current_row() - recent_rows().first;
    std::vector<double> overlap;
    gram(recent_rows(), q, overlap);
    double largest = 0.0;
    for (std::int64_t i = 0; i < recent_rows().count; ++i) {
        for (std::int64_t j = 0; j < width; ++j) {
            const double expected = i == here + j ? 1.0 : 0.0;
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
