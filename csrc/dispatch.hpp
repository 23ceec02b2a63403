// The one place that chooses a backend.
#pragma once

#include <string>
#include <vector>

#include "hesd/accumulate_hvp.hpp"
#include "hesd/fill_probes.hpp"
#include "hesd/panel_combine.hpp"
#include "hesd/panel_gram.hpp"
#include "hesd/panel_orthonormalize.hpp"
#include "hesd/panel_project.hpp"

namespace hesd {

// For a basis that stays in the host's memory while kernels work on a device: its tiles come near one after another, in
// two places of the Execution's staging memory by turns, so that one is copied while another is used.
struct Staging {
    // Begins to copy rows of a tile, once the kernels put to work so far are done with the place.
    void (*fetch)(const Panel& rows, int place);
    // Where the kernels put to work from now on find them.
    Panel (*arrived)(const Panel& rows, int place);
    // Rounds device rows into a tile; `identity` is the matrix of that name.
    void (*send)(const Panel& source, const double* identity, const Panel& rows);
    // Waits until nothing is under way.
    void (*finish)();
};

// One backend's kernels, by their contracts.
struct Kernels {
    const char* name;
    AccumulateHvp accumulate_hvp;
    FillProbes fill_probes;
    PanelGram panel_gram;
    PanelProject panel_project;
    PanelOrthonormalize panel_orthonormalize;
    PanelCombine panel_combine;
    // Bytes that an Execution's workspace must have for panels of up to `rows` rows against `block` rows, and for
    // `parts` parts. Null: these kernels work where they are called, without an Execution.
    std::int64_t (*workspace_bytes)(std::int64_t rows, std::int64_t block, std::int64_t parts) = nullptr;
    // Null where the kernels work in the host's memory.
    const Staging* staging = nullptr;
    // Bytes of staging memory for rows of tiles of so many columns.
    std::int64_t (*staging_bytes)(std::int64_t rows, std::int64_t columns, Precision precision) = nullptr;
};

// Names of the CPU targets in this build that this processor can run, best first.
std::vector<std::string> available_targets();

// The CPU kernels in use. Chosen at first use: the target named by HESD_FAST_TARGET, else the best available.
const Kernels& cpu_kernels();

// The kernels for panels on CUDA devices; throws EngineError, saying what is missing, where there are none.
const Kernels& cuda_kernels();

// Switches the CPU target; throws EngineError naming the available ones.
void select_target(const std::string& name);

}  // namespace hesd
