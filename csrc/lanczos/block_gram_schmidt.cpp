#include "lanczos/block_gram_schmidt.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <string>
#include <utility>

#include "kernels/execution.hpp"
#include "small/pivoted_cholesky_qr.hpp"

namespace hesd {
namespace {

// One projection against the history is enough for a row that keeps all but this part of its norm.
constexpr double kOnePass = 1.0 / 64.0;
// In a sweep a unit vector that loses more than this lay in the span of the basis: it was rounding noise.
constexpr double kInSpan = 0.1;

static_assert(sizeof(StepFacts) % sizeof(double) == 0, "facts lie among numbers");
constexpr std::int64_t kFacts = sizeof(StepFacts) / sizeof(double);

// The first `columns` columns of a matrix (rows, width).
SmallMatrix leading_columns(const double* values, std::int64_t rows, std::int64_t width, std::int64_t columns) {
    SmallMatrix matrix(rows, columns);
    for (std::int64_t i = 0; i < rows; ++i) {
        std::copy_n(values + i * width, columns, matrix.values.data() + i * columns);
    }
    return matrix;
}

}  // namespace

BlockGramSchmidt::BlockGramSchmidt(const Kernels& kernels, Reduction reduction, const KrylovBasis& basis,
                                   const BlockLanczosOptions& options)
    : kernels_(&kernels),
      reduction_(reduction),
      block_(options.block),
      most_rows_(basis.most_rows()),
      tolerance_(options.breakdown_multiple * machine_epsilon(basis.precision())),
      limit_(basis.history_rounding() == 0.0 ? kOnePass : std::sqrt(machine_epsilon(basis.precision()))),
      in_float32_(basis.precision() == Precision::float32),
      // A basis in the host's memory is not copied where it will not be read; shards sum on the host.
      host_decides_(!kernels.on_device() || basis.history_in_host_memory() || reduction.sum != nullptr) {
    if (!kernels.on_device()) {
        memory_.resize(static_cast<std::size_t>(matrix_bytes(most_rows_, block_) / 8));
    }
}

std::int64_t BlockGramSchmidt::matrix_bytes(std::int64_t rows, std::int64_t block) {
    return 8 * (orthonormalization_numbers(block) + kFacts + 4 * rows * block + block * block);
}

double* BlockGramSchmidt::memory() {
    if (!kernels_->on_device()) {
        return memory_.data();
    }
    const Execution& execution = current_execution();
    if (execution.matrix_bytes < matrix_bytes(most_rows_, block_)) {
        throw EngineError("BlockLanczos: " + std::to_string(execution.matrix_bytes) +
                          " bytes are too few for its small matrices");
    }
    return static_cast<double*>(execution.matrices);
}

// Room for the sums of one tile, behind the matrices of a step.
double* BlockGramSchmidt::tile_sums() {
    return memory() + orthonormalization_numbers(block_) + kFacts + 3 * most_rows_ * block_;
}

LanczosStep BlockGramSchmidt::new_step(std::int64_t history, std::int64_t recent, std::int64_t width) {
    LanczosStep step{};
    step.history = history;
    step.recent = recent;
    step.width = width;
    step.in_float32 = in_float32_;
    step.limit = limit_;
    step.tolerance = tolerance_;
    step.scale = scale_;
    step.max_rank = width;
    // What the host reads follows each other: the facts, the factor and what was removed.
    step.orthonormalization = orthonormalization_in(memory(), block_, width);
    step.facts = reinterpret_cast<StepFacts*>(step.orthonormalization.factor + block_ * block_);
    step.removed = reinterpret_cast<double*>(step.facts + 1);
    step.overlap = step.removed + most_rows_ * block_;
    step.next = step.overlap + most_rows_ * block_;
    return step;
}

// Waits for what was put to work so far.
StepStatus BlockGramSchmidt::read_status(const LanczosStep& step) {
    const Orthonormalization& block = step.orthonormalization;
    const std::int64_t rows = step.history + step.recent;
    const auto* first = reinterpret_cast<const double*>(block.facts);
    const double* here = first;
    if (kernels_->on_device()) {
        status_copy_.resize(static_cast<std::size_t>(step.removed + rows * step.width - first));
        download(*kernels_, status_copy_.data(), first, static_cast<std::int64_t>(status_copy_.size()));
        here = status_copy_.data();
    }
    const auto place = [&](const void* there) { return here + (static_cast<const double*>(there) - first); };
    StepStatus status{};
    std::memcpy(&status.block, place(block.facts), sizeof status.block);
    std::memcpy(&status.facts, place(step.facts), sizeof status.facts);
    status.factor = leading_columns(place(block.factor), step.width, step.width, status.block.rank);
    status.removed = leading_columns(place(step.removed), rows, step.width, step.width);
    return status;
}

// Does something where a flag is set, which lies where the kernels work. The host reads it only where it has to.
// Returns how many vectors are read if it is done.
template <typename Body>
std::int64_t BlockGramSchmidt::run_if(const int* flag, Body body) {
    const std::int64_t before = vectors_read_;
    int set = 1;
    if (host_decides_) {
        download(*kernels_, &set, flag, 1);
    }
    if (set != 0) {
        const ConditionScope scope(host_decides_ ? nullptr : flag);
        body();
    }
    const std::int64_t read = vectors_read_ - before;
    vectors_read_ = before;
    return read;
}

void BlockGramSchmidt::self_gram(const Panel& w, const LanczosStep& step) {
    kernels_->panel_gram(w, w, step.orthonormalization.gram);
    reduce(kernels_->device, reduction_, step.orthonormalization.gram, w.rows * w.rows);
}

// Gram matrices go to where the kernels work.
void BlockGramSchmidt::gram(const BasisRows& v, const Panel& w, double* out) {
    v.gram(w, out, tile_sums());
    reduce(kernels_->device, reduction_, out, v.count * w.rows);
    vectors_read_ += v.count;
}

void BlockGramSchmidt::project_rows(const Panel& w, const BasisRows& v, std::int64_t gram_only, const double* c,
                                    double* gram, double* self_gram) {
    v.project(w, gram_only, c, gram, self_gram, tile_sums());
    if (gram != nullptr) {
        reduce(kernels_->device, reduction_, gram, v.count * w.rows);
    }
    if (self_gram != nullptr) {
        reduce(kernels_->device, reduction_, self_gram, w.rows * w.rows);
    }
    vectors_read_ += v.count;
}

// W <- W - C^T R for the last two blocks R, then B W^T for the whole basis; where they are adjacent it is one read.
void BlockGramSchmidt::project_recent(const Panel& w, const ProjectionBasis& basis, const LanczosStep& step) {
    const std::int64_t middle = basis.history.count * w.rows;
    double* self_gram = step.orthonormalization.gram;
    if (basis.adjacent()) {
        project_rows(w, basis.whole(), basis.history.count, step.overlap + middle, step.next, self_gram);
        return;
    }
    project_rows(w, basis.recent, 0, step.overlap + middle, step.next + middle, self_gram);
    gram(basis.history, w, step.next);
}

// W <- W - C^T B for the whole basis, and B W^T into `next` from the same read of B, unless null.
void BlockGramSchmidt::project_whole(const Panel& w, const ProjectionBasis& basis, const LanczosStep& step,
                                     double* next) {
    double* self_gram = step.orthonormalization.gram;
    if (basis.adjacent()) {
        project_rows(w, basis.whole(), 0, step.overlap, next, self_gram);
        return;
    }
    const std::int64_t middle = basis.history.count * w.rows;
    if (basis.history.count > 0) {
        project_rows(w, basis.history, 0, step.overlap, next, nullptr);
    }
    // Last, since older blocks that are not quite orthogonal to the last two bring parts of them back.
    project_rows(w, basis.recent, 0, step.overlap + middle, nullptr, self_gram);
    if (next != nullptr) {
        gram(basis.recent, w, next + middle);
    }
}

// B is V, older blocks, and R, the last two, which carry nearly all that is taken out.
Projection BlockGramSchmidt::project(const Panel& w, const ProjectionBasis& basis) {
    const LanczosStep step = new_step(basis.history.count, basis.recent.count, w.rows);
    const auto task = [&](StepTask which) { kernels_->lanczos_task(which, step); };
    // S = R W^T                                         reads R and W once
    gram(basis.recent, w, step.overlap + basis.history.count * w.rows);
    task(StepTask::take_recent_coefficients);
    // W <- W - S^T R,  S = B W^T                        reads B once, reads and writes W once
    vectors_read_ += run_if(&step.facts->finite, [&] { project_recent(w, basis, step); });
    task(StepTask::decide_second_projection);
    // W <- W - S^T B                                    reads B once, reads and writes W once
    const std::int64_t once = run_if(&step.facts->project_once, [&] { project_whole(w, basis, step, nullptr); });
    // S = B W^T from the same read of B, then W <- W - S^T B      reads B once more
    std::int64_t twice = run_if(&step.facts->project_twice, [&] {
        project_whole(w, basis, step, step.next);
        task(StepTask::accumulate_second);
    });
    twice += run_if(&step.facts->project_twice, [&] { project_whole(w, basis, step, nullptr); });
    return {step, once, twice};
}

// W, whose Gram matrix and tolerance are set, into `out`.
StepStatus BlockGramSchmidt::orthonormalize(const Panel& w, const Panel& out, const LanczosStep& step) {
    StepStatus status{};
    hesd::orthonormalize(*kernels_, w, out, step.orthonormalization, reduction_, [&] {
        status = read_status(step);
        return status.block;
    });
    if (status.block.stage == OrthonormalizeStage::not_finite) {
        throw NumericalError("BlockLanczos: the panel `working` has non-finite values after the product");
    }
    orthonormalize_require(status.block);
    return status;
}

StepStatus BlockGramSchmidt::orthonormalize_product(const Panel& w, const Projection& projection,
                                                    std::int64_t max_rank) {
    LanczosStep step = projection.step;
    step.max_rank = max_rank;
    kernels_->lanczos_task(StepTask::begin_product, step);
    StepStatus status = orthonormalize(w, w, step);
    vectors_read_ += (status.facts.project_once != 0 ? projection.read_once : 0) +
                     (status.facts.project_twice != 0 ? projection.read_twice : 0);
    scale_ = status.facts.scale;
    return status;
}

StepStatus BlockGramSchmidt::orthonormalize_probes(const Panel& w, const Panel& out, std::int64_t max_rank) {
    LanczosStep step = new_step(0, 0, w.rows);
    step.max_rank = max_rank;
    self_gram(w, step);
    kernels_->lanczos_task(StepTask::begin_probes, step);
    return orthonormalize(w, out, step);
}

Sweep BlockGramSchmidt::sweep(const Panel& q, const KrylovBasis& basis, const std::vector<BlockRange>& ranges) {
    StepTask task = StepTask::record_overlap;
    const auto take_out = [&](const BasisRows& rows) {
        const LanczosStep step = new_step(rows.count, 0, q.rows);
        gram(rows, q, step.overlap);
        kernels_->lanczos_task(task, step);
        task = StepTask::record_larger_overlap;
        project_rows(q, rows, 0, step.overlap, nullptr, nullptr);
    };
    for (const BlockRange range : ranges) {
        if (range.first < range.last) {
            take_out(basis.history(range));
        }
    }
    // Last, since older blocks that are not quite orthogonal to the last two bring parts of them back.
    take_out(basis.recent());
    LanczosStep step = new_step(0, 0, q.rows);
    step.tolerance = kInSpan;
    self_gram(q, step);
    kernels_->lanczos_task(StepTask::begin_rows, step);
    StepStatus status = orthonormalize(q, q, step);
    return {std::move(status.factor), status.facts.swept_overlap};
}

SmallMatrix BlockGramSchmidt::overlaps(const BasisRows& v, const Panel& q) {
    const LanczosStep step = new_step(v.count, 0, q.rows);
    gram(v, q, step.overlap);
    SmallMatrix result(v.count, q.rows);
    download(*kernels_, result.values.data(), step.overlap, v.count * q.rows);
    return result;
}

}  // namespace hesd
