// fill_probes: random probe vectors that depend only on (seed, probe, global parameter index).
//
//   out[j, i] = probe value number (first_index + i) of probe (first_probe + j)
//
// out   (b, n), float32 or float64, overwritten.
//
// Counter-based Philox 4x32-10 (Salmon, Moraes, Dror, Shaw, SC 2011): key = seed (low word, high word), counter =
// (block low word, block high word, probe, kind). Rademacher (kind 0): block = index / 128, bit index % 128 of the
// four words in order, set bit +1, clear bit -1. Gaussian (kind 1): block = index / 4; words (0, 1) and (2, 3) each
// give a Box-Muller pair (cosine first), computed in float64 by additions, multiplications, divisions and square roots
// alone, in a fixed order without contraction.
//
// So the bits are the same for any thread count, any split of the index range, any machine. Traffic: out written once.
#pragma once

#include <cstdint>

#include "hesd/panel.hpp"

namespace hesd {

enum class ProbeKind : std::uint32_t { rademacher = 0, gaussian = 1 };

using FillProbes = void(const Panel& out, std::uint64_t seed, std::uint32_t first_probe, std::uint64_t first_index,
                        ProbeKind kind);

}  // namespace hesd
