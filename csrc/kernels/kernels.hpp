// The table of kernels: one backend's, by the contracts in include/hesd.
#pragma once

#include <algorithm>

#include "hesd/accumulate_hvp.hpp"
#include "hesd/add.hpp"
#include "hesd/fill_probes.hpp"
#include "hesd/lanczos_task.hpp"
#include "hesd/panel_combine.hpp"
#include "hesd/panel_gram.hpp"
#include "hesd/panel_orthonormalize.hpp"
#include "hesd/panel_project.hpp"

namespace hesd {

// For a basis that stays in the host's memory while kernels work on a device: its tiles are copied to the device one
// after another, to two places of the Execution's staging memory by turns, so that one is copied while another is used.
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
    // Bytes of staging memory for rows of tiles of so many columns.
    std::int64_t (*bytes)(std::int64_t rows, std::int64_t columns, Precision precision);
};

// The memory of kernels that work on a device.
struct DeviceMemory {
    // Small matrices on the device's stream: upload does not wait, download does.
    void (*upload)(void* target, const void* source, std::int64_t bytes);
    void (*download)(void* target, const void* source, std::int64_t bytes);
    // Bytes that an Execution's workspace must have for panels of up to `rows` rows against `block` rows.
    std::int64_t (*workspace_bytes)(std::int64_t rows, std::int64_t block);
    Staging staging;
};

// Small matrices lie where the kernels work.
struct Kernels {
    const char* name;
    AccumulateHvp* accumulate_hvp;
    FillProbes* fill_probes;
    PanelGram* panel_gram;
    PanelProject* panel_project;
    PanelOrthonormalize* panel_orthonormalize;
    PanelCombine* panel_combine;
    Add* add;
    LanczosTask* lanczos_task;
    const DeviceMemory* device = nullptr;  // null: the kernels work in the host's memory, without an Execution

    [[nodiscard]] bool on_device() const { return device != nullptr; }
};

// Sums numbers over all shards. They lie on the device, or with none in the host's memory.
void reduce(const DeviceMemory* device, const Reduction& reduction, double* values, std::int64_t count);

// Copies `count` values from where the kernels work; waits for them.
template <typename T>
void download(const Kernels& kernels, T* target, const T* source, std::int64_t count) {
    if (count == 0) {
        return;
    }
    if (kernels.on_device()) {
        kernels.device->download(target, source, count * static_cast<std::int64_t>(sizeof(T)));
    } else {
        std::copy_n(source, count, target);
    }
}

// panel_orthonormalize to its end, of rows whose state was begun. read() gives the facts as the host sees them.
template <typename Read>
OrthonormalizeFacts orthonormalize(const Kernels& kernels, const Panel& w, const Panel& out,
                                   const Orthonormalization& state, const Reduction& reduction, Read read) {
    OrthonormalizeFacts facts{};
    for (bool first = true; first || facts.stage == OrthonormalizeStage::more; first = false) {
        kernels.panel_orthonormalize(w, out, state, first, reduction);
        facts = read();
    }
    return facts;
}

// The same for a state by itself; throws EngineError where W is not finite or cannot be squared.
OrthonormalizeFacts orthonormalize(const Kernels& kernels, const Panel& w, const Panel& out,
                                   const Orthonormalization& state, const Reduction& reduction);

}  // namespace hesd
