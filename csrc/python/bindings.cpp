// The only file that knows Python: takes tensors apart, checks them once, calls the kernels without the GIL.

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "cpu/parallel.hpp"
#include "dispatch/dispatch.hpp"
#include "kernels/execution.hpp"
#include "lanczos/block_lanczos.hpp"
#include "python/dlpack.hpp"
#include "small/pivoted_cholesky_qr.hpp"
#if defined(HESD_EMULATION)
#include "emulation/host.hpp"
#include "emulation/streams.hpp"
#endif

namespace py = pybind11;

namespace {

using hesd::BlockLanczos;
using hesd::EngineError;
using hesd::Panel;
using hesd::Precision;

using Matrix = py::array_t<double, py::array::c_style>;

std::string type_name(const hesd::dlpack::DataType& dtype) {
    const char* kind = "unknown";
    switch (dtype.code) {
        case hesd::dlpack::kInt:
            kind = "int";
            break;
        case hesd::dlpack::kUInt:
            kind = "uint";
            break;
        case hesd::dlpack::kFloat:
            kind = "float";
            break;
        case hesd::dlpack::kBfloat:
            kind = "bfloat";
            break;
        case hesd::dlpack::kComplex:
            kind = "complex";
            break;
        case hesd::dlpack::kBool:
            kind = "bool";
            break;
        default:
            break;
    }
    return kind + std::to_string(dtype.bits);
}

// A 2-D tensor lent by Python for as long as this object lives.
class LentPanel {
   public:
    // `working` restricts the precision to float64 and float32.
    LentPanel(const py::object& object, const std::string& name, bool working) : name_(name) {
        if (!py::hasattr(object, "__dlpack__")) {
            fail("is a " + std::string(py::str(py::type::of(object).attr("__name__"))) +
                 "; wanted a torch.Tensor, a numpy.ndarray or another object with __dlpack__");
        }
        py::object capsule;
        try {
            // Kernels run on the stream that is current where they are called, as whatever made the panel does.
            capsule = on_cuda(object) ? lend_by_cuda(object) : object.attr("__dlpack__")();
        } catch (py::error_already_set& error) {
            if (error.matches(PyExc_KeyboardInterrupt)) {
                throw;
            }
            fail(std::string("cannot be lent by DLPack (") + std::string(py::str(error.value())) +
                 "); a tensor that requires grad needs .detach(), a read-only array needs a copy");
        }
        auto* managed = static_cast<hesd::dlpack::ManagedTensor*>(PyCapsule_GetPointer(capsule.ptr(), "dltensor"));
        if (managed == nullptr) {
            PyErr_Clear();
            fail("gave no DLPack capsule named 'dltensor'");
        }
        PyCapsule_SetName(capsule.ptr(), "used_dltensor");
        managed_ = {managed, [](hesd::dlpack::ManagedTensor* lent) {
                        if (lent->deleter != nullptr) {
                            lent->deleter(lent);
                        }
                    }};
        check(managed->tensor, working);
    }

    [[nodiscard]] const Panel& panel() const { return panel_; }
    [[nodiscard]] const std::string& name() const { return name_; }
    // Whether it lies on a CUDA device, and on which.
    [[nodiscard]] bool cuda() const { return cuda_; }
    [[nodiscard]] std::int64_t device() const { return device_; }
    [[nodiscard]] std::string place() const { return cuda_ ? "cuda:" + std::to_string(device_) : "the CPU"; }

    [[noreturn]] void fail(const std::string& what) const { throw EngineError("`" + name_ + "` " + what); }

    void require_shape(std::int64_t rows, std::int64_t columns) const {
        if (panel_.rows != rows || panel_.columns != columns) {
            fail("has shape (" + std::to_string(panel_.rows) + ", " + std::to_string(panel_.columns) + "); wanted (" +
                 std::to_string(rows) + ", " + std::to_string(columns) + ")");
        }
    }

   private:
    static bool on_cuda(const py::object& object) {
        if (!py::hasattr(object, "__dlpack_device__")) {
            return false;
        }
        const py::tuple device = object.attr("__dlpack_device__")();
        return device[0].cast<int>() == hesd::dlpack::kCuda;
    }

    static py::object lend_by_cuda(const py::object& object) {
#if defined(HESD_EMULATION)
        return object.attr("__dlpack__")(py::arg("stream") = -1);
#else
        return py::module_::import("hesd_fast.cuda").attr("lend")(object);
#endif
    }

    void check(const hesd::dlpack::Tensor& tensor, bool working) {
        if (tensor.device.type == hesd::dlpack::kCuda) {
            try {
                hesd::cuda_kernels();
            } catch (const EngineError& error) {
                fail(std::string("is on a CUDA device; ") + error.what() + ". Move it to the CPU");
            }
            cuda_ = true;
            device_ = tensor.device.id;
        } else if (tensor.device.type != hesd::dlpack::kCpu && tensor.device.type != hesd::dlpack::kCudaHost) {
            fail("is on a device this build has no kernels for. Move it to the CPU");
        }
        if (tensor.ndim != 2) {
            fail("has " + std::to_string(tensor.ndim) + " dimensions; wanted 2: (vectors, elements)");
        }
        const auto dtype = tensor.dtype;
        if (dtype.lanes == 1 && dtype.code == hesd::dlpack::kFloat && dtype.bits == 64) {
            panel_.precision = Precision::float64;
        } else if (dtype.lanes == 1 && dtype.code == hesd::dlpack::kFloat && dtype.bits == 32) {
            panel_.precision = Precision::float32;
        } else if (dtype.lanes == 1 && dtype.code == hesd::dlpack::kFloat && dtype.bits == 16 && !working) {
            panel_.precision = Precision::float16;
        } else if (dtype.lanes == 1 && dtype.code == hesd::dlpack::kBfloat && dtype.bits == 16 && !working) {
            panel_.precision = Precision::bfloat16;
        } else {
            fail("has dtype " + type_name(dtype) + "; wanted " +
                 (working ? "float64 or float32" : "float64, float32, bfloat16 or float16"));
        }
        panel_.rows = tensor.shape[0];
        panel_.columns = tensor.shape[1];
        panel_.stride = panel_.columns;
        if (tensor.strides != nullptr && panel_.rows * panel_.columns > 0) {
            if (panel_.columns > 1 && tensor.strides[1] != 1) {
                fail("has a stride of " + std::to_string(tensor.strides[1]) +
                     " elements within a vector; wanted 1. Pass a contiguous panel");
            }
            if (panel_.rows > 1) {
                panel_.stride = tensor.strides[0];
                if (panel_.stride < panel_.columns) {
                    fail("has vectors " + std::to_string(panel_.stride) +
                         " elements apart that overlap or run backwards; wanted at least " +
                         std::to_string(panel_.columns));
                }
            }
        }
        panel_.data = static_cast<char*>(tensor.data) + tensor.byte_offset;
        const auto address = reinterpret_cast<std::uintptr_t>(panel_.data);
        if (panel_.rows * panel_.columns > 0 && address % hesd::element_bytes(panel_.precision) != 0) {
            fail("starts at an address that is not a multiple of its element size; wanted aligned memory");
        }
    }

    std::string name_;
    std::shared_ptr<hesd::dlpack::ManagedTensor> managed_;
    Panel panel_{};
    bool cuda_ = false;
    std::int64_t device_ = 0;
};

// The backend that one call's panels belong to, and what it needs to work: for CUDA the stream that is current in
// Python, and a workspace that PyTorch owns.
class Backend {
   public:
    Backend(const LentPanel& first, std::initializer_list<const LentPanel*> others) : Backend(first) {
        for (const LentPanel* other : others) {
            require(*other);
        }
    }
    explicit Backend(const LentPanel& first)
        : name_(first.name()),
          place_(first.place()),
          kernels_(first.cuda() ? &hesd::cuda_kernels() : &hesd::cpu_kernels()) {
        execution_.device = first.device();
    }

    void require(const LentPanel& other) const {
        if (other.place() != place_) {
            other.fail("is on " + other.place() + " and `" + name_ + "` on " + place_ + "; wanted both on one device");
        }
    }

    [[nodiscard]] const hesd::Kernels& kernels() const { return *kernels_; }
    // As it was last prepared.
    [[nodiscard]] const hesd::Execution& execution() const { return execution_; }

    // For panels of up to `rows` rows against `block` rows, and so many bytes of small matrices and of staging memory.
    // With the GIL.
    const hesd::Execution& prepare(std::int64_t rows, std::int64_t block, std::int64_t matrix_bytes,
                                   std::int64_t staging_bytes = 0) {
        if (!kernels_->on_device()) {
            return execution_;
        }
        const auto whole = [](std::int64_t bytes) { return (bytes + 255) / 256 * 256; };
        const std::int64_t bytes = whole(kernels_->device->workspace_bytes(rows, block));
        const std::int64_t total = bytes + whole(matrix_bytes) + staging_bytes;
#if defined(HESD_EMULATION)
        if (total > total_) {
            memory_ = hesd::emulation::device_memory(static_cast<std::size_t>(total));
            execution_.workspace = memory_.get();
        }
#else
        const py::module_ python = py::module_::import("hesd_fast.cuda");
        if (total > total_) {
            memory_ = python.attr("workspace")(execution_.device, total);
            execution_.workspace = reinterpret_cast<void*>(memory_.attr("data_ptr")().cast<std::uintptr_t>());
        }
        const py::object stream = python.attr("current_stream")(execution_.device);
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

   private:
    std::string name_;
    std::string place_;
    const hesd::Kernels* kernels_;
    hesd::Execution execution_;
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
    explicit Unlocked(const hesd::Execution& execution) : scope_(execution) {}
#if defined(HESD_EMULATION)
    // The caller reads panels in the host's memory, and asks no device whether they are done.
    ~Unlocked() { hesd::emulation::finish_all(); }
    Unlocked(const Unlocked&) = delete;
    Unlocked& operator=(const Unlocked&) = delete;
#endif

   private:
    hesd::ExecutionScope scope_;
    py::gil_scoped_release unlocked_;
};

// The small matrices of one call, where its kernels work; lives within an Unlocked.
class Matrices {
   public:
    explicit Matrices(const Backend& backend)
        : kernels_(backend.kernels()), free_(static_cast<double*>(hesd::current_execution().matrices)) {}

    double* take(std::int64_t count) {
        if (!kernels_.on_device()) {
            return here_.emplace_back(static_cast<std::size_t>(count)).data();
        }
        double* taken = free_;
        free_ += count;
        return taken;
    }
    // One of the host's, to be read.
    const double* given(const double* host, std::int64_t count) {
        if (!kernels_.on_device() || count == 0) {
            return host;
        }
        double* there = take(count);
        // Of pageable memory that nobody changes: the caller's may be pinned, and is then read later.
        const std::vector<double>& copy = here_.emplace_back(host, host + count);
        kernels_.device->upload(there, copy.data(), count * static_cast<std::int64_t>(sizeof(double)));
        return there;
    }
    // One of the host's, to be written and then fetched; may be null.
    double* wanted(double* host, std::int64_t count) {
        return !kernels_.on_device() || host == nullptr ? host : take(count);
    }
    void fetch(double* host, const double* there, std::int64_t count) {
        if (there != host) {
            hesd::download(kernels_, host, there, count);
        }
    }

   private:
    const hesd::Kernels& kernels_;
    double* free_;
    std::vector<std::vector<double>> here_;
};

// For an Execution.
constexpr std::int64_t bytes_of(std::int64_t numbers) { return numbers * static_cast<std::int64_t>(sizeof(double)); }

void require_equal_columns(const LentPanel& a, const LentPanel& b) {
    if (a.panel().columns != b.panel().columns) {
        a.fail("has vectors of " + std::to_string(a.panel().columns) + " elements and `" + b.name() + "` of " +
               std::to_string(b.panel().columns) + "; wanted the same length");
    }
}

bool overlaps(const Panel& a, const Panel& b) {
    const auto extent = [](const Panel& p) {
        const auto first = reinterpret_cast<std::uintptr_t>(p.data);
        const std::int64_t elements = p.rows > 0 && p.columns > 0 ? (p.rows - 1) * p.stride + p.columns : 0;
        return std::pair(first, first + static_cast<std::uintptr_t>(elements * hesd::element_bytes(p.precision)));
    };
    const auto [a_first, a_last] = extent(a);
    const auto [b_first, b_last] = extent(b);
    return a_first < b_last && b_first < a_last;
}

void require_apart(const LentPanel& a, const LentPanel& b) {
    if (overlaps(a.panel(), b.panel())) {
        a.fail("shares memory with `" + b.name() + "`; wanted separate panels");
    }
}

// The history of BlockLanczos: one panel, or a list of panels that hold its columns one after another.
class LentHistory {
   public:
    LentHistory(const py::object& object, const std::string& name) : is_list_(py::isinstance<py::list>(object)) {
        if (is_list_) {
            for (const py::handle tile : object.cast<py::list>()) {
                tiles_.emplace_back(tile.cast<py::object>(), name + "[" + std::to_string(tiles_.size()) + "]", false);
                if (tiles_.back().panel().rows != tiles_.front().panel().rows ||
                    tiles_.back().panel().precision != tiles_.front().panel().precision) {
                    tiles_.back().fail("differs from the first tile in its number of vectors or its dtype");
                }
            }
            if (tiles_.empty()) {
                throw EngineError("`" + name + "` is an empty list; wanted a panel or a list of panels");
            }
        } else {
            tiles_.emplace_back(object, name, false);
        }
    }

    // Whether its tiles lie in the host's memory while `backend` works on a device.
    [[nodiscard]] bool far(const Backend& backend) const {
        return is_list_ && backend.kernels().on_device() && !tiles_.front().cuda();
    }

    // Staging memory that `backend` needs for it.
    [[nodiscard]] std::int64_t staging_bytes(const Backend& backend) const {
        if (!far(backend)) {
            return 0;
        }
        std::int64_t columns = 0;
        for (const LentPanel& tile : tiles_) {
            columns = std::max(columns, tile.panel().columns);
        }
        return backend.kernels().device->staging.bytes(rows(), columns, tiles_.front().panel().precision);
    }

    [[nodiscard]] hesd::BasisPanel tiled(const Backend& backend) const {
        std::vector<Panel> panels;
        for (const LentPanel& tile : tiles_) {
            panels.push_back(tile.panel());
        }
        return hesd::BasisPanel(backend.kernels(), std::move(panels), far(backend));
    }

    // Separate memory from that of `panel`, on the same device or, in tiles, all in the host's memory.
    void require_beside(const LentPanel& panel, const Backend& backend) const {
        for (const LentPanel& tile : tiles_) {
            if (far(backend)) {
                Backend(tiles_.front()).require(tile);
            } else {
                backend.require(tile);
            }
            require_apart(tile, panel);
        }
    }
    [[nodiscard]] std::int64_t rows() const { return tiles_.front().panel().rows; }

   private:
    bool is_list_;
    std::vector<LentPanel> tiles_;
};

Matrix checked_matrix(const py::object& object, const std::string& name, std::int64_t rows, std::int64_t columns) {
    const auto matrix = Matrix::ensure(object);
    if (!matrix || matrix.ndim() != 2 || matrix.shape(0) != rows || matrix.shape(1) != columns) {
        PyErr_Clear();
        throw EngineError("`" + name + "` is not a float64 matrix of shape (" + std::to_string(rows) + ", " +
                          std::to_string(columns) + ")");
    }
    return matrix;
}

Matrix to_numpy(const hesd::SmallMatrix& matrix) {
    Matrix result({matrix.rows, matrix.columns});
    std::copy(matrix.values.begin(), matrix.values.end(), result.mutable_data());
    return result;
}

// Calls a Python function that sums its argument, a float64 array, over all shards in place.
class PythonReduction {
   public:
    explicit PythonReduction(py::object function) : function_(std::move(function)) {}
    ~PythonReduction() {
        const py::gil_scoped_acquire gil;
        function_ = py::object();
    }
    PythonReduction(const PythonReduction&) = delete;
    PythonReduction& operator=(const PythonReduction&) = delete;

    hesd::Reduction hook() { return function_.is_none() ? hesd::Reduction{} : hesd::Reduction{&call, this}; }

   private:
    static void call(void* context, double* values, std::int64_t count) {
        const py::gil_scoped_acquire gil;
        const auto& self = *static_cast<PythonReduction*>(context);
        // An array that Python owns: a callback may keep it.
        const py::array_t<double> array(count, values);
        self.function_(array);
        std::copy_n(array.data(), count, values);
    }

    py::object function_;
};

Matrix panel_gram(const py::object& v_object, const py::object& w_object) {
    const LentPanel v(v_object, "V", false);
    const LentPanel w(w_object, "W", true);
    require_equal_columns(v, w);
    Backend backend(w, {&v});
    Matrix gram({v.panel().rows, w.panel().rows});
    double* data = gram.mutable_data();
    {
        const std::int64_t count = v.panel().rows * w.panel().rows;
        const Unlocked unlocked(backend.prepare(v.panel().rows, w.panel().rows, bytes_of(count)));
        Matrices matrices(backend);
        double* there = matrices.wanted(data, count);
        backend.kernels().panel_gram(v.panel(), w.panel(), there);
        matrices.fetch(data, there, count);
    }
    return gram;
}

py::tuple panel_project(const py::object& w_object, const py::object& v_object, const py::object& c_object,
                        bool with_gram, bool with_self_gram, std::int64_t gram_only) {
    const LentPanel w(w_object, "W", true);
    const LentPanel v(v_object, "V", false);
    require_equal_columns(v, w);
    require_apart(w, v);
    Backend backend(w, {&v});
    if (gram_only < 0 || gram_only > v.panel().rows) {
        throw EngineError("`gram_only` is " + std::to_string(gram_only) + "; wanted 0 to " +
                          std::to_string(v.panel().rows) + ", the number of vectors of `V`");
    }
    const Matrix c = checked_matrix(c_object, "C", v.panel().rows - gram_only, w.panel().rows);
    Matrix gram({with_gram ? v.panel().rows : 0, w.panel().rows});
    Matrix self_gram({with_self_gram ? w.panel().rows : 0, w.panel().rows});
    double* gram_data = with_gram ? gram.mutable_data() : nullptr;
    double* self_data = with_self_gram ? self_gram.mutable_data() : nullptr;
    const double* c_data = c.data();
    {
        const std::int64_t b = w.panel().rows;
        const std::int64_t count = v.panel().rows * b;
        const Unlocked unlocked(backend.prepare(v.panel().rows, b, bytes_of(2 * count + b * b)));
        Matrices matrices(backend);
        const double* c_there = matrices.given(c_data, (v.panel().rows - gram_only) * b);
        double* gram_there = matrices.wanted(gram_data, count);
        double* self_there = matrices.wanted(self_data, b * b);
        backend.kernels().panel_project(w.panel(), v.panel(), gram_only, c_there, gram_there, self_there);
        matrices.fetch(gram_data, gram_there, count);
        matrices.fetch(self_data, self_there, b * b);
    }
    return py::make_tuple(gram, self_gram);
}

py::tuple panel_orthonormalize(const py::object& w_object, const py::object& out_object, double tolerance,
                               std::int64_t max_rank, const py::object& reduce) {
    const LentPanel w(w_object, "W", true);
    const LentPanel out(out_object, "out", true);
    out.require_shape(w.panel().rows, w.panel().columns);
    if (out.panel().precision != w.panel().precision) {
        out.fail("has another precision than `W`; wanted the same");
    }
    if (out.panel().data != w.panel().data || out.panel().stride != w.panel().stride) {
        require_apart(w, out);
    }
    Backend backend(w, {&out});
    if (!(tolerance >= 0.0)) {
        throw EngineError("`tolerance` is " + std::to_string(tolerance) + "; wanted a number >= 0");
    }
    if (max_rank < 0) {
        throw EngineError("`max_rank` is " + std::to_string(max_rank) + "; wanted a number >= 0");
    }
    const std::int64_t b = w.panel().rows;
    Matrix factor({b, b});
    double* data = factor.mutable_data();
    PythonReduction reduction(reduce);
    hesd::OrthonormalizeFacts facts{};
    {
        const std::int64_t numbers = hesd::orthonormalization_numbers(b);
        const Unlocked unlocked(backend.prepare(b, b, bytes_of(numbers)));
        const hesd::Kernels& kernels = backend.kernels();
        Matrices matrices(backend);
        hesd::LanczosStep begin{};
        begin.tolerance = tolerance;
        begin.max_rank = max_rank;
        begin.orthonormalization = hesd::orthonormalization_in(matrices.take(numbers), b, b);
        const hesd::Orthonormalization& state = begin.orthonormalization;
        kernels.panel_gram(w.panel(), w.panel(), state.gram);
        hesd::reduce(kernels.device, reduction.hook(), state.gram, b * b);
        kernels.lanczos_task(hesd::StepTask::begin_rows, begin);
        facts = hesd::orthonormalize(kernels, w.panel(), out.panel(), state, reduction.hook());
        matrices.fetch(data, state.factor, b * b);
    }
    return py::make_tuple(facts.rank, facts.weakest, factor);
}

void panel_combine(const py::object& s_object, const py::object& v_object, const py::object& x_object) {
    const LentPanel v(v_object, "V", false);
    const LentPanel x(x_object, "X", false);
    require_equal_columns(v, x);
    require_apart(x, v);
    const Matrix s = checked_matrix(s_object, "S", x.panel().rows, v.panel().rows);
    const double* data = s.data();
    Backend backend(x, {&v});
    const std::int64_t count = x.panel().rows * v.panel().rows;
    const Unlocked unlocked(backend.prepare(v.panel().rows, x.panel().rows, bytes_of(count)));
    Matrices matrices(backend);
    backend.kernels().panel_combine(matrices.given(data, count), v.panel(), x.panel());
}

void accumulate_hvp(const py::object& out_object, const std::vector<py::object>& part_objects,
                    const std::vector<std::int64_t>& offsets, double alpha, const py::object& compensation_object) {
    const LentPanel out(out_object, "out", true);
    if (!std::isfinite(alpha)) {
        throw EngineError("`alpha` is " + std::to_string(alpha) + "; wanted a finite number");
    }
    if (part_objects.size() != offsets.size()) {
        throw EngineError("`parts` has " + std::to_string(part_objects.size()) + " tensors and `offsets` " +
                          std::to_string(offsets.size()) + " numbers; wanted one offset for each part");
    }
    Backend backend(out);
    std::vector<LentPanel> lent;
    std::vector<hesd::HvpPart> parts;
    lent.reserve(part_objects.size());
    std::vector<std::pair<std::int64_t, std::int64_t>> ranges;
    for (std::size_t i = 0; i < part_objects.size(); ++i) {
        lent.emplace_back(part_objects[i], "parts[" + std::to_string(i) + "]", false);
        const Panel& part = lent.back().panel();
        if (part.rows != out.panel().rows || offsets[i] < 0 || offsets[i] > out.panel().columns - part.columns) {
            lent.back().fail("has shape (" + std::to_string(part.rows) + ", " + std::to_string(part.columns) +
                             ") at offset " + std::to_string(offsets[i]) +
                             ", which does not fit into `out` of shape (" + std::to_string(out.panel().rows) + ", " +
                             std::to_string(out.panel().columns) + ")");
        }
        if (hesd::element_bytes(part.precision) > hesd::element_bytes(out.panel().precision)) {
            lent.back().fail("has a higher precision than `out`; wanted the same or a lower one");
        }
        backend.require(lent.back());
        require_apart(lent.back(), out);
        parts.push_back({part, offsets[i]});
        if (part.columns > 0) {
            ranges.emplace_back(offsets[i], offsets[i] + part.columns);
        }
    }
    std::sort(ranges.begin(), ranges.end());
    for (std::size_t i = 1; i < ranges.size(); ++i) {
        if (ranges[i].first < ranges[i - 1].second) {
            throw EngineError("`offsets` makes two parts overlap at column " + std::to_string(ranges[i].first) +
                              " of `out`; wanted disjoint column ranges");
        }
    }
    std::optional<LentPanel> compensation;
    if (!compensation_object.is_none()) {
        compensation.emplace(compensation_object, "compensation", true);
        compensation->require_shape(out.panel().rows, out.panel().columns);
        if (compensation->panel().precision != out.panel().precision) {
            compensation->fail("has another precision than `out`; wanted the same");
        }
        backend.require(*compensation);
        require_apart(*compensation, out);
        for (const LentPanel& part : lent) {
            require_apart(part, *compensation);
        }
    }
    const auto count = static_cast<std::int64_t>(parts.size());
    const Unlocked unlocked(backend.prepare(0, 0, 0));
    backend.kernels().accumulate_hvp(out.panel(), parts.data(), count, alpha,
                                     compensation ? &compensation->panel() : nullptr);
}

void fill_probes(const py::object& out_object, std::uint64_t seed, std::uint32_t first_probe, std::uint64_t first_index,
                 const std::string& kind) {
    const LentPanel out(out_object, "out", true);
    if (kind != "rademacher" && kind != "gaussian") {
        throw EngineError("`kind` is '" + kind + "'; wanted 'rademacher' or 'gaussian'");
    }
    const auto value = kind == "gaussian" ? hesd::ProbeKind::gaussian : hesd::ProbeKind::rademacher;
    Backend backend(out);
    const Unlocked unlocked(backend.prepare(0, 0, 0));
    backend.kernels().fill_probes(out.panel(), seed, first_probe, first_index, value);
}

hesd::Reorthogonalization parse_reorthogonalization(const std::string& name) {
    if (name == "full") {
        return hesd::Reorthogonalization::full;
    }
    if (name == "window") {
        return hesd::Reorthogonalization::window;
    }
    if (name == "none") {
        return hesd::Reorthogonalization::none;
    }
    if (name == "partial") {
        return hesd::Reorthogonalization::partial;
    }
    throw EngineError("`reorthogonalization` is '" + name + "'; wanted 'full', 'partial', 'window' or 'none'");
}

// BlockLanczos with the panels and the reduction that Python lends it.
class PythonBlockLanczos {
   public:
    PythonBlockLanczos(const py::object& history, const py::object& working, std::int64_t block_size,
                       std::int64_t max_steps, std::int64_t global_size, const std::string& reorthogonalization,
                       double breakdown_multiple, const py::object& reduce)
        : history_(history, "history"),
          working_panel_(working, "working", true),
          reduction_(reduce),
          backend_(working_panel_),
          block_size_(block_size),
          lanczos_(
              backend_.kernels(), history_.tiled(backend_), working_panel_.panel(),
              {parse_reorthogonalization(reorthogonalization), block_size, max_steps, global_size, breakdown_multiple},
              reduction_.hook()) {
        history_.require_beside(working_panel_, backend_);
    }
    // Copies may still be under way to or from memory that is given back now.
    ~PythonBlockLanczos() {
        if (history_.far(backend_)) {
            const hesd::ExecutionScope scope(backend_.execution());
            try {
                backend_.kernels().device->staging.finish();
            } catch (const EngineError&) {  // a device that has failed copies nothing more
            }
        }
    }
    PythonBlockLanczos(const PythonBlockLanczos&) = delete;
    PythonBlockLanczos& operator=(const PythonBlockLanczos&) = delete;

    void start() {
        const Working working(*this);
        const Unlocked unlocked(prepare());
        lanczos_.start();
    }
    void advance() {
        const Working working(*this);
        const Unlocked unlocked(prepare());
        lanczos_.advance();
    }
    double measure_orthogonality() {
        const Working working(*this);
        const Unlocked unlocked(prepare());
        return lanczos_.measure_orthogonality();
    }
    [[nodiscard]] const BlockLanczos& lanczos() const {
        if (working_) {
            fail_working();
        }
        return lanczos_;
    }

   private:
    // Steps run without the GIL; meanwhile nobody else may step or read. Taken and given back with the GIL held.
    class Working {
       public:
        explicit Working(PythonBlockLanczos& owner) : owner_(owner) {
            if (owner_.working_) {
                fail_working();
            }
            owner_.working_ = true;
        }
        ~Working() { owner_.working_ = false; }
        Working(const Working&) = delete;
        Working& operator=(const Working&) = delete;

       private:
        PythonBlockLanczos& owner_;
    };

    const hesd::Execution& prepare() {
        const std::int64_t rows = history_.rows() + working_panel_.panel().rows;
        return backend_.prepare(rows, block_size_, hesd::BlockGramSchmidt::matrix_bytes(rows, block_size_),
                                history_.staging_bytes(backend_));
    }

    [[noreturn]] static void fail_working() {
        throw EngineError("BlockLanczos is in the middle of a step on another thread; wait for it to return");
    }

    std::atomic<bool> working_{false};
    LentHistory history_;
    LentPanel working_panel_;
    PythonReduction reduction_;
    Backend backend_;
    std::int64_t block_size_;
    BlockLanczos lanczos_;
};

py::list matrices(const std::vector<hesd::SmallMatrix>& blocks) {
    py::list result;
    for (const auto& block : blocks) {
        result.append(to_numpy(block));
    }
    return result;
}

py::dict build_info() {
    py::dict info;
    info["version"] = HESD_VERSION;
    info["compiler"] = HESD_COMPILER;
    info["cpu_target"] = hesd::cpu_kernels().name;
    info["cpu_targets_available"] = hesd::available_targets();
    info["threads"] = hesd::most_threads();
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

}  // namespace

PYBIND11_MODULE(_engine, module) {
    module.doc() =
        "Compiled kernels and block Lanczos of hesd-fast. Use hesd_fast.kernels and hesd_fast.block_lanczos.";

    py::register_exception_translator([](std::exception_ptr pointer) {
        const auto raise = [](const char* type, const EngineError& error) {
            PyErr_SetString(py::module_::import("hesd_fast.errors").attr(type).ptr(), error.what());
        };
        try {
            if (pointer) {
                std::rethrow_exception(pointer);
            }
        } catch (const hesd::NumericalError& error) {
            raise("NumericalError", error);
        } catch (const EngineError& error) {
            raise("EngineError", error);
        }
    });

    module.def("build_info", &build_info);
    module.def("select_target", &hesd::select_target, py::arg("name"));
    module.def("panel_gram", &panel_gram, py::arg("V"), py::arg("W"));
    module.def("panel_project", &panel_project, py::arg("W"), py::arg("V"), py::arg("C"), py::arg("gram") = true,
               py::arg("self_gram") = true, py::arg("gram_only") = 0);
    module.def("panel_orthonormalize", &panel_orthonormalize, py::arg("W"), py::arg("out"), py::arg("tolerance"),
               py::arg("max_rank"), py::arg("reduce"));
    module.def("panel_combine", &panel_combine, py::arg("S"), py::arg("V"), py::arg("X"));
    module.def("accumulate_hvp", &accumulate_hvp, py::arg("out"), py::arg("parts"), py::arg("offsets"),
               py::arg("alpha"), py::arg("compensation"));
    module.def("fill_probes", &fill_probes, py::arg("out"), py::arg("seed"), py::arg("first_probe"),
               py::arg("first_index"), py::arg("kind"));

    module.def(
        "pin",
        [](std::uintptr_t address, std::int64_t bytes) {
            const hesd::Kernels& kernels = hesd::cuda_kernels();
            const py::gil_scoped_release unlocked;
            kernels.device->staging.pin(reinterpret_cast<void*>(address), bytes);
        },
        py::arg("address"), py::arg("bytes"));
    module.def(
        "unpin",
        [](std::uintptr_t address) {
            const hesd::Kernels& kernels = hesd::cuda_kernels();
            const py::gil_scoped_release unlocked;
            kernels.device->staging.unpin(reinterpret_cast<void*>(address));
        },
        py::arg("address"));

#if defined(HESD_EMULATION)
    // Bytes of panels that the emulated kernels have moved since the last call: read, read again, written.
    module.def("take_traffic", [] {
        const hesd::emulation::Traffic traffic = hesd::emulation::take_traffic();
        return py::make_tuple(traffic.read, traffic.read_again, traffic.written);
    });
    // Launches of each kernel since the last call, and the most shared memory that its blocks had.
    module.def("take_launches", [] {
        py::dict found;
        for (const auto& [name, launches] : hesd::emulation::take_launches()) {
            found[py::str(name)] = py::make_tuple(launches.count, launches.shared_bytes);
        }
        return found;
    });
    // When work is done that was put on streams, see emulation/streams.hpp.
    module.def("defer", &hesd::emulation::defer, py::arg("order"));
    // How often the host has waited for the emulated device since the last call.
    module.def("take_waits", &hesd::emulation::take_waits);
#endif

    py::class_<PythonBlockLanczos>(module, "BlockLanczos", py::module_local())
        .def(py::init<const py::object&, const py::object&, std::int64_t, std::int64_t, std::int64_t,
                      const std::string&, double, const py::object&>(),
             py::arg("history"), py::arg("working"), py::arg("block_size"), py::arg("max_steps"),
             py::arg("global_size"), py::arg("reorthogonalization"), py::arg("breakdown_multiple"), py::arg("reduce"))
        .def("start", &PythonBlockLanczos::start)
        .def("advance", &PythonBlockLanczos::advance)
        .def_property_readonly("current_row",
                               [](const PythonBlockLanczos& self) { return self.lanczos().current_row(); })
        .def_property_readonly("work_row", [](const PythonBlockLanczos& self) { return self.lanczos().work_row(); })
        .def_property_readonly("current_width",
                               [](const PythonBlockLanczos& self) { return self.lanczos().current_width(); })
        .def_property_readonly("finished", [](const PythonBlockLanczos& self) { return self.lanczos().finished(); })
        .def_property_readonly("invariant", [](const PythonBlockLanczos& self) { return self.lanczos().invariant(); })
        .def_property_readonly("steps", [](const PythonBlockLanczos& self) { return self.lanczos().steps(); })
        .def_property_readonly("start_factor",
                               [](const PythonBlockLanczos& self) { return to_numpy(self.lanczos().start_factor()); })
        .def_property_readonly("diagonal",
                               [](const PythonBlockLanczos& self) { return matrices(self.lanczos().diagonal()); })
        .def_property_readonly("offdiagonal",
                               [](const PythonBlockLanczos& self) { return matrices(self.lanczos().offdiagonal()); })
        .def_property_readonly("scale", [](const PythonBlockLanczos& self) { return self.lanczos().scale(); })
        .def_property_readonly("recurrence_error",
                               [](const PythonBlockLanczos& self) { return self.lanczos().recurrence_error(); })
        .def_property_readonly("extra_sweeps",
                               [](const PythonBlockLanczos& self) { return self.lanczos().extra_sweeps(); })
        .def_property_readonly("partial_sweeps",
                               [](const PythonBlockLanczos& self) { return self.lanczos().partial_sweeps(); })
        .def_property_readonly("vectors_read",
                               [](const PythonBlockLanczos& self) { return self.lanczos().vectors_read(); })
        .def_property_readonly("estimated_overlap",
                               [](const PythonBlockLanczos& self) { return self.lanczos().estimated_overlap(); })
        .def("measure_orthogonality", &PythonBlockLanczos::measure_orthogonality);
}
