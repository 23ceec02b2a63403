// Lets a C++20 compiler build the .cu sources as they are and run them on the CPU, for tests.
//
// Every CUDA thread of a block is a fiber with a stack of its own, which runs until it waits: at a barrier, in a warp
// exchange, or at its end. Fibers and not threads of the system, because a barrier of 256 of those takes milliseconds
// on few cores; to the thread sanitizer each fiber is a thread, ordered with others by barriers and by nothing else.
// Blocks run one after another. Shared memory has exactly the size that was asked for and starts as NaNs. A barrier
// that some threads never reach, a warp exchange without all of its lanes and a 16-byte access of an address that is
// not a multiple of 16 end the launch with an EngineError.
#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <utility>
#include <vector>

#include "emulation/host.hpp"
#include "emulation/streams.hpp"

#define HESD_KERNEL void
#define HESD_DEVICE inline
#define HESD_LAUNCH_BOUNDS(threads, blocks)
#define HESD_ARGUMENT(...) const __VA_ARGS__&

struct alignas(16) uint4 {
    unsigned x, y, z, w;
};

namespace hesd::emulation {

struct Index {
    unsigned x;
    unsigned y;
    unsigned z;
};
Index thread_index();
Index block_index();
Index block_size();
Index grid_size();

// The block's dynamic shared memory.
char* shared_memory();

void wait_for_block();
void wait_for_warp();

// Each lane of the warp gives `bits` and gets those of lane `source`.
std::uint64_t exchange(std::uint64_t bits, int source);
// The lanes for which `vote` is true, as bits.
unsigned ballot(bool vote);
int lane();

// Ends the launch with an EngineError; called by a CUDA thread.
[[noreturn]] void fail(const char* what);

// Runs body() once for each thread of each block.
void launch(const char* name, unsigned blocks, unsigned threads, std::size_t shared, const std::function<void()>& body);

void count_read(std::int64_t bytes, bool again);
void count_written(std::int64_t bytes);
void count_wait();

// Makes device memory reachable for a scope.
class Reach {
   public:
    Reach();
    ~Reach();
    Reach(const Reach&) = delete;
    Reach& operator=(const Reach&) = delete;
};

template <typename T>
T exchange_value(T value, int source) {
    static_assert(sizeof(T) <= 8, "one exchange moves up to 8 bytes");
    std::uint64_t bits = 0;
    std::memcpy(&bits, &value, sizeof value);
    bits = exchange(bits, source);
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

}  // namespace hesd::emulation

#define threadIdx (::hesd::emulation::thread_index())
#define blockIdx (::hesd::emulation::block_index())
#define blockDim (::hesd::emulation::block_size())
#define gridDim (::hesd::emulation::grid_size())

inline void __syncthreads() { hesd::emulation::wait_for_block(); }
inline void __syncwarp(unsigned mask = 0xffffffffu) {
    if (mask != 0xffffffffu) {
        hesd::emulation::fail("__syncwarp of a part of a warp");
    }
    hesd::emulation::wait_for_warp();
}
inline int whole_warp(unsigned mask, int source) {
    if (mask != 0xffffffffu) {
        hesd::emulation::fail("a warp exchange of a part of a warp");
    }
    return source;
}
template <typename T>
T __shfl_sync(unsigned mask, T value, int source) {
    return hesd::emulation::exchange_value(value, whole_warp(mask, source % 32));
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask) {
    return hesd::emulation::exchange_value(value, whole_warp(mask, (hesd::emulation::lane() ^ lane_mask) % 32));
}
// A lane whose source would lie beyond the warp keeps its own value.
template <typename T>
T __shfl_down_sync(unsigned mask, T value, int distance) {
    const int source = hesd::emulation::lane() + distance;
    return hesd::emulation::exchange_value(value, whole_warp(mask, source < 32 ? source : hesd::emulation::lane()));
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, int distance) {
    const int source = hesd::emulation::lane() - distance;
    return hesd::emulation::exchange_value(value, whole_warp(mask, source >= 0 ? source : hesd::emulation::lane()));
}
inline unsigned __ballot_sync(unsigned mask, bool vote) {
    whole_warp(mask, 0);
    return hesd::emulation::ballot(vote);
}
inline bool __any_sync(unsigned mask, bool vote) { return __ballot_sync(mask, vote) != 0; }
inline bool __all_sync(unsigned mask, bool vote) { return __ballot_sync(mask, vote) == 0xffffffffu; }

using hesd::emulation::count_read;
using hesd::emulation::count_written;

inline void require_aligned(const void* address, std::size_t bytes) {
    if (reinterpret_cast<std::uintptr_t>(address) % bytes != 0) {
        hesd::emulation::fail(bytes == 16 ? "a 16-byte access of an address that is not a multiple of 16"
                                          : "an access of an address that is not a multiple of its size");
    }
}
template <typename V>
V load_whole(const void* source) {
    require_aligned(source, sizeof(V));
    V value;
    std::memcpy(&value, source, sizeof value);
    return value;
}
inline void store_16_bytes(void* target, uint4 bits) {
    require_aligned(target, sizeof bits);
    std::memcpy(target, &bits, sizeof bits);
}

// 16-bit numbers.

struct __half {
    std::uint16_t bits;
};
struct __nv_bfloat16 {
    std::uint16_t bits;
};
inline float __uint_as_float(unsigned bits) { return std::bit_cast<float>(bits); }
inline __half __ushort_as_half(std::uint16_t bits) { return {bits}; }
inline std::uint16_t __half_as_ushort(__half value) { return value.bits; }
inline std::uint16_t __bfloat16_as_ushort(__nv_bfloat16 value) { return value.bits; }
float __half2float(__half value);
__half __float2half_rn(float value);
__nv_bfloat16 __float2bfloat16_rn(float value);

// The part of the runtime's interface that the sources use. Panels on the device are memory like any other.

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorNoKernelImageForDevice = 209 };
enum cudaMemcpyKind { cudaMemcpyHostToDevice = 1, cudaMemcpyDeviceToHost = 2, cudaMemcpyDefault = 4 };
enum cudaDeviceAttr { cudaDevAttrPageableMemoryAccess = 88, cudaDevAttrMaxSharedMemoryPerBlockOptin = 97 };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
using cudaStream_t = void*;
using cudaEvent_t = hesd::emulation::Event*;
constexpr unsigned cudaEventDisableTiming = 2;
constexpr unsigned cudaStreamNonBlocking = 1;

inline const char* cudaGetErrorString(cudaError_t error) { return error == cudaSuccess ? "no error" : "invalid value"; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaGetDeviceCount(int* count) {
    *count = 1;
    return cudaSuccess;
}
inline cudaError_t cudaGetDevice(int* device) {
    *device = 0;
    return cudaSuccess;
}
inline cudaError_t cudaSetDevice(int device) { return device == 0 ? cudaSuccess : cudaErrorInvalidValue; }
// A copy from the host's pageable memory takes what is there when it is put on the stream.
inline cudaError_t cudaMemcpyAsync(void* target, const void* source, std::size_t bytes, cudaMemcpyKind kind,
                                   cudaStream_t stream) {
    const auto* first = static_cast<const char*>(source);
    std::vector<char> staged(first, kind == cudaMemcpyHostToDevice ? first + bytes : first);
    hesd::emulation::put(stream, [target, source, bytes, kind, staged = std::move(staged)] {
        const hesd::emulation::Reach reach;
        std::memcpy(target, kind == cudaMemcpyHostToDevice ? staged.data() : source, bytes);
    });
    return cudaSuccess;
}
// Tiles lie in pinned memory, which is read when the copy's turn comes.
inline cudaError_t cudaMemcpy2DAsync(void* target, std::size_t target_pitch, const void* source,
                                     std::size_t source_pitch, std::size_t width, std::size_t height, cudaMemcpyKind,
                                     cudaStream_t stream) {
    hesd::emulation::put(stream, [=] {
        const hesd::emulation::Reach reach;
        for (std::size_t row = 0; row < height; ++row) {
            std::memcpy(static_cast<char*>(target) + row * target_pitch,
                        static_cast<const char*>(source) + row * source_pitch, width);
        }
    });
    return cudaSuccess;
}
inline cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
    hesd::emulation::finish(stream);
    hesd::emulation::count_wait();
    return cudaSuccess;
}
inline cudaError_t cudaDeviceSynchronize() {
    hesd::emulation::finish_all();
    hesd::emulation::count_wait();
    return cudaSuccess;
}
constexpr unsigned cudaHostRegisterPortable = 1;
inline cudaError_t cudaHostRegister(void* memory, std::size_t, unsigned) {
    return reinterpret_cast<std::uintptr_t>(memory) % 4096 == 0 ? cudaSuccess : cudaErrorInvalidValue;
}
inline cudaError_t cudaHostUnregister(void*) { return cudaSuccess; }
inline cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) {
    *stream = new char;
    return cudaSuccess;
}
inline cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
    *event = new hesd::emulation::Event;
    return cudaSuccess;
}
inline cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
    hesd::emulation::record(event, stream);
    return cudaSuccess;
}
inline cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned) {
    hesd::emulation::wait_for(event, stream);
    return cudaSuccess;
}
// What a block may have on every device since compute capability 8.0: 8.6 has the least.
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
    *value = attribute == cudaDevAttrMaxSharedMemoryPerBlockOptin ? 99 * 1024 : 0;
    return cudaSuccess;
}
inline cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int) { return cudaSuccess; }
