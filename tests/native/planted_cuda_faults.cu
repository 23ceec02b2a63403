// Faults on purpose in CUDA kernels, run by csrc/emulation as the engine's kernels are. Tests expect each to be seen.

#include <algorithm>
#include <cstdint>
#include <cstdio>

#include "cuda/elements.cuh"
#include "emulation/host.hpp"

#define HESD_PLANTED extern "C" __attribute__((visibility("default")))

namespace {

using namespace hesd::cuda;

// Each thread hands its number to the thread half a block away; without the barrier it may not be there yet.
HESD_KERNEL HESD_LAUNCH_BOUNDS(kThreads, 1) hand_over(float* out, bool with_barrier) {
    float* shared = reinterpret_cast<float*>(shared_memory());
    const unsigned thread = threadIdx.x;
    shared[thread] = static_cast<float>(thread);
    if (with_barrier) {
        __syncthreads();
    }
    out[thread] = shared[(thread + kThreads / 2) % kThreads];
}

// All blocks add to one sum, which nothing orders.
HESD_KERNEL HESD_LAUNCH_BOUNDS(kThreads, 1) add_from_all_blocks(float* out, bool apart) {
    if (threadIdx.x == blockIdx.x) {  // another thread in each block
        out[apart ? blockIdx.x : 0] += 1.0f;
    }
}

HESD_KERNEL HESD_LAUNCH_BOUNDS(kThreads, 1) copy(float* out, const float* in, std::int64_t length) {
    if (threadIdx.x < length) {
        out[threadIdx.x] = in[threadIdx.x];
    }
}

HESD_KERNEL HESD_LAUNCH_BOUNDS(kThreads, 1) write_shared(int length) {
    if (static_cast<int>(threadIdx.x) == length - 1) {
        shared_memory()[threadIdx.x] = 1;
    }
}

HESD_KERNEL HESD_LAUNCH_BOUNDS(kThreads, 1) barrier_for_some(unsigned threads) {
    if (threadIdx.x < threads) {
        __syncthreads();
    }
}

HESD_KERNEL HESD_LAUNCH_BOUNDS(kThreads, 1) exchange_for_some(float* out, unsigned lanes) {
    float value = 1.0f;
    if (threadIdx.x % kWarp < lanes) {
        value = __shfl_xor_sync(0xffffffffu, value, 1);
    }
    out[threadIdx.x] = value;
}

HESD_KERNEL HESD_LAUNCH_BOUNDS(kThreads, 1) load_vector(float* out, const float* in) {
    const Vector<float> vector = load(in, 4, true);
    out[threadIdx.x] = vector.values[threadIdx.x % 4];
}

// Votes and shuffles, as numbers that a test knows.
HESD_KERNEL HESD_LAUNCH_BOUNDS(kThreads, 1) warp_functions(float* out) {
    const int thread = static_cast<int>(threadIdx.x);
    const int lane = thread % kWarp;
    const unsigned odd = __ballot_sync(0xffffffffu, lane % 2 == 1);
    __syncwarp();
    const bool fine = odd == 0xaaaaaaaau && __any_sync(0xffffffffu, lane == 31) &&
                      !__any_sync(0xffffffffu, lane == 32) && __all_sync(0xffffffffu, lane < 32) &&
                      !__all_sync(0xffffffffu, lane < 31) && __shfl_sync(0xffffffffu, lane, 5) == 5 &&
                      __shfl_xor_sync(0xffffffffu, lane, 3) == (lane ^ 3) &&
                      __shfl_down_sync(0xffffffffu, static_cast<double>(lane), 4) == (lane < 28 ? lane + 4 : lane) &&
                      __shfl_up_sync(0xffffffffu, lane, 4) == (lane >= 4 ? lane - 4 : lane);
    out[thread] = fine ? 1.0f : 0.0f;
}

HESD_KERNEL HESD_LAUNCH_BOUNDS(kThreads, 1) fill(float* memory, std::int64_t length) {
    if (threadIdx.x < length) {
        memory[threadIdx.x] = 1.0f;
    }
}

// The sum over a warp of 8 values for each lane.
HESD_KERNEL HESD_LAUNCH_BOUNDS(kThreads, 1) warp_sums(float* out) {
    const int lane = static_cast<int>(threadIdx.x) % kWarp;
    float values[8];
    for (int i = 0; i < 8; ++i) {
        values[i] = static_cast<float>(lane * (i + 1));
    }
    out[threadIdx.x] = sum_over_warp(values, lane);
}

}  // namespace

// Memory of the device is for kernels and copies; the host that looks at it does not come back.
HESD_PLANTED float reach_device_memory(bool by_copy, std::int64_t length) {
    const auto memory = hesd::emulation::device_memory(kThreads * sizeof(float));
    auto* there = static_cast<float*>(memory.get());
    launch("fill", fill, 1, kThreads, 0, there, length < kThreads ? length : kThreads);
    if (length > kThreads) {
        launch("fill", fill, 1, kThreads, 0, there + kThreads, length - kThreads);  // beyond its end
    }
    float here = 0.0f;
    if (by_copy) {
        to_host(&here, there, 1);
        return here;
    }
    return *static_cast<volatile float*>(there);
}

// Reads what another stream writes, after it or whenever.
HESD_PLANTED float read_across_streams(bool after, std::int64_t order) {
    const auto memory = hesd::emulation::device_memory(kThreads * sizeof(float));
    auto* there = static_cast<float*>(memory.get());
    cudaEvent_t written = nullptr;
    hesd::Execution other;
    cudaStreamCreateWithFlags(&other.stream, cudaStreamNonBlocking);
    cudaEventCreateWithFlags(&written, cudaEventDisableTiming);
    hesd::emulation::defer(order);
    launch("fill", fill, 1, kThreads, 0, there, std::int64_t{0});  // this stream is used first
    {
        const hesd::ExecutionScope scope(other);
        launch("fill", fill, 1, kThreads, 0, there, std::int64_t{kThreads});
        cudaEventRecord(written, stream());
    }
    if (after) {
        cudaStreamWaitEvent(stream(), written, 0);
    }
    float here = -1.0f;
    to_host(&here, there, 1);
    hesd::emulation::defer(hesd::emulation::at_once);
    return here;
}

// Runs a kernel by name on `out` of kThreads numbers; the message of an error, or an empty string.
HESD_PLANTED const char* run_planted_kernel(const char* name, float* out, const float* in, std::int64_t argument) {
    static char message[200];
    message[0] = '\0';
    const auto is = [&](const char* other) { return std::string(name) == other; };
    try {
        if (is("hand_over")) {
            launch(name, hand_over, 1, kThreads, kThreads * 4, out, argument != 0);
        } else if (is("add_from_all_blocks")) {
            launch(name, add_from_all_blocks, 4, kThreads, 0, out, argument != 0);
        } else if (is("copy")) {
            launch(name, copy, 1, kThreads, 0, out, in, argument);
        } else if (is("write_shared")) {
            launch(name, write_shared, 1, kThreads, 100, static_cast<int>(argument));
        } else if (is("barrier_for_some")) {
            launch(name, barrier_for_some, 1, kThreads, 0, static_cast<unsigned>(argument));
        } else if (is("exchange_for_some")) {
            launch(name, exchange_for_some, 1, kThreads, 0, out, static_cast<unsigned>(argument));
        } else if (is("load_vector")) {
            launch(name, load_vector, 1, kThreads, 0, out, in + argument);
        } else if (is("too_much_shared")) {
            launch(name, warp_functions, 1, kThreads, argument, out);
        } else if (is("warp_functions")) {
            launch(name, warp_functions, 2, kThreads, 0, out);
        } else if (is("warp_sums")) {
            launch(name, warp_sums, 1, kThreads, 0, out);
        } else {
            throw hesd::EngineError("no such kernel");
        }
    } catch (const hesd::EngineError& error) {
        std::snprintf(message, sizeof message, "%s", error.what());
    }
    return message;
}
