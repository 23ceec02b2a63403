// add: one small matrix onto another, such as the sums of a tile of columns onto those of the tiles before.
//
//   target[i] += source[i],    0 <= i < count
//
// target   count float64 numbers, where the kernels work; accumulated into.
// source   as many; must not overlap target.
//
// Elementwise, one rounding for each number: the same bits on every backend. Where the Execution has a condition and it
// is zero, nothing is done. count = 0 is a no-op, and the pointers may then be null. Traffic: no panel; both read once,
// target written once.
#pragma once

#include <cstdint>

namespace hesd {

using Add = void(double* target, const double* source, std::int64_t count);

}  // namespace hesd
