#include <algorithm>

#include "cuda/kernels.hpp"
#include "cuda/tiles.cuh"

namespace hesd::cuda {
namespace {

constexpr int kEntries = 32;  // of a block of sum_kernel: each by 8 threads

HESD_KERNEL HESD_LAUNCH_BOUNDS(kThreads, 1)
    sum_kernel(const double* partial, std::int64_t blocks, std::int64_t size, double* totals) {
    double* shared = reinterpret_cast<double*>(shared_memory());
    const int part = static_cast<int>(threadIdx.x) / kEntries;
    const int entry = static_cast<int>(threadIdx.x) % kEntries;
    const std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * kEntries + entry;
    double sum = 0.0;
    for (std::int64_t block = part; i < size && block < blocks; block += kThreads / kEntries) {
        sum += partial[block * size + i];
    }
    shared[part * kEntries + entry] = sum;
    __syncthreads();
    if (part == 0 && i < size) {
        for (int other = 1; other < kThreads / kEntries; ++other) {
            sum += shared[other * kEntries + entry];
        }
        totals[i] = sum;
    }
}

}  // namespace

double* take_sums(Workspace& workspace, std::int64_t blocks, std::int64_t size) {
    return workspace.take<double>((blocks + 1) * size);
}

void sum_partials(double* partial, std::int64_t blocks, std::int64_t size, double* host) {
    double* totals = partial + blocks * size;
    launch("sum", sum_kernel, (size + kEntries - 1) / kEntries, kThreads, kThreads * 8, partial, blocks, size, totals);
    to_host(host, totals, size);
}

void unpack_pairs(const double* pairs, std::int64_t b, double* gram) {
    for (std::int64_t j = 0; j < b; ++j) {
        for (std::int64_t i = 0; i <= j; ++i) {
            gram[i * b + j] = gram[j * b + i] = *pairs++;
        }
    }
}

std::int64_t workspace_bytes(std::int64_t rows, std::int64_t block, std::int64_t parts) {
    const std::int64_t narrow = std::min(block, kWidestTile);
    const std::int64_t sums = std::max(rows * narrow + narrow * (narrow + 1) / 2, block * (block + 1) / 2);
    const std::int64_t coefficients = std::max((rows + kWidestTile) * (block + kWidestTile), block * block);
    constexpr std::int64_t most_part_bytes = 64;
    return 8 * (coefficients + (2 * kBlocks + 1) * sums) + most_part_bytes * (2 * parts + 1) + 1024;
}

std::string missing() {
    int count = 0;
    const cudaError_t error = cudaGetDeviceCount(&count);
    return error != cudaSuccess ? cudaGetErrorString(error) : count == 0 ? "no device" : "";
}

}  // namespace hesd::cuda
