#include "dispatch/dispatch.hpp"

#include <atomic>
#include <cstdlib>

#include "cpu/targets.hpp"
#include "small/step_tasks.hpp"
#if defined(HESD_HAS_CUDA) || defined(HESD_EMULATION)
#include "cuda/kernels.hpp"
#endif

namespace hesd {
namespace {

struct Target {
    Kernels kernels;
    bool (*supported)();
};

#define HESD_TARGET_KERNELS(target) \
    {#target,                       \
     target::accumulate_hvp,        \
     target::fill_probes,           \
     target::panel_gram,            \
     target::panel_project,         \
     target::panel_orthonormalize,  \
     target::panel_combine,         \
     add,                           \
     lanczos_task}

bool always() { return true; }

#if defined(HESD_HAS_X86_TARGETS)
bool has_avx2() {
    return __builtin_cpu_supports("avx2") != 0 && __builtin_cpu_supports("fma") != 0 &&
           __builtin_cpu_supports("f16c") != 0;
}
bool has_avx512() {
    return __builtin_cpu_supports("avx512f") != 0 && __builtin_cpu_supports("avx512bw") != 0 &&
           __builtin_cpu_supports("avx512dq") != 0 && __builtin_cpu_supports("avx512vl") != 0;
}
#endif

#if defined(HESD_HAS_CUDA) || defined(HESD_EMULATION)
const Kernels kCuda = {
#if defined(HESD_EMULATION)
    "emulated",
#else
    "cuda",
#endif
    cuda::accumulate_hvp, cuda::fill_probes, cuda::panel_gram,   cuda::panel_project, cuda::panel_orthonormalize,
    cuda::panel_combine,  cuda::add,         cuda::lanczos_task, &cuda::kDeviceMemory};
#endif

// Best first.
const Target kTargets[] = {
#if defined(HESD_HAS_X86_TARGETS)
    {HESD_TARGET_KERNELS(avx512), has_avx512},
    {HESD_TARGET_KERNELS(avx2), has_avx2},
#endif
#if defined(HESD_HAS_NEON_TARGET)
    {HESD_TARGET_KERNELS(neon), always},
#endif
    {HESD_TARGET_KERNELS(generic), always},
#if defined(HESD_EMULATION)
    {kCuda, always},
#endif
};

std::atomic<const Kernels*> selected{nullptr};

}  // namespace

std::vector<std::string> available_targets() {
    std::vector<std::string> names;
    for (const Target& target : kTargets) {
        if (target.supported()) {
            names.emplace_back(target.kernels.name);
        }
    }
    return names;
}

void select_target(const std::string& name) {
    for (const Target& target : kTargets) {
        if (name == target.kernels.name && target.supported()) {
            selected.store(&target.kernels);
            return;
        }
    }
    std::string known;
    for (const std::string& available : available_targets()) {
        known += (known.empty() ? "" : ", ") + available;
    }
    throw EngineError("CPU target '" + name + "' is not in this build or not supported by this processor; available: " +
                      known + ". Set HESD_FAST_TARGET to one of them or leave it unset");
}

const Kernels& cpu_kernels() {
    if (selected.load() == nullptr) {
        const char* wanted = std::getenv("HESD_FAST_TARGET");
        select_target(wanted != nullptr && *wanted != '\0' ? wanted : available_targets().front());
    }
    return *selected.load();
}

const Kernels& cuda_kernels() {
#if defined(HESD_EMULATION)
    return kCuda;
#elif defined(HESD_HAS_CUDA)
    static const std::string missing = cuda::missing();
    if (!missing.empty()) {
        throw EngineError("CUDA cannot be used here (" + missing + ")");
    }
    return kCuda;
#else
    throw EngineError("this build has no CUDA kernels; build it where nvcc 12.1 or later is found");
#endif
}

}  // namespace hesd
