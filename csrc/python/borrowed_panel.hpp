// Tensors borrowed from Python by DLPack, checked once on entry.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <memory>
#include <string>

#include "hesd/panel.hpp"
#include "python/dlpack.hpp"

namespace hesd::python {

namespace py = pybind11;

// A 2-D tensor, borrowed for as long as this object lives.
class BorrowedPanel {
   public:
    // `working` restricts the precision to float64 and float32.
    BorrowedPanel(const py::object& object, const std::string& name, bool working);

    [[nodiscard]] const Panel& panel() const { return panel_; }
    [[nodiscard]] std::int64_t rows() const { return panel_.rows; }
    [[nodiscard]] std::int64_t columns() const { return panel_.columns; }
    [[nodiscard]] const std::string& name() const { return name_; }
    // Whether it lies on a CUDA device, and on which.
    [[nodiscard]] bool cuda() const { return cuda_; }
    [[nodiscard]] std::int64_t device() const { return device_; }
    [[nodiscard]] std::string place() const { return cuda_ ? "cuda:" + std::to_string(device_) : "the CPU"; }

    // Throws EngineError about this panel.
    [[noreturn]] void fail(const std::string& what) const;
    // These throw where something else is wanted of the two.
    void require_like(const BorrowedPanel& other) const;  // shape and precision
    void require_equal_columns(const BorrowedPanel& other) const;
    void require_apart(const BorrowedPanel& other) const;  // no memory in common

   private:
    [[nodiscard]] dlpack::ManagedTensor* borrow(const py::object& object) const;
    void set_place(const dlpack::Tensor& tensor);
    void set_precision(const dlpack::DataType& dtype, bool working);
    void set_shape(const dlpack::Tensor& tensor);

    std::string name_;
    std::unique_ptr<dlpack::ManagedTensor, void (*)(dlpack::ManagedTensor*)> managed_;
    Panel panel_{};
    bool cuda_ = false;
    std::int64_t device_ = 0;
};

}  // namespace hesd::python
