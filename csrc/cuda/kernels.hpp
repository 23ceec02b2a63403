// The CUDA kernels, by the contracts in include/hesd. Panels lie on the device of the current Execution, small matrices
// on the host. Calls that return a matrix wait for the device; the others only put work on the stream.
#pragma once

#include <string>

#include "dispatch.hpp"

namespace hesd::cuda {

void accumulate_hvp(const Panel& out, const HvpPart* parts, std::int64_t part_count, double alpha,
                    const Panel* compensation);
void fill_probes(const Panel& out, std::uint64_t seed, std::uint32_t first_probe, std::uint64_t first_index,
                 ProbeKind kind);
void panel_gram(const Panel& v, const Panel& w, double* gram);
void panel_project(const Panel& w, const Panel& v, const double* coefficients, double* gram, double* self_gram);
OrthonormalizeResult panel_orthonormalize(const Panel& w, const Panel& out, double tolerance, std::int64_t max_rank,
                                          const Reduction& reduction, const double* gram, double* factor);
void panel_combine(const double* s, const Panel& v, const Panel& x);

extern const Staging kStaging;
std::int64_t staging_bytes(std::int64_t rows, std::int64_t columns, Precision precision);

// Why no device can be used; empty if one can.
std::string missing();

// Most rows that panel_orthonormalize takes.
constexpr std::int64_t kMostRows = 192;

// Workspace that suffices for any kernel on panels of up to `rows` rows against `block` rows, and for `parts` parts.
std::int64_t workspace_bytes(std::int64_t rows, std::int64_t block, std::int64_t parts);

}  // namespace hesd::cuda
