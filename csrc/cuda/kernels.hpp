// The CUDA kernels, by the contracts in include/hesd. Panels lie on the device of the current Execution, and so do
// small matrices. They only put work on the stream; what waits for the device is DeviceMemory::download.
#pragma once

#include <string>

#include "kernels/kernels.hpp"
#include "small/pivoted_cholesky_qr.hpp"

namespace hesd::cuda {

AccumulateHvp accumulate_hvp;
FillProbes fill_probes;
PanelGram panel_gram;
PanelProject panel_project;
PanelOrthonormalize panel_orthonormalize;
PanelCombine panel_combine;
Add add;
LanczosTask lanczos_task;
// Prepares a round's transform.
void next_round(const Orthonormalization& state, Transforms transforms);

extern const DeviceMemory kDeviceMemory;
void upload(void* target, const void* source, std::int64_t bytes);
void download(void* target, const void* source, std::int64_t bytes);

// Why no device can be used; empty if one can.
std::string missing();

// Most rows that panel_orthonormalize takes.
constexpr std::int64_t kMostRows = 192;

// Workspace that suffices for any kernel on panels of up to `rows` rows against `block` rows.
std::int64_t workspace_bytes(std::int64_t rows, std::int64_t block);

}  // namespace hesd::cuda
