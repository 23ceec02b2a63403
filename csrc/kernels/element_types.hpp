// From the precision of a panel to C++ types, for the kernels of the CPU and of CUDA devices. Internal linkage, as in
// cpu/vector.hpp.
#pragma once

#include "hesd/panel.hpp"

#define HESD_INLINE inline __attribute__((always_inline))

namespace hesd {
namespace {

// Calls `body` with a typed null pointer of the precision's element type.
template <typename Body>
HESD_INLINE void with_storage(Precision precision, Body body) {
    switch (precision) {
        case Precision::float64:
            body(static_cast<double*>(nullptr));
            return;
        case Precision::float32:
            body(static_cast<float*>(nullptr));
            return;
        case Precision::bfloat16:
            body(static_cast<BFloat16*>(nullptr));
            return;
        case Precision::float16:
            body(static_cast<Float16*>(nullptr));
            return;
    }
}
template <typename Body>
HESD_INLINE void with_working(Precision precision, Body body) {
    if (precision == Precision::float64) {
        body(static_cast<double*>(nullptr));
    } else {
        body(static_cast<float*>(nullptr));
    }
}

// float32 where both panels can be held in it, else float64.
template <typename S, typename T>
struct Common {
    typedef float type;
};
template <typename T>
struct Common<double, T> {
    typedef double type;
};
template <typename S>
struct Common<S, double> {
    typedef double type;
};
template <>
struct Common<double, double> {
    typedef double type;
};

}  // namespace
}  // namespace hesd
