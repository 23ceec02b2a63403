// What the .cu sources use of CUDA, in one place: nvcc takes it from CUDA's headers, a C++20 compiler from
// csrc/emulation. Launches, errors, the workspace.
#pragma once

#if defined(HESD_EMULATION)
#include "emulation/emulation.hpp"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#define HESD_KERNEL __global__ void
#define HESD_DEVICE __device__ __forceinline__
#define HESD_LAUNCH_BOUNDS(threads, blocks) __launch_bounds__(threads, blocks)
#define HESD_ARGUMENT(...) const __grid_constant__ __VA_ARGS__  // a large one, read where it lies

// One load of a type whose alignment is its size, 16 bytes at most.
template <typename V>
HESD_DEVICE V load_whole(const void* source) {
    return *static_cast<const V*>(source);
}
HESD_DEVICE void store_16_bytes(void* target, uint4 bits) { *static_cast<uint4*>(target) = bits; }

// The emulation counts the bytes of panels that a kernel moves.
HESD_DEVICE void count_read(std::int64_t, bool) {}
HESD_DEVICE void count_written(std::int64_t) {}
#endif

#include <cstring>
#include <string>

#include "hesd/panel.hpp"
#include "kernels/execution.hpp"

namespace hesd::cuda {

constexpr int kWarp = 32;
constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
// Blocks of a launch that sums over columns: about one for each multiprocessor of an A100 or H100, times blocks on
// each. Fixed, so that sums have the same order, and results the same bits, on every device.
constexpr int kBlocks = 132;

inline void check(cudaError_t error, const char* what) {
    if (error != cudaSuccess) {
        cudaGetLastError();  // the runtime keeps it, and the next launch would seem to have failed
        throw EngineError(std::string("CUDA: ") + what + ": " + cudaGetErrorString(error) +
                          (error == cudaErrorNoKernelImageForDevice
                               ? "; the kernels are built for compute capability 8.0 and above"
                               : ""));
    }
}

inline cudaStream_t stream() { return static_cast<cudaStream_t>(current_execution().stream); }

// Makes the execution's device the current one, for a scope.
class DeviceScope {
   public:
    DeviceScope() {
        check(cudaGetDevice(&before_), "no device can be used");
        const int wanted = static_cast<int>(current_execution().device);
        if (wanted != before_) {
            check(cudaSetDevice(wanted), "the panels' device cannot be used");
        }
    }
    ~DeviceScope() {
        if (before_ != static_cast<int>(current_execution().device) && cudaSetDevice(before_) != cudaSuccess) {
            cudaGetLastError();
        }
    }
    DeviceScope(const DeviceScope&) = delete;
    DeviceScope& operator=(const DeviceScope&) = delete;

   private:
    int before_ = 0;
};

// Hands out the execution's workspace from front to back, for one call of a kernel.
class Workspace {
   public:
    template <typename T>
    T* take(std::int64_t count) {
        const std::int64_t first = used_;
        used_ += (count * static_cast<std::int64_t>(sizeof(T)) + 255) / 256 * 256;
        if (used_ > current_execution().workspace_bytes) {
            throw EngineError("CUDA: a workspace of " + std::to_string(current_execution().workspace_bytes) +
                              " bytes is too small; " + std::to_string(used_) + " are needed");
        }
        return reinterpret_cast<T*>(static_cast<char*>(current_execution().workspace) + first);
    }

   private:
    std::int64_t used_ = 0;
};

inline int attribute(cudaDeviceAttr which) {
    int value = 0;
    check(cudaDeviceGetAttribute(&value, which, static_cast<int>(current_execution().device)), "an attribute");
    return value;
}

// Copies of small matrices. A copy from the host is staged before the call returns, except where the device reads the
// host's memory by itself; one to the host waits for the stream.
template <typename T>
void to_device(T* target, const T* source, std::int64_t count) {
    check(
        cudaMemcpyAsync(target, source, static_cast<std::size_t>(count) * sizeof(T), cudaMemcpyHostToDevice, stream()),
        "copy to the device");
    if (attribute(cudaDevAttrPageableMemoryAccess) != 0) {
        check(cudaStreamSynchronize(stream()), "copy to the device");
    }
}
template <typename T>
void to_host(T* target, const T* source, std::int64_t count) {
    check(
        cudaMemcpyAsync(target, source, static_cast<std::size_t>(count) * sizeof(T), cudaMemcpyDeviceToHost, stream()),
        "copy to the host");
    check(cudaStreamSynchronize(stream()), "a kernel failed");
}

// Launches kernel(arguments...) on the current stream with `shared` bytes of dynamic shared memory.
template <typename... Parameters, typename... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), std::int64_t blocks, int threads, std::int64_t shared,
            const Arguments&... arguments) {
    if (shared > 48 * 1024) {
        const int most = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
        if (shared > most) {
            throw EngineError(std::string("CUDA: ") + name + " needs " + std::to_string(shared) +
                              " bytes of shared memory for a block, and this device has " + std::to_string(most));
        }
        // Always the most, so that two threads do not set it against each other.
        check(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                                   most),
              name);
    }
#if defined(HESD_EMULATION)
    emulation::put(stream(), [=] {
        emulation::launch(name, static_cast<unsigned>(blocks), static_cast<unsigned>(threads),
                          static_cast<std::size_t>(shared), [&] { kernel(static_cast<Parameters>(arguments)...); });
    });
#else
    // clang-format off
    kernel<<<static_cast<unsigned>(blocks), static_cast<unsigned>(threads), static_cast<std::size_t>(shared), stream()>>>(
        static_cast<Parameters>(arguments)...);
    // clang-format on
#endif
    check(cudaGetLastError(), name);
}

// The block's dynamic shared memory, 16-byte aligned.
HESD_DEVICE char* shared_memory() {
#if defined(HESD_EMULATION)
    return emulation::shared_memory();
#else
    extern __shared__ __align__(16) char memory[];
    return memory;
#endif
}

}  // namespace hesd::cuda
