#pragma once

#include <cstdint>

namespace hesd::emulation {

// Bytes of panels that CUDA threads move: from memory, again from the cache, and to memory.
struct Traffic {
    std::int64_t read = 0;
    std::int64_t read_again = 0;
    std::int64_t written = 0;
};
// Since the last call.
Traffic take_traffic();

}  // namespace hesd::emulation
