// What is asked of block Lanczos.
#pragma once

#include <cstdint>

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

    [[nodiscard]] bool keeps_whole_basis() const {
        return reorthogonalization == Reorthogonalization::full || reorthogonalization == Reorthogonalization::partial;
    }
};

}  // namespace hesd
