// accumulate_hvp: add one batch's Hessian-vector products to the running panel.
//
//   out[j, offset_i : offset_i + length_i] += alpha * part_i[j, :]      for every part i and row j
//
// out            (b, n), float32 or float64, accumulated into.
// parts          part i is (b, length_i); its precision is out's or lower. Its columns in out are
//                [offset_i, offset_i + length_i); ranges of different parts must not overlap.
// compensation   optional (b, n) of out's precision: the rounding error of every addition is added to it
//                (two-sum, Knuth, TAOCP vol. 2, 4.2.2, theorem B), so out + compensation carries about twice the
//                digits.
//
// Elementwise, so the result has the same bits for any thread count. alpha is rounded to out's precision first.
// Zero parts, zero rows and zero lengths are no-ops. Traffic: each part read once, out read and written once.
#pragma once

#include <cstdint>

#include "hesd/panel.hpp"

namespace hesd {

struct HvpPart {
    Panel values;
    std::int64_t offset;
};

using AccumulateHvp = void(const Panel& out, const HvpPart* parts, std::int64_t part_count, double alpha,
                           const Panel* compensation);

}  // namespace hesd
