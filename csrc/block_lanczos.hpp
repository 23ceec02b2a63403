// Block Lanczos by reverse communication, written against the kernel contracts only.
//
//   H Q_j = C_{j-1}^T Q_{j-1} + A_j Q_j + C_j Q_{j+1}        (vectors are rows; Golub & Underwood 1977)
//
// The caller owns all panels: `basis` (slots * block, n) holds Q_0, Q_1, ... and `work` (block, n) takes the
// probes, then each product H Q_j. Usage:
//
//   fill work with the probes;  start();
//   while not finished:  work[0 : width] = H * current();  advance();
//
// Orthogonality. Each product is projected twice against the stored blocks (block classical Gram-Schmidt, "twice is
// enough", Giraud, Langou, Rozloznik, van den Eshof, Numer. Math. 101, 2005), the second projection fused with the
// first one's Gram matrix: three reads of the basis. When the new block comes out much weaker than the product it was
// taken from, one more sweep over the orthonormal block restores orthogonality.
//
// Breakdown and deflation. A direction whose remaining norm is at most breakdown_multiple * epsilon * scale is dropped
// from the block, scale being the largest norm of a row of any product so far, a lower bound of ||H||. No direction
// left: the Krylov space is invariant and the recurrence is finished.
#pragma once

#include <cstdint>
#include <vector>

#include "dispatch.hpp"

namespace hesd {

enum class Reorthogonalization {
    full,    // against all previous blocks; basis holds every step
    window,  // against the last blocks only, as many as the basis has slots
    none,    // the three-term recurrence: two slots
};

struct BlockLanczosOptions {
    Reorthogonalization reorthogonalization;
    std::int64_t block;
    std::int64_t max_steps;
    std::int64_t global_size;  // n over all shards
    double breakdown_multiple;
};

// Row-major float64.
struct SmallMatrix {
    std::int64_t rows = 0;
    std::int64_t columns = 0;
    std::vector<double> values;
};

class BlockLanczos {
   public:
    BlockLanczos(const Kernels& kernels, Panel basis, Panel work, BlockLanczosOptions options, Reduction reduction);

    // work (block, n) holds the probes Z; sets Q_0 and the factor Z = L_0 Q_0. Throws EngineError if all probes are
    // zero.
    void start();

    // Q_j, the rows to multiply; its rows are current().rows <= block.
    [[nodiscard]] Panel current() const;
    [[nodiscard]] std::int64_t current_row() const;

    // work[0 : current().rows] holds H Q_j; its contents are destroyed. One step of the recurrence.
    void advance();

    [[nodiscard]] bool finished() const { return finished_; }
    [[nodiscard]] bool invariant() const { return invariant_; }
    [[nodiscard]] std::int64_t steps() const { return static_cast<std::int64_t>(diagonal_.size()); }
    [[nodiscard]] const SmallMatrix& start_factor() const { return start_; }
    [[nodiscard]] const std::vector<SmallMatrix>& diagonal() const { return diagonal_; }
    [[nodiscard]] const std::vector<SmallMatrix>& offdiagonal() const { return offdiagonal_; }
    // Largest norm of a row of any product so far.
    [[nodiscard]] double scale() const { return scale_; }
    // Largest deviation of the projections from the recurrence (A_j symmetric, C_{j-1} repeated, zero before): the
    // noise and asymmetry of the operator, in the units of H.
    [[nodiscard]] double recurrence_error() const { return recurrence_error_; }
    [[nodiscard]] std::int64_t extra_sweeps() const { return extra_sweeps_; }

   private:
    [[nodiscard]] std::int64_t slot(std::int64_t step) const { return step % slots_; }
    [[nodiscard]] Panel stored() const;
    void record_coefficients(const std::vector<double>& projection, std::int64_t width);
    SmallMatrix next_block(double tolerance, double cancellation);

    const Kernels* kernels_;
    Panel basis_;
    Panel work_;
    BlockLanczosOptions options_;
    Reduction reduction_;
    std::int64_t slots_;
    std::int64_t step_ = 0;
    std::int64_t width_ = 0;  // rows of Q_j
    std::int64_t rank_ = 0;   // directions found so far
    bool started_ = false;
    bool finished_ = false;
    bool invariant_ = false;
    bool failed_ = false;  // set while a step runs: one that ends by an exception leaves it set
    double scale_ = 0.0;
    double recurrence_error_ = 0.0;
    std::int64_t extra_sweeps_ = 0;
    SmallMatrix start_;
    std::vector<SmallMatrix> diagonal_;
    std::vector<SmallMatrix> offdiagonal_;
};

}  // namespace hesd
