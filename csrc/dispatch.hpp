// The one place that chooses a backend.
#pragma once

#include <algorithm>
#include <string>
#include <vector>

#include "hesd/accumulate_hvp.hpp"
#include "hesd/fill_probes.hpp"
#include "hesd/panel_combine.hpp"
#include "hesd/panel_gram.hpp"
#include "hesd/panel_orthonormalize.hpp"
#include "hesd/panel_project.hpp"
#include "lanczos_step.hpp"

namespace hesd {

// For a basis that stays in the host's memory while kernels work on a device: its tiles come near one after another, in
// two places of the Execution's staging memory by turns, so that one is copied while another is used.
struct Staging {
    // Begins to copy rows of a tile, once the kernels put to work so far are done with the place.
    void (*fetch)(const Panel& rows, int place);
    // Where the kernels put to work from now on find them.
    Panel (*arrived)(const Panel& rows, int place);
    // Rounds device rows into a tile.
    void (*send)(const Panel& source, const Panel& rows);
    // Waits until nothing is under way.
    void (*finish)();
    // Lets copies between whole pages of the host's memory and a device pass the host by, until unpin.
    void (*pin)(void* memory, std::int64_t bytes);
    void (*unpin)(void* memory);
};

// The way to small matrices that lie on a device, on its stream: upload does not wait, download does.
struct MatrixCopies {
    void (*upload)(void* target, const void* source, std::int64_t bytes);
    void (*download)(void* target, const void* source, std::int64_t bytes);
};

// One backend's kernels, by their contracts. Small matrices lie where the kernels work.
struct Kernels {
    const char* name;
    AccumulateHvp accumulate_hvp;
    FillProbes fill_probes;
    PanelGram panel_gram;
    PanelProject panel_project;
    PanelOrthonormalize panel_orthonormalize;
    PanelCombine panel_combine;
    // target += source, numbers of small matrices.
    void (*add)(double* target, const double* source, std::int64_t count);
    void (*lanczos_task)(LanczosTask task, const LanczosStep& step);
    // Null where the kernels work in the host's memory.
    const MatrixCopies* copies = nullptr;
    // Bytes that an Execution's workspace must have for panels of up to `rows` rows against `block` rows. Null: these
    // kernels work where they are called, without an Execution.
    std::int64_t (*workspace_bytes)(std::int64_t rows, std::int64_t block) = nullptr;
    // Null where the kernels work in the host's memory.
    const Staging* staging = nullptr;
    // Bytes of staging memory for rows of tiles of so many columns.
    std::int64_t (*staging_bytes)(std::int64_t rows, std::int64_t columns, Precision precision) = nullptr;
};

// Sums numbers that lie where the kernels work over all shards.
void reduce(const Kernels& kernels, const Reduction& reduction, double* values, std::int64_t count);

// Copies `count` values from where the kernels work; waits for them.
template <typename T>
void download(const Kernels& kernels, T* target, const T* source, std::int64_t count) {
    if (count == 0) {
        return;
    }
    if (kernels.copies != nullptr) {
        kernels.copies->download(target, source, count * static_cast<std::int64_t>(sizeof(T)));
    } else {
        std::copy_n(source, count, target);
    }
}

// panel_orthonormalize to its end; throws EngineError where W is not finite or cannot be squared.
OrthonormalizeFacts orthonormalize(const Kernels& kernels, const Panel& w, const Panel& out,
                                   const Orthonormalization& state, const Reduction& reduction);

// Names of the CPU targets in this build that this processor can run, best first.
std::vector<std::string> available_targets();

// The CPU kernels in use. Chosen at first use: the target named by HESD_FAST_TARGET, else the best available.
const Kernels& cpu_kernels();

// The kernels for panels on CUDA devices; throws EngineError, saying what is missing, where there are none.
const Kernels& cuda_kernels();

// Switches the CPU target; throws EngineError naming the available ones.
void select_target(const std::string& name);

}  // namespace hesd
