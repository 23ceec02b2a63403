#include "python/borrowed_panel.hpp"

#include <iterator>
#include <utility>

#include "dispatch/dispatch.hpp"
#include "python/python_modules.hpp"

namespace hesd::python {
namespace {

std::string type_name(const dlpack::DataType& dtype) {
    constexpr const char* kinds[] = {"int", "uint", "float", "unknown", "bfloat", "complex", "bool"};  // by TypeCode
    return (dtype.code < std::size(kinds) ? kinds[dtype.code] : "unknown") + std::to_string(dtype.bits);
}

bool on_cuda(const py::object& object) {
    if (!py::hasattr(object, "__dlpack_device__")) {
        return false;
    }
    const py::tuple device = object.attr("__dlpack_device__")();
    return device[0].cast<int>() == dlpack::kCuda;
}

// Kernels run on the stream that is current where they are called, as whatever made the panel does.
py::object capsule_of(const py::object& object) {
    if (!on_cuda(object)) {
        return object.attr("__dlpack__")();
    }
#if defined(HESD_EMULATION)
    return object.attr("__dlpack__")(py::arg("stream") = -1);
#else
    return py::module_::import(kCudaModule).attr("runtime").attr("dlpack_capsule")(object);
#endif
}

void give_back(dlpack::ManagedTensor* managed) {
    if (managed->deleter != nullptr) {
        managed->deleter(managed);
    }
}

// The bytes from the first element to the last.
std::pair<std::uintptr_t, std::uintptr_t> extent(const Panel& panel) {
    const auto first = reinterpret_cast<std::uintptr_t>(panel.data);
    const std::int64_t elements =
        panel.rows > 0 && panel.columns > 0 ? (panel.rows - 1) * panel.stride + panel.columns : 0;
    return {first, first + static_cast<std::uintptr_t>(elements * element_bytes(panel.precision))};
}

std::string shape_of(std::int64_t rows, std::int64_t columns) {
    return "(" + std::to_string(rows) + ", " + std::to_string(columns) + ")";
}

}  // namespace

BorrowedPanel::BorrowedPanel(const py::object& object, const std::string& name, bool working)
    : name_(name), managed_(borrow(object), give_back) {
    const dlpack::Tensor& tensor = managed_->tensor;
    set_place(tensor);
    if (tensor.ndim != 2) {
        fail("has " + std::to_string(tensor.ndim) + " dimensions; wanted 2: (vectors, elements)");
    }
    set_precision(tensor.dtype, working);
    set_shape(tensor);
    panel_.data = static_cast<char*>(tensor.data) + tensor.byte_offset;
    const auto address = reinterpret_cast<std::uintptr_t>(panel_.data);
    if (panel_.rows * panel_.columns > 0 && address % element_bytes(panel_.precision) != 0) {
        fail("starts at an address that is not a multiple of its element size; wanted aligned memory");
    }
}

dlpack::ManagedTensor* BorrowedPanel::borrow(const py::object& object) const {
    if (!py::hasattr(object, "__dlpack__")) {
        fail("is a " + std::string(py::str(py::type::of(object).attr("__name__"))) +
             "; wanted a torch.Tensor, a numpy.ndarray or another object with __dlpack__");
    }
    py::object capsule;
    try {
        capsule = capsule_of(object);
    } catch (py::error_already_set& error) {
        if (error.matches(PyExc_KeyboardInterrupt)) {
            throw;
        }
        fail(std::string("cannot be borrowed by DLPack (") + std::string(py::str(error.value())) +
             "); a tensor that requires grad needs .detach(), a read-only array needs a copy");
    }
    auto* managed = static_cast<dlpack::ManagedTensor*>(PyCapsule_GetPointer(capsule.ptr(), "dltensor"));
    if (managed == nullptr) {
        PyErr_Clear();
        fail("gave no DLPack capsule named 'dltensor'");
    }
    PyCapsule_SetName(capsule.ptr(), "used_dltensor");
    return managed;
}

void BorrowedPanel::set_place(const dlpack::Tensor& tensor) {
    if (tensor.device.type == dlpack::kCuda) {
        try {
            cuda_kernels();
        } catch (const EngineError& error) {
            fail(std::string("is on a CUDA device; ") + error.what() + ". Move it to the CPU");
        }
        cuda_ = true;
        device_ = tensor.device.id;
    } else if (tensor.device.type != dlpack::kCpu && tensor.device.type != dlpack::kCudaHost) {
        fail("is on a device this build has no kernels for. Move it to the CPU");
    }
}

void BorrowedPanel::set_precision(const dlpack::DataType& dtype, bool working) {
    const auto is = [&](dlpack::TypeCode code, int bits) {
        return dtype.lanes == 1 && dtype.code == code && dtype.bits == bits;
    };
    if (is(dlpack::kFloat, 64)) {
        panel_.precision = Precision::float64;
    } else if (is(dlpack::kFloat, 32)) {
        panel_.precision = Precision::float32;
    } else if (is(dlpack::kFloat, 16) && !working) {
        panel_.precision = Precision::float16;
    } else if (is(dlpack::kBfloat, 16) && !working) {
        panel_.precision = Precision::bfloat16;
    } else {
        fail("has dtype " + type_name(dtype) + "; wanted " +
             (working ? "float64 or float32" : "float64, float32, bfloat16 or float16"));
    }
}

void BorrowedPanel::set_shape(const dlpack::Tensor& tensor) {
    panel_.rows = tensor.shape[0];
    panel_.columns = tensor.shape[1];
    panel_.stride = panel_.columns;
    if (tensor.strides == nullptr || panel_.rows * panel_.columns == 0) {
        return;
    }
    if (panel_.columns > 1 && tensor.strides[1] != 1) {
        fail("has a stride of " + std::to_string(tensor.strides[1]) +
             " elements within a vector; wanted 1. Pass a contiguous panel");
    }
    if (panel_.rows > 1) {
        panel_.stride = tensor.strides[0];
        if (panel_.stride < panel_.columns) {
            fail("has vectors " + std::to_string(panel_.stride) +
                 " elements apart that overlap or run backwards; wanted at least " + std::to_string(panel_.columns));
        }
    }
}

void BorrowedPanel::fail(const std::string& what) const { throw EngineError("`" + name_ + "` " + what); }

void BorrowedPanel::require_like(const BorrowedPanel& other) const {
    if (rows() != other.rows() || columns() != other.columns()) {
        fail("has shape " + shape_of(rows(), columns()) + "; wanted " + shape_of(other.rows(), other.columns()));
    }
    if (panel_.precision != other.panel_.precision) {
        fail("has another precision than `" + other.name_ + "`; wanted the same");
    }
}

void BorrowedPanel::require_equal_columns(const BorrowedPanel& other) const {
    if (columns() != other.columns()) {
        fail("has vectors of " + std::to_string(columns()) + " elements and `" + other.name_ + "` of " +
             std::to_string(other.columns()) + "; wanted the same length");
    }
}

void BorrowedPanel::require_apart(const BorrowedPanel& other) const {
    const auto [first, last] = extent(panel_);
    const auto [other_first, other_last] = extent(other.panel_);
    if (first < other_last && other_first < last) {
        fail("shares memory with `" + other.name_ + "`; wanted separate panels");
    }
}

}  // namespace hesd::python
