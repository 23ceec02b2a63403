// Every CPU kernel is compiled once per instruction set, into a namespace of that name.
#pragma once

#include "hesd/accumulate_hvp.hpp"
#include "hesd/fill_probes.hpp"
#include "hesd/panel_combine.hpp"
#include "hesd/panel_gram.hpp"
#include "hesd/panel_orthonormalize.hpp"
#include "hesd/panel_project.hpp"

#define HESD_DECLARE_TARGET(target)                                                                              \
    namespace hesd::target {                                                                                     \
    void accumulate_hvp(const Panel& out, const HvpPart* parts, std::int64_t part_count, double alpha,           \
                        const Panel* compensation);                                                              \
    void fill_probes(const Panel& out, std::uint64_t seed, std::uint32_t first_probe, std::uint64_t first_index, \
                     ProbeKind kind);                                                                            \
    void panel_gram(const Panel& v, const Panel& w, double* gram);                                               \
    void panel_project(const Panel& w, const Panel& v, std::int64_t gram_only, const double* coefficients,       \
                       double* gram, double* self_gram);                                                         \
    void panel_orthonormalize(const Panel& w, const Panel& out, const Orthonormalization& state, bool first,     \
                              const Reduction& reduction);                                                       \
    void panel_combine(const double* s, const Panel& v, const Panel& x);                                         \
    }

HESD_DECLARE_TARGET(generic)
#if defined(HESD_HAS_X86_TARGETS)
HESD_DECLARE_TARGET(avx2)
HESD_DECLARE_TARGET(avx512)
#endif
#if defined(HESD_HAS_NEON_TARGET)
HESD_DECLARE_TARGET(neon)
#endif
