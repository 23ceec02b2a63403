// Block Gram-Schmidt against a stored basis, where the kernels work.
//
// Each product is projected twice against the last two blocks, and against the history once or, where that takes much
// out, twice (block classical Gram-Schmidt; "twice is enough", Giraud, Langou, Rozloznik, van den Eshof, Numer. Math.
// 101, 2005; once is where little is removed, Daniel, Gragg, Kaufman, Stewart, Math. Comp. 30, 1976). The second
// projection is fused with the first one's Gram matrix, so the history is read twice or three times.
//
// project() and the first orthonormalization after it are put to work together: the host waits once, for their status.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels/kernels.hpp"
#include "lanczos/krylov_basis.hpp"
#include "small/small_matrix.hpp"

namespace hesd {

// A projection that was put to work, for the orthonormalization that follows it.
struct Projection {
    LanczosStep step;
    // How many stored vectors the last part of it reads, by what it comes to.
    std::int64_t read_once;
    std::int64_t read_twice;
};

// What the host has read of a step.
struct StepStatus {
    StepFacts facts;
    OrthonormalizeFacts block;
    SmallMatrix factor;   // old rows = factor * new rows
    SmallMatrix removed;  // what was projected out, by row of the basis
};

struct Sweep {
    SmallMatrix factor;      // old rows = factor * new rows
    double largest_overlap;  // that was taken out
};

class BlockGramSchmidt {
   public:
    BlockGramSchmidt(const Kernels& kernels, Reduction reduction, const KrylovBasis& basis,
                     const BlockLanczosOptions& options);

    // Bytes of the small matrices that these take where the kernels work, for overlaps of up to `rows` rows; for
    // kernels on a device in Execution::matrices, in each of the calls below.
    [[nodiscard]] static std::int64_t matrix_bytes(std::int64_t rows, std::int64_t block);

    // W <- W - B^T (B W^T), twice where that takes much out. Does not wait.
    Projection project(const Panel& w, const ProjectionBasis& basis);

    // Projected W = C Q, with at most max_rank directions: W <- Q.
    StepStatus orthonormalize_product(const Panel& w, const Projection& projection, std::int64_t max_rank);

    // The same for probes, which nothing was taken out of; Q goes to `out`.
    StepStatus orthonormalize_probes(const Panel& w, const Panel& out, std::int64_t max_rank);

    // Q <- Q - (V Q^T)^T V for the ranges of the history and then the last two blocks, then orthonormal again.
    Sweep sweep(const Panel& q, const KrylovBasis& basis, const std::vector<BlockRange>& ranges);

    // V Q^T, in the host's memory.
    SmallMatrix overlaps(const BasisRows& v, const Panel& q);

    // Largest norm of a row of any product so far.
    [[nodiscard]] double scale() const { return scale_; }
    // How many stored vectors projections have read, each reading counted.
    [[nodiscard]] std::int64_t vectors_read() const { return vectors_read_; }

   private:
    [[nodiscard]] double* memory();
    [[nodiscard]] double* tile_sums();
    LanczosStep new_step(std::int64_t history, std::int64_t recent, std::int64_t width);
    StepStatus read_status(const LanczosStep& step);
    template <typename Body>
    std::int64_t run_if(const int* flag, Body body);
    void self_gram(const Panel& w, const LanczosStep& step);
    void gram(const BasisRows& v, const Panel& w, double* out);
    void project_rows(const Panel& w, const BasisRows& v, std::int64_t gram_only, const double* c, double* gram,
                      double* self_gram);
    void project_recent(const Panel& w, const ProjectionBasis& basis, const LanczosStep& step);
    void project_whole(const Panel& w, const ProjectionBasis& basis, const LanczosStep& step, double* next);
    StepStatus orthonormalize(const Panel& w, const Panel& out, const LanczosStep& step);

    const Kernels* kernels_;
    Reduction reduction_;
    std::int64_t block_;
    std::int64_t most_rows_;  // of overlaps
    double tolerance_;        // for directions of a new block, relative
    double limit_;  // one projection is enough for a row of which the history takes out no more than this part
    bool in_float32_;
    bool host_decides_;  // reads flags, instead of leaving them to the kernels
    double scale_ = 0.0;
    std::int64_t vectors_read_ = 0;
    std::vector<double> memory_;       // small matrices of kernels that work in the host's memory
    std::vector<double> status_copy_;  // of what was read from a device
};

}  // namespace hesd
