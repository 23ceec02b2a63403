#include "python/call.hpp"

#include <algorithm>

#include "python/python_modules.hpp"
#if defined(HESD_EMULATION)
#include "emulation/host.hpp"
#include "emulation/streams.hpp"
#endif

namespace hesd::python {

Matrix checked_matrix(const py::object& object, const std::string& name, std::int64_t rows, std::int64_t columns) {
    const auto matrix = Matrix::ensure(object);
    if (!matrix || matrix.ndim() != 2 || matrix.shape(0) != rows || matrix.shape(1) != columns) {
        PyErr_Clear();
        throw EngineError("`" + name + "` is not a float64 matrix of shape (" + std::to_string(rows) + ", " +
                          std::to_string(columns) + ")");
    }
    return matrix;
}

Matrix to_numpy(const SmallMatrix& matrix) {
    Matrix result({matrix.rows, matrix.columns});
    std::copy(matrix.values.begin(), matrix.values.end(), result.mutable_data());
    return result;
}

Backend::Backend(const BorrowedPanel& first, std::initializer_list<const BorrowedPanel*> others) : Backend(first) {
    for (const BorrowedPanel* other : others) {
        require(*other);
    }
}

Backend::Backend(const BorrowedPanel& first)
    : name_(first.name()), place_(first.place()), kernels_(first.cuda() ? &cuda_kernels() : &cpu_kernels()) {
    execution_.device = first.device();
}

void Backend::require(const BorrowedPanel& other) const {
    if (other.place() != place_) {
        other.fail("is on " + other.place() + " and `" + name_ + "` on " + place_ + "; wanted both on one device");
    }
}

const Execution& Backend::prepare(std::int64_t rows, std::int64_t block, std::int64_t matrix_bytes,
                                  std::int64_t staging_bytes) {
    if (!kernels_->on_device()) {
        return execution_;
    }
    const auto whole = [](std::int64_t bytes) { return (bytes + 255) / 256 * 256; };
    const std::int64_t bytes = whole(kernels_->device->workspace_bytes(rows, block));
    const std::int64_t total = bytes + whole(matrix_bytes) + staging_bytes;
#if defined(HESD_EMULATION)
    if (total > total_) {
        memory_ = emulation::device_memory(static_cast<std::size_t>(total));
        execution_.workspace = memory_.get();
    }
#else
    const py::object cuda = py::module_::import(kCudaModule).attr("runtime");
    if (total > total_) {
        memory_ = cuda.attr("workspace")(execution_.device, total);
        execution_.workspace = reinterpret_cast<void*>(memory_.attr("data_ptr")().cast<std::uintptr_t>());
    }
    const py::object stream = cuda.attr("current_stream")(execution_.device);
    execution_.stream = reinterpret_cast<void*>(stream.cast<std::uintptr_t>());
#endif
    total_ = std::max(total, total_);
    execution_.workspace_bytes = bytes;
    execution_.matrices = static_cast<char*>(execution_.workspace) + bytes;
    execution_.matrix_bytes = whole(matrix_bytes);
    execution_.staging = static_cast<char*>(execution_.matrices) + execution_.matrix_bytes;
    execution_.staging_bytes = staging_bytes;
    return execution_;
}

#if defined(HESD_EMULATION)
Unlocked::~Unlocked() { emulation::finish_all(); }
#endif

double* CallMatrices::take(std::int64_t count) {
    if (!kernels_.on_device()) {
        return here_.emplace_back(static_cast<std::size_t>(count)).data();
    }
    double* taken = free_;
    free_ += count;
    return taken;
}

const double* CallMatrices::upload(const double* host, std::int64_t count) {
    if (!kernels_.on_device() || count == 0) {
        return host;
    }
    double* there = take(count);
    // Of pageable memory that nothing else changes: the caller's may be pinned, and is then read later.
    const std::vector<double>& copy = here_.emplace_back(host, host + count);
    kernels_.device->upload(there, copy.data(), bytes_of(count));
    return there;
}

double* CallMatrices::take_for(double* host, std::int64_t count) {
    return !kernels_.on_device() || host == nullptr ? host : take(count);
}

void CallMatrices::fetch(double* host, const double* there, std::int64_t count) {
    if (there != host) {
        download(kernels_, host, there, count);
    }
}

PythonReduction::~PythonReduction() {
    const py::gil_scoped_acquire gil;
    function_ = py::object();
}

void PythonReduction::call(void* context, double* values, std::int64_t count) {
    const py::gil_scoped_acquire gil;
    const auto& self = *static_cast<PythonReduction*>(context);
    // An array that Python owns: a callback may keep it.
    const py::array_t<double> array(count, values);
    self.function_(array);
    std::copy_n(array.data(), count, values);
}

}  // namespace hesd::python
