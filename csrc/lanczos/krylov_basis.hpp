// The memory of the Krylov basis: which rows hold which block.
//
// `working` has rows for three blocks: the last two, and the one at work, which takes the probes and then each product.
// `history` (slots * block, n) holds the blocks before them, perhaps in a lower precision and perhaps in tiles on a
// disk. Where `working` has rows for max_steps + 1 blocks, the whole basis stays in it, each block where it was made:
// nothing is copied, and there is no history. The caller owns both panels.
#pragma once

#include <cstdint>

#include "lanczos/basis_panel.hpp"
#include "lanczos/lanczos_options.hpp"

namespace hesd {

// Blocks [first, last) of the history.
struct BlockRange {
    std::int64_t first;
    std::int64_t last;
};

// What a product is projected against: blocks of the history, and the last two.
struct ProjectionBasis {
    BasisRows history;
    BasisRows recent;

    // Whether they follow each other in one panel.
    [[nodiscard]] bool adjacent() const { return history.panel == recent.panel; }
    [[nodiscard]] BasisRows whole() const {
        return {recent.panel, recent.first - history.count, history.count + recent.count};
    }
};

class KrylovBasis {
   public:
    // Throws EngineError where the panels do not have what the options ask for.
    KrylovBasis(const Kernels& kernels, BasisPanel history, Panel working, const BlockLanczosOptions& options);

    // The first rows of `working` hold the first block, of `width` rows.
    void start(std::int64_t width) const { clear_beyond(width); }
    // The first `width` rows at work become the newest block: where they are, or in the place of the older of the last
    // two, which goes into the history.
    void append(std::int64_t width);

    // The newest block, and what is at work: rows of `working`.
    [[nodiscard]] std::int64_t newest_row() const { return newest_ * block_; }
    [[nodiscard]] std::int64_t work_row() const { return (in_place_ ? newest_ + 1 : 2) * block_; }
    [[nodiscard]] Panel newest(std::int64_t width) const { return working_.slice(newest_row(), width); }
    [[nodiscard]] Panel work(std::int64_t width) const { return working_.slice(work_row(), width); }

    // Blocks in the history; the order of its slots does not matter for a projection.
    [[nodiscard]] std::int64_t history_blocks() const;
    [[nodiscard]] BlockRange whole_history() const { return {0, history_blocks()}; }
    [[nodiscard]] BasisRows history(BlockRange range) const;
    // The last two blocks, and where among their rows the newest one begins.
    [[nodiscard]] BasisRows recent() const;
    [[nodiscard]] std::int64_t newest_in_recent() const { return newest_row() - recent().first; }
    [[nodiscard]] ProjectionBasis all() const { return {history(whole_history()), recent()}; }
    [[nodiscard]] ProjectionBasis last_two() const { return {history({0, 0}), recent()}; }

    [[nodiscard]] std::int64_t most_rows() const { return history_.rows() + working_.rows; }
    [[nodiscard]] std::int64_t columns() const { return working_.columns; }
    [[nodiscard]] Precision precision() const { return working_.precision; }
    // Half the spacing that blocks in the history are rounded to; 0 where they are not rounded.
    [[nodiscard]] double history_rounding() const;
    [[nodiscard]] bool history_in_host_memory() const { return history_.in_host_memory(); }

   private:
    void require_room(const BlockLanczosOptions& options) const;
    void clear_beyond(std::int64_t width) const;

    BasisPanel history_;
    Panel working_;
    BasisPanel working_panel_;  // the same memory
    std::int64_t block_;
    bool in_place_;            // the whole basis stays in working
    std::int64_t slots_;       // blocks that history can hold
    std::int64_t stored_ = 0;  // blocks that went into history
    std::int64_t newest_ = 0;  // block of working that holds Q_j
    std::int64_t recent_blocks_ = 1;
};

}  // namespace hesd
