// One call from Python: the backend that its panels belong to, memory for its small matrices, and the time without the
// GIL.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <cstdint>
#include <initializer_list>
#include <memory>
#include <string>
#include <vector>

#include "dispatch/dispatch.hpp"
#include "kernels/execution.hpp"
#include "python/borrowed_panel.hpp"
#include "small/small_matrix.hpp"

namespace hesd::python {

using Matrix = py::array_t<double, py::array::c_style>;

// Throws EngineError unless it is a float64 matrix of this shape.
Matrix checked_matrix(const py::object& object, const std::string& name, std::int64_t rows, std::int64_t columns);
Matrix to_numpy(const SmallMatrix& matrix);

// For an Execution.
constexpr std::int64_t bytes_of(std::int64_t numbers) { return numbers * static_cast<std::int64_t>(sizeof(double)); }

// The backend that one call's panels belong to, and what it needs to work: for CUDA the stream that is current in
// Python, and a workspace that PyTorch owns.
class Backend {
   public:
    Backend(const BorrowedPanel& first, std::initializer_list<const BorrowedPanel*> others);
    explicit Backend(const BorrowedPanel& first);

    // Throws EngineError where a panel lies elsewhere.
    void require(const BorrowedPanel& other) const;

    [[nodiscard]] const Kernels& kernels() const { return *kernels_; }
    // As it was last prepared.
    [[nodiscard]] const Execution& execution() const { return execution_; }

    // For panels of up to `rows` rows against `block` rows, and so many bytes of small matrices and of staging memory.
    // With the GIL.
    const Execution& prepare(std::int64_t rows, std::int64_t block, std::int64_t matrix_bytes,
                             std::int64_t staging_bytes = 0);

   private:
    std::string name_;
    std::string place_;
    const Kernels* kernels_;
    Execution execution_;
    std::int64_t total_ = 0;
#if defined(HESD_EMULATION)
    std::shared_ptr<void> memory_;
#else
    py::object memory_ = py::none();
#endif
};

// A stretch of work without the GIL.
class Unlocked {
   public:
    explicit Unlocked(const Execution& execution) : scope_(execution) {}
#if defined(HESD_EMULATION)
    // The caller reads panels in the host's memory, and asks no device whether they are done.
    ~Unlocked();
    Unlocked(const Unlocked&) = delete;
    Unlocked& operator=(const Unlocked&) = delete;
#endif

   private:
    ExecutionScope scope_;
    py::gil_scoped_release unlocked_;
};

// The small matrices of one call, where its kernels work; lives within an Unlocked.
class CallMatrices {
   public:
    explicit CallMatrices(const Backend& backend)
        : kernels_(backend.kernels()), free_(static_cast<double*>(current_execution().matrices)) {}

    double* take(std::int64_t count);
    // One of the host's, to be read.
    const double* upload(const double* host, std::int64_t count);
    // One of the host's, to be written and then fetched; may be null.
    double* take_for(double* host, std::int64_t count);
    void fetch(double* host, const double* there, std::int64_t count);

   private:
    const Kernels& kernels_;
    double* free_;
    std::vector<std::vector<double>> here_;
};

// Calls a Python function that sums its argument, a float64 array, over all shards in place.
class PythonReduction {
   public:
    explicit PythonReduction(py::object function) : function_(std::move(function)) {}
    ~PythonReduction();
    PythonReduction(const PythonReduction&) = delete;
    PythonReduction& operator=(const PythonReduction&) = delete;

    Reduction hook() { return function_.is_none() ? Reduction{} : Reduction{&call, this}; }

   private:
    static void call(void* context, double* values, std::int64_t count);

    py::object function_;
};

}  // namespace hesd::python
