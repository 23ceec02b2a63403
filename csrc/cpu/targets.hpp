// Every CPU kernel is compiled once per instruction set, into a namespace of that name.
#pragma once

#include "hesd/accumulate_hvp.hpp"
#include "hesd/fill_probes.hpp"
#include "hesd/panel_combine.hpp"
#include "hesd/panel_gram.hpp"
#include "hesd/panel_orthonormalize.hpp"
#include "hesd/panel_project.hpp"

#define HESD_DECLARE_TARGET(target)           \
    namespace hesd::target {                  \
    AccumulateHvp accumulate_hvp;             \
    FillProbes fill_probes;                   \
    PanelGram panel_gram;                     \
    PanelProject panel_project;               \
    PanelOrthonormalize panel_orthonormalize; \
    PanelCombine panel_combine;               \
    }

HESD_DECLARE_TARGET(generic)
#if defined(HESD_HAS_X86_TARGETS)
HESD_DECLARE_TARGET(avx2)
HESD_DECLARE_TARGET(avx512)
#endif
#if defined(HESD_HAS_NEON_TARGET)
HESD_DECLARE_TARGET(neon)
#endif
