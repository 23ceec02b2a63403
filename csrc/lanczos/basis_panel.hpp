// A panel whose columns may lie in several tiles, as in a file that is read from the front to the back.
//
// Tile t holds columns [t * L, (t + 1) * L) of every row, contiguous, so that rows [first, first + count) of a tile are
// one piece of memory. A panel in memory is one tile. Kernels run tile by tile; sums over the tiles have a fixed order.
// While one tile is used the operating system is asked to read the next one ahead; tiles in the host's memory are
// copied ahead to a device that works on them.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels/kernels.hpp"

namespace hesd {

class BasisPanel {
   public:
    // `tiles` have equal rows and precision; their columns follow each other. `in_host_memory`: they lie there, and the
    // kernels work on a device.
    BasisPanel(const Kernels& kernels, std::vector<Panel> tiles, bool in_host_memory = false);

    [[nodiscard]] std::int64_t rows() const { return tiles_.front().rows; }
    [[nodiscard]] std::int64_t columns() const { return columns_; }
    [[nodiscard]] Precision precision() const { return tiles_.front().precision; }
    [[nodiscard]] bool in_host_memory() const { return in_host_memory_; }

    // Rounds the rows of `source` into rows [first, first + source.rows).
    void store(std::int64_t first, const Panel& source) const;
    // Sets rows [first, first + count) to zero.
    void clear(std::int64_t first, std::int64_t count) const;

   private:
    friend struct BasisRows;
    const Kernels* kernels_;
    std::vector<Panel> tiles_;
    std::int64_t columns_ = 0;
    bool in_host_memory_;
};

// Rows [first, first + count) of a panel of stored blocks.
struct BasisRows {
    const BasisPanel* panel;
    std::int64_t first;
    std::int64_t count;

    // panel_gram with w: gram (count, w.rows). `part` has room for as many numbers.
    void gram(const Panel& w, double* gram, double* part) const;

    // panel_project of w; gram and self_gram may be null. `part` has room for both.
    void project(const Panel& w, std::int64_t gram_only, const double* coefficients, double* gram, double* self_gram,
                 double* part) const;

   private:
    // Calls body(rows of a tile, the same columns of w) for each tile in order.
    template <typename Body>
    void for_each_tile(const Panel& w, Body body) const;
};

}  // namespace hesd
