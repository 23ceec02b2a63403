// The CUDA kernels, by the contracts in include/hesd. Panels lie on the device of the current Execution, and so do
// small matrices. They only put work on the stream; what waits for the device is DeviceMemory::download.
#pragma once

#include <string>

#include "kernels/kernels.hpp"
#include "small/pivoted_cholesky_qr.hpp"

namespace hesd::cuda {

void accumulate_hvp(const Panel& out, const HvpPart* parts, std::int64_t part_count, double alpha,
                    const Panel* compensation);
void fill_probes(const Panel& out, std::uint64_t seed, std::uint32_t first_probe, std::uint64_t first_index,
                 ProbeKind kind);
void panel_gram(const Panel& v, const Panel& w, double* gram);
void panel_project(const Panel& w, const Panel& v, std::int64_t gram_only, const double* coefficients, double* gram,
                   double* self_gram);
void panel_orthonormalize(const Panel& w, const Panel& out, const Orthonormalization& state, bool first,
                          const Reduction& reduction);
void panel_combine(const double* s, const Panel& v, const Panel& x);

void add(double* target, const double* source, std::int64_t count);
void lanczos_task(StepTask task, const LanczosStep& step);
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
