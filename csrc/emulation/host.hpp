// What the host has of the emulated device, beside its runtime: memory, and counts of what happened.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <string>

namespace hesd::emulation {

// Bytes of panels that CUDA threads move: from memory, again from the cache, and to memory.
struct Traffic {
    std::int64_t read = 0;
    std::int64_t read_again = 0;
    std::int64_t written = 0;
};
// Since the last call.
Traffic take_traffic();
// Launches of kernels of one name.
struct Launches {
    std::int64_t count = 0;
    std::int64_t shared_bytes = 0;  // the most that a block had
};
// By name, since the last call.
std::map<std::string, Launches> take_launches();
// How often the host has waited for a stream since the last call.
std::int64_t take_waits();

// Memory, 256-byte aligned, that only kernels and copies can reach: the host that touches it gets a segmentation fault,
// and so does what writes beyond its end.
std::shared_ptr<void> device_memory(std::size_t bytes);

}  // namespace hesd::emulation
