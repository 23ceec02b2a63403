// The module hesd_fast._engine.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <exception>

#include "cpu/parallel.hpp"
#include "dispatch/dispatch.hpp"
#include "python/python_modules.hpp"
#include "python/registration.hpp"
#if defined(HESD_EMULATION)
#include "emulation/host.hpp"
#include "emulation/streams.hpp"
#endif

namespace hesd::python {
namespace {

namespace py = pybind11;

py::dict build_info() {
    py::dict info;
    info["version"] = HESD_VERSION;
    info["compiler"] = HESD_COMPILER;
    info["cpu_target"] = cpu_kernels().name;
    info["cpu_targets_available"] = available_targets();
    info["threads"] = most_threads();
#if defined(HESD_HAS_CUDA) || defined(HESD_EMULATION)
    info["cuda"] = true;
#else
    info["cuda"] = false;
#endif
#if defined(HESD_EMULATION)
    info["emulated"] = true;
#endif
    return info;
}

void register_errors() {
    py::register_exception_translator([](std::exception_ptr pointer) {
        const auto raise = [](const char* type, const EngineError& error) {
            PyErr_SetString(py::module_::import(kErrorsModule).attr(type).ptr(), error.what());
        };
        try {
            if (pointer) {
                std::rethrow_exception(pointer);
            }
        } catch (const NumericalError& error) {
            raise("NumericalError", error);
        } catch (const EngineError& error) {
            raise("EngineError", error);
        }
    });
}

#if defined(HESD_EMULATION)
void register_emulation(py::module_& module) {
    // Bytes of panels that the emulated kernels have moved since the last call: read, read again, written.
    module.def("take_traffic", [] {
        const emulation::Traffic traffic = emulation::take_traffic();
        return py::make_tuple(traffic.read, traffic.read_again, traffic.written);
    });
    // Launches of each kernel since the last call, and the most shared memory that its blocks had.
    module.def("take_launches", [] {
        py::dict found;
        for (const auto& [name, launches] : emulation::take_launches()) {
            found[py::str(name)] = py::make_tuple(launches.count, launches.shared_bytes);
        }
        return found;
    });
    // When work is done that was put on streams, see emulation/streams.hpp.
    module.def("defer", &emulation::defer, py::arg("order"));
    // How often the host has waited for the emulated device since the last call.
    module.def("take_waits", &emulation::take_waits);
}
#endif

}  // namespace
}  // namespace hesd::python

PYBIND11_MODULE(_engine, module) {
    using namespace hesd::python;
    module.doc() =
        "Compiled kernels and block Lanczos of hesd-fast. Use hesd_fast.kernels and hesd_fast.block_lanczos.";
    register_errors();
    module.def("build_info", &build_info);
    module.def("select_target", &hesd::select_target, pybind11::arg("name"));
    register_kernels(module);
    register_small_matrices(module);
    register_block_lanczos(module);
#if defined(HESD_EMULATION)
    register_emulation(module);
#endif
}
