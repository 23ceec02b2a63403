// Block Lanczos by reverse communication, written against the kernel contracts only.
//
//   H Q_j = C_{j-1}^T Q_{j-1} + A_j Q_j + C_j Q_{j+1}        (vectors are rows; Golub & Underwood 1977)
//
// The caller owns both panels. `working` has rows for three blocks: the last two, and the one at work, which takes the
// probes and then each product. `history` (slots * block, n) holds the blocks before them, perhaps in a lower precision
// and perhaps in tiles on a disk. Where `working` has rows for max_steps + 1 blocks, the whole basis stays in it, each
// block where it was made: nothing is copied, and there is no history. Usage:
//
//   fill the b rows at work_row() with the probes;  start();
//   while not finished:  working[work_row() : + width] = H * current();  advance();
//
// Orthogonality. Each product is projected twice against the last two blocks, and against the history once or, where
// that takes much out, twice (block classical Gram-Schmidt; "twice is enough", Giraud, Langou, Rozloznik, van den
// Eshof, Numer. Math. 101, 2005; once is where little is removed, Daniel, Gragg, Kaufman, Stewart, Math. Comp. 30,
// 1976). The second projection is fused with the first one's Gram matrix, so the history is read twice or three times.
// When the new block comes out much weaker than the product it was taken from, one more sweep of the orthonormal block
// against all stored ones restores orthogonality.
//
// Partial reorthogonalization keeps the basis orthogonal to the square root of epsilon, which leaves the coefficients
// right to epsilon (Simon, Linear Algebra Appl. 61, 1984): the overlaps are estimated (orthogonality_estimate.hpp), and
// when the largest passes sqrt(epsilon) the new block and the one after it are swept once against the blocks whose
// estimates have passed epsilon^(3/4).
//
// Breakdown and deflation. A direction whose remaining norm is at most breakdown_multiple * epsilon * scale is dropped
// from the block, scale being the largest norm of a row of any product so far, a lower bound of ||H||. No direction
// left: the Krylov space is invariant and the recurrence is finished.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels/execution.hpp"
#include "kernels/kernels.hpp"
#include "lanczos/basis_panel.hpp"
#include "lanczos/orthogonality_estimate.hpp"
#include "small/small_matrix.hpp"
#include "small/step_tasks.hpp"

namespace hesd {

enum class Reorthogonalization {
    full,     // against all previous blocks; history holds max_steps - 2 of them
    partial,  // against the last two, and against others when the estimate says so; history as for full
    window,   // against the last two and as many before them as history has slots
    none,     // against the last two; no history
};

struct BlockLanczosOptions {
    Reorthogonalization reorthogonalization;
    std::int64_t block;
    std::int64_t max_steps;
    std::int64_t global_size;  // n over all shards
    double breakdown_multiple;
};

class BlockLanczos {
   public:
    BlockLanczos(const Kernels& kernels, BasisPanel history, Panel working, BlockLanczosOptions options,
                 Reduction reduction);

    // Bytes of the small matrices that these take where the kernels work, for overlaps of up to `rows` rows; for
    // kernels on a device in Execution::matrices, in each of the calls below.
    [[nodiscard]] static std::int64_t matrix_bytes(std::int64_t rows, std::int64_t block);

    // The rows at work_row() hold the probes Z; sets Q_0 and the factor Z = L_0 Q_0. Throws EngineError if all probes
    // are zero.
    void start();

    // Q_j, the rows to multiply; its rows are current().rows <= block.
    [[nodiscard]] Panel current() const;
    // Its first row in `working`.
    [[nodiscard]] std::int64_t current_row() const { return newest_ * options_.block; }
    // First row in `working` of what is at work: probes, then products.
    [[nodiscard]] std::int64_t work_row() const;

    // The current().rows rows at work_row() hold H Q_j, and are overwritten. One step of the recurrence.
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
    // Sweeps of weak blocks against everything stored.
    [[nodiscard]] std::int64_t extra_sweeps() const { return extra_sweeps_; }
    // Sweeps that partial reorthogonalization asked for.
    [[nodiscard]] std::int64_t partial_sweeps() const { return partial_sweeps_; }
    // How many stored vectors projections have read, each reading counted.
    [[nodiscard]] std::int64_t vectors_read() const { return vectors_read_; }
    // Estimated largest overlap of the newest block with older ones after its sweeps; partial mode only.
    [[nodiscard]] double estimated_overlap() const { return estimate_.largest(); }
    // Largest entry of Q Q_j^T - I over all stored blocks, for the last block multiplied: one read of the history.
    [[nodiscard]] double measure_orthogonality();

   private:
    // Blocks [first, last) of the history.
    struct Range {
        std::int64_t first;
        std::int64_t last;
    };

    // Rows [first, first + count) of a panel of stored blocks.
    struct Rows {
        const BasisPanel* panel;
        std::int64_t first;
        std::int64_t count;
    };

    // What a product is projected against.
    struct Basis {
        Rows history;
        Rows recent;
        // Both, where they follow each other in one panel.
        [[nodiscard]] Rows whole() const {
            return {recent.panel, recent.first - history.count, history.count + recent.count};
        }
    };

    // What the host has seen of a step, in its memory.
    struct Found {
        StepFacts facts;
        OrthonormalizeFacts block;
        const double* factor;
        const double* removed;
    };

    [[nodiscard]] bool keeps_all() const;
    [[nodiscard]] Rows recent_rows() const;
    [[nodiscard]] Rows history_rows(Range range) const;
    [[nodiscard]] std::int64_t history_blocks() const;
    [[nodiscard]] std::int64_t most_overlaps() const { return history_.rows() + working_.rows; }
    [[nodiscard]] double epsilon() const { return machine_epsilon(working_.precision); }
    LanczosStep matrices(std::int64_t history, std::int64_t recent, std::int64_t width);
    Found look(const LanczosStep& step);
    Found orthonormalized(const Panel& w, const Panel& out, const LanczosStep& step);
    template <typename Body>
    std::int64_t when(const int* flag, Body body);
    void gram(Rows v, const Panel& w, double* out);
    void project(const Panel& w, Rows v, std::int64_t idle, const double* c, double* gram, double* self_gram);
    void project_recent(const Panel& w, const Basis& basis, const LanczosStep& step);
    void project_whole(const Panel& w, const Basis& basis, const LanczosStep& step, bool with_gram);
    void record_coefficients(const double* removed, std::int64_t in_history, std::int64_t width);
    SmallMatrix next_block(const Panel& w, const Found& found);
    SmallMatrix sweep(const Panel& q, const std::vector<Range>& ranges);
    [[nodiscard]] std::vector<Range> ranges_to_sweep();
    void keep(std::int64_t width);
    void clear_rows(std::int64_t first, std::int64_t count) const;

    const Kernels* kernels_;
    BasisPanel history_;
    Panel working_;
    BasisPanel working_tile_;  // the same memory
    BlockLanczosOptions options_;
    Reduction reduction_;
    std::int64_t slots_;       // blocks that history can hold
    bool in_place_ = false;    // the whole basis stays in working
    std::int64_t stored_ = 0;  // blocks that went into history
    std::int64_t newest_ = 0;  // block of working that holds Q_j
    std::int64_t recent_blocks_ = 1;
    std::int64_t step_ = 0;
    std::int64_t width_ = 0;  // rows of Q_j
    std::int64_t rank_ = 0;   // directions found so far
    bool started_ = false;
    bool finished_ = false;
    bool invariant_ = false;
    bool failed_ = false;  // set while a step runs: one that ends by an exception leaves it set
    double scale_ = 0.0;
    double recurrence_error_ = 0.0;
    double fresh_ = 0.0;          // overlap with a block that was just projected out
    double swept_overlap_ = 0.0;  // largest that the last sweep took out
    std::int64_t extra_sweeps_ = 0;
    std::int64_t partial_sweeps_ = 0;
    std::int64_t vectors_read_ = 0;
    OrthogonalityEstimate estimate_;
    std::vector<Range> pending_;  // swept in the last step, to be swept in the next one too
    SmallMatrix start_;
    std::vector<SmallMatrix> diagonal_;
    std::vector<SmallMatrix> offdiagonal_;
    std::vector<double> memory_;  // small matrices of kernels that work in the host's memory
    std::vector<double> found_;   // copy of what was looked at on a device
    double* part_ = nullptr;      // room for the sums of one tile, set by matrices()
};

}  // namespace hesd
