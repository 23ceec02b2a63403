// A panel whose columns may lie in several tiles, as in a file that is read from the front to the back.
//
// Tile t holds columns [t * L, (t + 1) * L) of every row, contiguous, so that rows [first, first + count) of a tile are
// one piece of memory. A panel in memory is one tile. Kernels run tile by tile; sums over the tiles have a fixed order.
// While one tile is used the operating system is asked to read the next one ahead; tiles in the host's memory come to a
// device that works on them in the same way.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels/kernels.hpp"

namespace hesd {

class BasisPanel {
   public:
    // `tiles` have equal rows and precision; their columns follow each other. `far`: they lie in the host's memory, and
    // the kernels work on a device.
    explicit BasisPanel(std::vector<Panel> tiles, bool far = false);

    [[nodiscard]] std::int64_t rows() const { return tiles_.front().rows; }
    [[nodiscard]] std::int64_t columns() const { return columns_; }
    [[nodiscard]] Precision precision() const { return tiles_.front().precision; }

    [[nodiscard]] bool far() const { return far_; }

    // panel_gram of rows [first, first + count) with w: gram (count, w.rows). `part` has room for as many numbers.
    void gram(const Kernels& kernels, std::int64_t first, std::int64_t count, const Panel& w, double* gram,
              double* part) const;

    // panel_project with rows [first, first + count); gram and self_gram may be null. `part` has room for both.
    void project(const Kernels& kernels, std::int64_t first, std::int64_t count, const Panel& w, std::int64_t idle,
                 const double* coefficients, double* gram, double* self_gram, double* part) const;

    // Rounds the rows of `source` into rows [first, first + source.rows).
    void store(const Kernels& kernels, std::int64_t first, const Panel& source) const;

   private:
    // Calls body(rows of a tile, the same columns of w) for each tile in order.
    template <typename Body>
    void for_each_tile(const Kernels& kernels, std::int64_t first, std::int64_t count, const Panel& w, Body body) const;

    std::vector<Panel> tiles_;
    std::int64_t columns_ = 0;
    bool far_;
};

}  // namespace hesd
