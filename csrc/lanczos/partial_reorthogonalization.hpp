// Partial reorthogonalization: a basis that stays orthogonal to the square root of epsilon leaves the coefficients
// right to epsilon (Simon, Linear Algebra Appl. 61, 1984).
//
// The overlaps are estimated (orthogonality_estimate.hpp). When the largest passes sqrt(epsilon), the new block and the
// one after it are swept once against the blocks whose estimates have passed epsilon^(3/4).
#pragma once

#include <cstdint>
#include <vector>

#include "lanczos/block_gram_schmidt.hpp"
#include "lanczos/krylov_basis.hpp"
#include "lanczos/orthogonality_estimate.hpp"

namespace hesd {

class PartialReorthogonalization {
   public:
    PartialReorthogonalization(const KrylovBasis& basis, std::int64_t global_size);

    // The basis is one block of `width` rows.
    void start(std::int64_t width) { estimate_.start(width); }

    // The estimate moves on to the block that `next` = C_j belongs to, j = steps so far; `noise` is the size of an
    // error of the recurrence.
    void advance(const std::vector<SmallMatrix>& diagonal, const std::vector<SmallMatrix>& offdiagonal,
                 const SmallMatrix& next, double noise) {
        estimate_.advance(diagonal, offdiagonal, next, noise, fresh_);
    }

    // That block was swept against the whole history.
    void swept_by_all(BlockRange history);

    // Sweeps it where the estimate says so: rows of `w`, of which W = next * rows; returns next for the rows as they
    // are then.
    SmallMatrix sweep_where_needed(const Panel& w, SmallMatrix next, const KrylovBasis& basis,
                                   BlockGramSchmidt& gram_schmidt);

    // How often the estimate said so.
    [[nodiscard]] std::int64_t sweeps() const { return sweeps_; }
    // Estimated largest overlap of the newest block with older ones after its sweeps.
    [[nodiscard]] double estimated_overlap() const { return estimate_.largest(); }

   private:
    [[nodiscard]] bool is_needed(std::int64_t blocks) const;
    [[nodiscard]] std::vector<BlockRange> ranges_to_sweep(std::int64_t blocks) const;

    double epsilon_;
    double fresh_;  // overlap with a block that was just projected out
    std::int64_t sweeps_ = 0;
    OrthogonalityEstimate estimate_;
    std::vector<BlockRange> pending_;  // swept in the last step, to be swept in the next one too
};

}  // namespace hesd
