// Small matrices on the device: copies, and what happens to them between one pass over the vectors and the next, each
// in one block.
#include "cuda/kernels.hpp"
#include "cuda/matrices.cuh"

namespace hesd::cuda {
namespace {

HESD_KERNEL HESD_LAUNCH_BOUNDS(kThreads, 1)
    add_kernel(double* target, const double* source, std::int64_t count, const int* condition) {
    if (condition != nullptr && *condition == 0) {
        return;
    }
    const std::int64_t step = static_cast<std::int64_t>(gridDim.x) * kThreads;
    for (std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < count; i += step) {
        target[i] += source[i];
    }
}

HESD_KERNEL HESD_LAUNCH_BOUNDS(kThreads, 1) task_kernel(StepTask task, const LanczosStep step) {
    team_work::do_task(BlockTeam(), task, step);
}

HESD_KERNEL HESD_LAUNCH_BOUNDS(kThreads, 1) round_kernel(const Orthonormalization state, Transforms transforms) {
    team_work::next_transform(BlockTeam(), state, transforms);
}

}  // namespace

void upload(void* target, const void* source, std::int64_t bytes) {
    const DeviceScope scope;
    to_device(static_cast<char*>(target), static_cast<const char*>(source), bytes);
}

void download(void* target, const void* source, std::int64_t bytes) {
    const DeviceScope scope;
    to_host(static_cast<char*>(target), static_cast<const char*>(source), bytes);
}

void add(double* target, const double* source, std::int64_t count) {
    if (count > 0) {
        const DeviceScope scope;
        const std::int64_t blocks = (count + kThreads - 1) / kThreads;
        launch("add", add_kernel, blocks < kBlocks ? blocks : kBlocks, kThreads, 0, target, source, count,
               current_execution().condition);
    }
}

void lanczos_task(StepTask task, const LanczosStep& step) {
    const DeviceScope scope;
    launch("a task of a Lanczos step", task_kernel, 1, kThreads, BlockTeam::kSharedBytes, task, step);
}

void next_round(const Orthonormalization& state, Transforms transforms) {
    launch("a round of orthonormalization", round_kernel, 1, kThreads, BlockTeam::kSharedBytes, state, transforms);
}

}  // namespace hesd::cuda
