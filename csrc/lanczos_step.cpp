#include "lanczos_step.hpp"

namespace hesd {

void lanczos_task(LanczosTask task, const LanczosStep& step) { team_work::do_task(Alone{}, task, step); }

void orthonormalize_begin(const Orthonormalization& state, double tolerance, std::int64_t max_rank) {
    team_work::begin_orthonormalization(Alone{}, state, tolerance, max_rank);
}

void orthonormalize_next(const Orthonormalization& state) {
    team_work::next_transform(Alone{}, state, Transforms::separate);
}

void orthonormalize_require(const OrthonormalizeFacts& facts) {
    if (facts.stage == OrthonormalizeStage::not_finite) {
        throw NumericalError("panel_orthonormalize: W has non-finite values (its Gram matrix is not finite)");
    }
    if (facts.stage == OrthonormalizeStage::no_convergence) {
        throw NumericalError("panel_orthonormalize: no convergence in " + std::to_string(facts.rounds) +
                             " rounds; the vectors may be too small or too large to square in float64. Rescale them");
    }
}

void add(double* target, const double* source, std::int64_t count) {
    for (std::int64_t i = 0; i < count; ++i) {
        target[i] += source[i];
    }
}

}  // namespace hesd
