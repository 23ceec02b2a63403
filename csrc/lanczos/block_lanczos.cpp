#include "lanczos/block_lanczos.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
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

// Up to its rank, the columns of a factor (rows, rows).
SmallMatrix leading_columns(const double* values, std::int64_t rows, std::int64_t columns) {
    SmallMatrix matrix(rows, columns);
    for (std::int64_t i = 0; i < rows; ++i) {
        std::copy_n(values + i * rows, columns, matrix.values.data() + i * columns);
    }
    return matrix;
}

static_assert(sizeof(StepFacts) % sizeof(double) == 0, "facts lie among numbers");
constexpr std::int64_t kFacts = sizeof(StepFacts) / sizeof(double);

}  // namespace

BlockLanczos::BlockLanczos(const Kernels& kernels, BasisPanel history, Panel working, BlockLanczosOptions options,
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
    if (!kernels.on_device()) {
        memory_.resize(static_cast<std::size_t>(matrix_bytes(most_overlaps(), options.block) / 8));
    }
}

std::int64_t BlockLanczos::matrix_bytes(std::int64_t rows, std::int64_t block) {
    return 8 * (orthonormalization_numbers(block) + kFacts + 4 * rows * block + block * block);
}

LanczosStep BlockLanczos::matrices(std::int64_t history, std::int64_t recent, std::int64_t width) {
    const std::int64_t overlaps = most_overlaps() * options_.block;
    const std::int64_t square = options_.block * options_.block;
    double* memory = memory_.data();
    if (kernels_->on_device()) {
        const Execution& execution = current_execution();
        if (execution.matrix_bytes < matrix_bytes(most_overlaps(), options_.block)) {
            throw EngineError("BlockLanczos: " + std::to_string(execution.matrix_bytes) +
                              " bytes are too few for its small matrices");
        }
        memory = static_cast<double*>(execution.matrices);
    }
    LanczosStep step{};
    step.history = history;
    step.recent = recent;
    step.width = width;
    step.in_float32 = working_.precision == Precision::float32;
    step.limit = history_.precision() == working_.precision ? kOnePass : std::sqrt(epsilon());
    step.scale = scale_;
    step.max_rank = width;
    // What the host looks at follows each other: the facts, the factor and what was removed.
    step.orthonormalization = orthonormalization_in(memory, options_.block, width);
    step.facts = reinterpret_cast<StepFacts*>(step.orthonormalization.factor + square);
    step.removed = reinterpret_cast<double*>(step.facts + 1);
    step.overlap = step.removed + overlaps;
    step.next = step.overlap + overlaps;
    part_ = step.next + overlaps;
    return step;
}

// Waits for what was put to work so far.
BlockLanczos::Found BlockLanczos::look(const LanczosStep& step) {
    const Orthonormalization& block = step.orthonormalization;
    const auto* first = reinterpret_cast<const double*>(block.facts);
    const double* here = first;
    if (kernels_->on_device()) {
        const std::int64_t count = step.removed + (step.history + step.recent) * step.width - first;
        found_.resize(static_cast<std::size_t>(count));
        download(*kernels_, found_.data(), first, count);
        here = found_.data();
    }
    const auto place = [&](const void* there) { return here + (static_cast<const double*>(there) - first); };
    Found found{};
    std::memcpy(&found.block, place(block.facts), sizeof found.block);
    std::memcpy(&found.facts, place(step.facts), sizeof found.facts);
    found.factor = place(block.factor);
    found.removed = place(step.removed);
    return found;
}

// Orthonormalizes w, whose Gram matrix and tolerance are set, into out.
BlockLanczos::Found BlockLanczos::orthonormalized(const Panel& w, const Panel& out, const LanczosStep& step) {
    Found found{};
    bool first = true;
    do {
        kernels_->panel_orthonormalize(w, out, step.orthonormalization, first, reduction_);
        found = look(step);
        first = false;
    } while (found.block.stage == OrthonormalizeStage::more);
    if (found.block.stage == OrthonormalizeStage::not_finite) {
        throw NumericalError("BlockLanczos: the panel `working` has non-finite values after the product");
    }
    orthonormalize_require(found.block);
    return found;
}

// Does something where the flag is set, which lies where the kernels work. The host does not look at it if it need not.
// Returns how many vectors are read if it is done.
template <typename Body>
std::int64_t BlockLanczos::when(const int* flag, Body body) {
    const std::int64_t before = vectors_read_;
    // A basis that comes from far should not come in vain; shards sum on the host.
    const bool looks = !kernels_->on_device() || history_.far() || reduction_.sum != nullptr;
    int set = 1;
    if (looks) {
        download(*kernels_, &set, flag, 1);
    }
    if (set != 0) {
        const ConditionScope scope(looks ? nullptr : flag);
        body();
    }
    const std::int64_t read = vectors_read_ - before;
    vectors_read_ = before;
    return read;
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

// Gram matrices go to where the kernels work.
void BlockLanczos::gram(Rows v, const Panel& w, double* out) {
    v.panel->gram(*kernels_, v.first, v.count, w, out, part_);
    reduce(kernels_->device, reduction_, out, v.count * w.rows);
    vectors_read_ += v.count;
}

void BlockLanczos::project(const Panel& w, Rows v, std::int64_t idle, const double* c, double* gram,
                           double* self_gram) {
    v.panel->project(*kernels_, v.first, v.count, w, idle, c, gram, self_gram, part_);
    if (gram != nullptr) {
        reduce(kernels_->device, reduction_, gram, v.count * w.rows);
    }
    if (self_gram != nullptr) {
        reduce(kernels_->device, reduction_, self_gram, w.rows * w.rows);
    }
    vectors_read_ += v.count;
}

// W <- W - C^T R for the last two blocks R, then B W^T for the whole basis; in place it is one read of it.
void BlockLanczos::project_recent(const Panel& w, const Basis& basis, const LanczosStep& step) {
    const std::int64_t middle = basis.history.count * w.rows;
    if (in_place_) {
        project(w, basis.whole(), basis.history.count, step.overlap + middle, step.next, step.orthonormalization.gram);
        return;
    }
    project(w, basis.recent, 0, step.overlap + middle, step.next + middle, step.orthonormalization.gram);
    gram(basis.history, w, step.next);
}

// W <- W - C^T B for the whole basis; where asked for, B W^T from the same read of B.
void BlockLanczos::project_whole(const Panel& w, const Basis& basis, const LanczosStep& step, bool with_gram) {
    double* next = with_gram ? step.next : nullptr;
    double* self_gram = step.orthonormalization.gram;
    if (in_place_) {
        project(w, basis.whole(), 0, step.overlap, next, self_gram);
        return;
    }
    const std::int64_t middle = basis.history.count * w.rows;
    if (basis.history.count > 0) {
        project(w, basis.history, 0, step.overlap, next, nullptr);
    }
    // Last, since older blocks that are not quite orthogonal to the last two bring parts of them back.
    project(w, basis.recent, 0, step.overlap + middle, nullptr, self_gram);
    if (with_gram) {
        gram(basis.recent, w, next + middle);
    }
}

void BlockLanczos::start() {
    if (started_ || failed_) {
        throw EngineError("BlockLanczos: start() was called twice");
    }
    failed_ = true;
    const std::int64_t b = options_.block;
    LanczosStep step = matrices(0, 0, b);
    step.tolerance = options_.breakdown_multiple * epsilon();
    step.max_rank = options_.global_size;
    const Panel probes = working_.slice(work_row(), b);
    kernels_->panel_gram(probes, probes, step.orthonormalization.gram);
    reduce(kernels_->device, reduction_, step.orthonormalization.gram, b * b);
    kernels_->lanczos_task(StepTask::begin_probes, step);
    const Found found = orthonormalized(probes, working_.slice(0, b), step);
    if (found.block.rank == 0) {
        throw NumericalError("BlockLanczos: all probes are zero");
    }
    start_ = leading_columns(found.factor, b, found.block.rank);
    width_ = found.block.rank;
    clear_rows(width_, b - width_);
    rank_ = width_;
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
    LanczosStep step = matrices(basis.history.count, basis.recent.count, width_);
    step.tolerance = options_.breakdown_multiple * epsilon();
    step.max_rank = keeps_all() ? options_.global_size - rank_ : width_;

    // All of this is put to work before the host looks at what came out.
    // The last two blocks R carry nearly all that is taken out:
    // S = R W^T                                         reads R and W once
    gram(basis.recent, w, step.overlap + basis.history.count * width_);
    kernels_->lanczos_task(StepTask::take_recent_coefficients, step);
    // W <- W - S^T R,  S = B W^T                        B is V and R; reads B once, reads and writes W once
    vectors_read_ += when(&step.facts->finite, [&] { project_recent(w, basis, step); });
    kernels_->lanczos_task(StepTask::decide_second_projection, step);
    // W <- W - S^T B                                    reads B once, reads and writes W once
    const std::int64_t once = when(&step.facts->project_once, [&] { project_whole(w, basis, step, false); });
    const std::int64_t twice = when(&step.facts->project_twice, [&] {
        // S = B W^T from the same read of B, then W <- W - S^T B      reads B once more
        project_whole(w, basis, step, true);
        kernels_->lanczos_task(StepTask::accumulate_second, step);
    });
    const std::int64_t again = when(&step.facts->project_twice, [&] { project_whole(w, basis, step, false); });
    kernels_->lanczos_task(StepTask::begin_product, step);
    Found found = orthonormalized(w, w, step);
    vectors_read_ += (found.facts.project_once != 0 ? once : 0) + (found.facts.project_twice != 0 ? twice + again : 0);
    scale_ = found.facts.scale;
    record_coefficients(found.removed, basis.history.count * width_, width_);
    offdiagonal_.push_back(next_block(w, found));
    ++step_;
    width_ = offdiagonal_.back().columns;
    rank_ += width_;
    invariant_ = width_ == 0;
    finished_ = invariant_ || step_ == options_.max_steps;
    failed_ = false;
}

// A_j is the symmetric part of its projection; the rest of the projection ought to repeat C_{j-1} and be zero before.
void BlockLanczos::record_coefficients(const double* removed, std::int64_t in_history, std::int64_t width) {
    const std::int64_t b = options_.block;
    const auto at = [&](std::int64_t row, std::int64_t column) { return removed[in_history + row * width + column]; };
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
        for (std::int64_t i = 0; i < in_history; ++i) {
            recurrence_error_ = std::max(recurrence_error_, std::abs(removed[i]));
        }
    }
}

// Q <- Q - (V Q^T)^T V for the blocks asked for, then orthonormal again; returns the factor of the old rows in the new.
SmallMatrix BlockLanczos::sweep(const Panel& q, const std::vector<Range>& ranges) {
    StepTask task = StepTask::record_overlap;
    const auto take_out = [&](Rows rows) {
        const LanczosStep part = matrices(rows.count, 0, q.rows);
        gram(rows, q, part.overlap);
        kernels_->lanczos_task(task, part);
        task = StepTask::record_larger_overlap;
        project(q, rows, 0, part.overlap, nullptr, nullptr);
    };
    for (const Range range : ranges) {
        if (range.first < range.last) {
            take_out(history_rows(range));
        }
    }
    // Last, since older blocks that are not quite orthogonal to the last two bring parts of them back.
    take_out(recent_rows());
    LanczosStep step = matrices(0, 0, q.rows);
    step.tolerance = kInSpan;
    kernels_->panel_gram(q, q, step.orthonormalization.gram);
    reduce(kernels_->device, reduction_, step.orthonormalization.gram, q.rows * q.rows);
    kernels_->lanczos_task(StepTask::begin_rows, step);
    const Found found = orthonormalized(q, q, step);
    swept_overlap_ = found.facts.swept_overlap;
    return leading_columns(found.factor, q.rows, found.block.rank);
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

// Sweeps the orthonormalized work rows where they need it, makes them the newest block (not after the last step),
// returns C_j.
SmallMatrix BlockLanczos::next_block(const Panel& w, const Found& found) {
    const std::int64_t rank = found.block.rank;
    SmallMatrix c = leading_columns(found.factor, width_, rank);
    double strongest = 0.0;
    for (std::int64_t i = 0; i < width_; ++i) {
        double square = 0.0;
        for (std::int64_t j = 0; j < rank; ++j) {
            square += c.at(i, j) * c.at(i, j);
        }
        strongest = std::max(strongest, std::sqrt(square));
    }

    const bool partial = options_.reorthogonalization == Reorthogonalization::partial;
    const std::int64_t blocks = history_blocks();
    const bool weak = found.block.weakest < kWeakBlock * strongest || found.facts.cancellation < 0.5;
    if (rank > 0 && weak) {
        c = product(c, sweep(w.slice(0, rank), {{0, blocks}}));
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
    double largest = 0.0;
    const auto note = [&](Rows rows, std::int64_t own) {
        const LanczosStep step = matrices(rows.count, 0, width);
        gram(rows, q, step.overlap);
        std::vector<double> overlap(static_cast<std::size_t>(rows.count * width));
        download(*kernels_, overlap.data(), step.overlap, rows.count * width);
        for (std::int64_t i = 0; i < rows.count; ++i) {
            for (std::int64_t j = 0; j < width; ++j) {
                const double expected = i == own + j ? 1.0 : 0.0;
                largest = std::max(largest, std::abs(overlap[static_cast<std::size_t>(i * width + j)] - expected));
            }
        }
    };
    note(recent_rows(), here);
    note(history_rows({0, history_blocks()}), -width);
    return largest;
}

}  // namespace hesd
