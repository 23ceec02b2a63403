// The one place that chooses a backend.
#pragma once

#include <string>
#include <vector>

#include "kernels/kernels.hpp"

namespace hesd {

// Names of the CPU targets in this build that this processor can run, best first.
std::vector<std::string> available_targets();

// The CPU kernels in use. Chosen at first use: the target named by HESD_FAST_TARGET, else the best available.
const Kernels& cpu_kernels();

// The kernels for panels on CUDA devices; throws EngineError, saying what is missing, where there are none.
const Kernels& cuda_kernels();

// Switches the CPU target; throws EngineError naming the available ones.
void select_target(const std::string& name);

}  // namespace hesd
