// The threads of one block as a team for small matrices.
#pragma once

#include "cuda/elements.cuh"
#include "small/step_tasks.hpp"

namespace hesd::cuda {

class BlockTeam {
   public:
    static constexpr std::int64_t threads = kThreads;
    static constexpr std::int64_t kSharedBytes = kWarps * 8;
    std::int64_t thread;

    HESD_TEAM_WORK BlockTeam() : thread(threadIdx.x) {}
    HESD_TEAM_WORK void sync() const { __syncthreads(); }
    HESD_TEAM_WORK double sum(double value) const {
        return combine(value, [](double a, double b) { return a + b; });
    }
    HESD_TEAM_WORK double largest(double value) const {
        return combine(value, [](double a, double b) { return larger(a, b); });
    }

   private:
    template <typename Combine>
    HESD_TEAM_WORK double combine(double value, Combine of) const {
        for (int lanes = kWarp / 2; lanes >= 1; lanes /= 2) {
            value = of(value, __shfl_xor_sync(0xffffffffu, value, lanes));
        }
        double* of_warps = reinterpret_cast<double*>(shared_memory());
        __syncthreads();  // all have read the last ones
        if (thread % kWarp == 0) {
            of_warps[thread / kWarp] = value;
        }
        __syncthreads();
        value = of_warps[0];
        for (int warp = 1; warp < kWarps; ++warp) {
            value = of(value, of_warps[warp]);
        }
        return value;
    }
};

}  // namespace hesd::cuda
