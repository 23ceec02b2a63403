// The parts of the module.
#pragma once

#include <pybind11/pybind11.h>

namespace hesd::python {

void register_kernels(pybind11::module_& module);
void register_small_matrices(pybind11::module_& module);
void register_block_lanczos(pybind11::module_& module);

}  // namespace hesd::python
