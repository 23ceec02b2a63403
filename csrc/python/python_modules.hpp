// The modules of the package that the engine calls.
#pragma once

namespace hesd::python {

constexpr const char* kCudaModule = "hesd_fast.engine.cuda";
constexpr const char* kErrorsModule = "hesd_fast.errors";

}  // namespace hesd::python
