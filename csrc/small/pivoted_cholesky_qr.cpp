#include "small/pivoted_cholesky_qr.hpp"

#include <string>

namespace hesd {

void orthonormalize_begin(const Orthonormalization& state, double tolerance, std::int64_t max_rank) {
    team_work::begin_orthonormalization(SingleThread{}, state, tolerance, max_rank);
}

void orthonormalize_next(const Orthonormalization& state) {
    team_work::next_transform(SingleThread{}, state, Transforms::separate);
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

}  // namespace hesd
