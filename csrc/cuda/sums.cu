#include <algorithm>

#include "cuda/kernels.hpp"
#include "cuda/tiles.cuh"

namespace hesd::cuda {
namespace {

constexpr int kEntries = 32;  // of a block of sum_kernel: each by 8 threads

HESD_KERNEL HESD_LAUNCH_BOUNDS(kThreads, 1) sum_kernel(const double* partial, std::int64_t blocks, const Sums sums,
                                                       const int* condition, const OrthonormalizeStage* stage) {
    if ((condition != nullptr && *condition == 0) || (stage != nullptr && *stage != OrthonormalizeStage::more)) {
        return;
    }
    double* shared = reinterpret_cast<double*>(shared_memory());
    const int part = static_cast<int>(threadIdx.x) / kEntries;
    const int entry = static_cast<int>(threadIdx.x) % kEntries;
    const std::int64_t size = sums.entries + sums.b * (sums.b + 1) / 2;
    const std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * kEntries + entry;
    double sum = 0.0;
    for (std::int64_t block = part; i < size && block < blocks; block += kThreads / kEntries) {
        sum += partial[block * size + i];
    }
    shared[part * kEntries + entry] = sum;
    __syncthreads();
    if (part != 0 || i >= size) {
        return;
    }
    for (int other = 1; other < kThreads / kEntries; ++other) {
        sum += shared[other * kEntries + entry];
    }
    if (i < sums.entries) {
        sums.gram[i / sums.width * sums.gram_stride + i % sums.width] = sum;
    } else {
        const Pair pair = pair_of(static_cast<int>(i - sums.entries));
        sums.self_gram[pair.i * sums.b + pair.j] = sums.self_gram[pair.j * sums.b + pair.i] = sum;
    }
}

template <typename C>
HESD_KERNEL HESD_LAUNCH_BOUNDS(kThreads, 1)
    arrange_kernel(const Coefficients of, std::int64_t tile, std::int64_t count, C* arranged) {
    const std::int64_t step = static_cast<std::int64_t>(gridDim.x) * kThreads;
    for (std::int64_t e = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x; e < count; e += step) {
        const std::int64_t row = e / tile % of.rows;
        const std::int64_t column = e / (tile * of.rows) * tile + e % tile;
        double value = 0.0;
        if (column < of.columns) {
            value = of.matrix != nullptr ? of.matrix[row * of.row_stride + column * of.column_stride]
                    : row == column      ? 1.0
                                         : 0.0;
        }
        arranged[e] = static_cast<C>(value);
    }
}

}  // namespace

template <typename C>
C* arrange(Workspace& workspace, const Coefficients& of, std::int64_t tile) {
    const std::int64_t count = (of.columns + tile - 1) / tile * tile * of.rows;
    C* arranged = workspace.take<C>(count);
    if (count > 0) {
        launch("coefficients", arrange_kernel<C>, std::min<std::int64_t>(kBlocks, (count + kThreads - 1) / kThreads),
               kThreads, 0, of, tile, count, arranged);
    }
    return arranged;
}
template float* arrange(Workspace&, const Coefficients&, std::int64_t);
template double* arrange(Workspace&, const Coefficients&, std::int64_t);

void sum_partials(const double* partial, std::int64_t blocks, const Sums& sums, const OrthonormalizeStage* stage) {
    launch("sum", sum_kernel, (sums.size() + kEntries - 1) / kEntries, kThreads, kThreads * 8, partial, blocks, sums,
           current_execution().condition, stage);
}

std::int64_t workspace_bytes(std::int64_t rows, std::int64_t block) {
    const std::int64_t narrow = std::min(block, kWidestTile);
    const std::int64_t sums = std::max(rows * narrow + narrow * (narrow + 1) / 2, block * (block + 1) / 2);
    const std::int64_t coefficients = (rows + kWidestTile) * (block + kWidestTile);
    return 8 * (coefficients + 2 * kBlocks * sums) + 1024;
}

std::string missing() {
    int count = 0;
    const cudaError_t error = cudaGetDeviceCount(&count);
    return error != cudaSuccess ? cudaGetErrorString(error) : count == 0 ? "no device" : "";
}

}  // namespace hesd::cuda
