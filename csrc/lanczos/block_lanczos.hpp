// Block Lanczos by reverse communication, written against the kernel contracts only.
//
//   H Q_j = C_{j-1}^T Q_{j-1} + A_j Q_j + C_j Q_{j+1}        (vectors are rows; Golub & Underwood 1977)
//
// The caller owns both panels, see krylov_basis.hpp. Usage:
//
//   fill the b rows at work_row() with the probes;  start();
//   while not finished:  working[work_row() : + width] = H * current();  advance();
//
// Orthogonality. Each product is projected as block_gram_schmidt.hpp says. When the new block comes out much weaker
// than the product it was taken from, one more sweep of the orthonormal block against all stored ones restores
// orthogonality. partial_reorthogonalization.hpp is cheaper: most steps look at the last two blocks alone.
//
// Breakdown and deflation. A direction whose remaining norm is at most breakdown_multiple * epsilon * scale is dropped
// from the block, scale being the largest norm of a row of any product so far, a lower bound of ||H||. No direction
// left: the Krylov space is invariant and the recurrence is finished.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "kernels/kernels.hpp"
#include "lanczos/block_gram_schmidt.hpp"
#include "lanczos/krylov_basis.hpp"
#include "lanczos/lanczos_options.hpp"
#include "lanczos/partial_reorthogonalization.hpp"
#include "small/small_matrix.hpp"

namespace hesd {

class BlockLanczos {
   public:
    BlockLanczos(const Kernels& kernels, BasisPanel history, Panel working, BlockLanczosOptions options,
                 Reduction reduction);

    // The rows at work_row() hold the probes Z; sets Q_0 and the factor Z = L_0 Q_0. Throws EngineError if all probes
    // are zero.
    void start();

    // First row in `working` of Q_j, the rows to multiply, and how many they are, at most a block.
    [[nodiscard]] std::int64_t current_row() const { return basis_.newest_row(); }
    [[nodiscard]] std::int64_t current_width() const { return width_; }
    // First row in `working` of what is at work: probes, then products.
    [[nodiscard]] std::int64_t work_row() const { return basis_.work_row(); }

    // The current_width() rows at work_row() hold H Q_j, and are overwritten. One step of the recurrence.
    void advance();

    [[nodiscard]] bool invariant() const { return started_ && width_ == 0; }
    [[nodiscard]] bool finished() const { return invariant() || completed_steps() == options_.max_steps; }
    [[nodiscard]] std::int64_t steps() const { return static_cast<std::int64_t>(diagonal_.size()); }
    [[nodiscard]] const SmallMatrix& start_factor() const { return start_; }
    [[nodiscard]] const std::vector<SmallMatrix>& diagonal() const { return diagonal_; }
    [[nodiscard]] const std::vector<SmallMatrix>& offdiagonal() const { return offdiagonal_; }
    // Largest norm of a row of any product so far.
    [[nodiscard]] double scale() const { return gram_schmidt_.scale(); }
    // Largest deviation of the projections from the recurrence (A_j symmetric, C_{j-1} repeated, zero before): the
    // noise and asymmetry of the operator, in the units of H.
    [[nodiscard]] double recurrence_error() const { return recurrence_error_; }
    // Sweeps of weak blocks against everything stored.
    [[nodiscard]] std::int64_t extra_sweeps() const { return extra_sweeps_; }
    // Sweeps that partial reorthogonalization asked for.
    [[nodiscard]] std::int64_t partial_sweeps() const { return partial_ ? partial_->sweeps() : 0; }
    // How many stored vectors projections have read, each reading counted.
    [[nodiscard]] std::int64_t vectors_read() const { return gram_schmidt_.vectors_read(); }
    // Estimated largest overlap of the newest block with older ones after its sweeps; partial mode only.
    [[nodiscard]] double estimated_overlap() const { return partial_ ? partial_->estimated_overlap() : 0.0; }
    // Largest entry of Q Q_j^T - I over all stored blocks, for the last block multiplied: one read of the history.
    [[nodiscard]] double measure_orthogonality();

   private:
    [[nodiscard]] std::int64_t completed_steps() const { return static_cast<std::int64_t>(offdiagonal_.size()); }
    [[nodiscard]] double noise() const;
    void require_options(const Reduction& reduction) const;
    void require_ready() const;
    void record_diagonal_block(const SmallMatrix& removed);
    void compare_with_recurrence(const SmallMatrix& removed);

    BlockLanczosOptions options_;
    KrylovBasis basis_;
    BlockGramSchmidt gram_schmidt_;
    std::optional<PartialReorthogonalization> partial_;
    std::int64_t width_ = 0;  // rows of Q_j
    std::int64_t rank_ = 0;   // directions found so far
    bool started_ = false;
    bool failed_ = false;  // set while a step runs: one that ends by an exception leaves it set
    double recurrence_error_ = 0.0;
    std::int64_t extra_sweeps_ = 0;
    SmallMatrix start_;
    std::vector<SmallMatrix> diagonal_;
    std::vector<SmallMatrix> offdiagonal_;
};

}  // namespace hesd
