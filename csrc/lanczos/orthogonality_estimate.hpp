// How orthogonal the newest Lanczos block still is to each older one, without reading them.
//
// In rounded arithmetic  H Q_j = C_{j-1}^T Q_{j-1} + A_j Q_j + C_j Q_{j+1} + F_j,  and the overlaps
// W_{j,i} = Q_j Q_i^T of the blocks follow (subtract the relation for i, times Q_j^T, from the one for j, times Q_i^T)
//
//   C_j W_{j+1,i} = W_{j,i-1} C_{i-1} + W_{j,i} A_i + W_{j,i+1} C_i^T - C_{j-1}^T W_{j-1,i} - A_j W_{j,i} + N_{j,i}
//
// with N_{j,i} = Q_j F_i^T - F_j Q_i^T, which is not known and is replaced by random signs of the size of the measured
// noise. This is the omega recurrence of Simon (Linear Algebra Appl. 61, 1984) with matrices in the place of numbers;
// Grimes, Lewis and Simon (SIAM J. Matrix Anal. Appl. 15, 1994) bound the same terms by norms, which with clustered
// eigenvalues grow sooner than the overlaps do. Cost: O(j b^3) at step j, no vector touched.
#pragma once

#include <cstdint>
#include <vector>

#include "small/small_matrix.hpp"

namespace hesd {

class OrthogonalityEstimate {
   public:
    // The estimate for Q_0.
    void start(std::int64_t width);

    // From Q_j to Q_{j+1}, j = steps so far; `diagonal` holds A_0 ... A_j, `offdiagonal` C_0 ... C_{j-1}, and
    // `c` is C_j.
    // `noise`: size of an entry of N, in the units of H. `fresh`: size of an overlap that was just removed.
    void advance(const std::vector<SmallMatrix>& diagonal, const std::vector<SmallMatrix>& offdiagonal,
                 const SmallMatrix& c, double noise, double fresh);

    // Largest estimated overlap of the newest block with block i.
    [[nodiscard]] double with(std::int64_t i) const;
    // Over all older blocks.
    [[nodiscard]] double largest() const;

    // The newest block's rows are `factor` times those of a new one, which may be fewer and takes its place.
    void rewritten(const SmallMatrix& factor);

    // Blocks [first, last) were projected out of the newest one.
    void removed(std::int64_t first, std::int64_t last, double fresh);

   private:
    [[nodiscard]] double sign();

    std::vector<SmallMatrix> newest_;    // W_{j, 0 ... j-1}
    std::vector<SmallMatrix> previous_;  // W_{j-1, 0 ... j-2}
    std::int64_t width_ = 0;
    std::uint64_t state_ = 0;
};

}  // namespace hesd
