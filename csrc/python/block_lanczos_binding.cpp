// BlockLanczos as Python drives it.

#include <algorithm>
#include <atomic>
#include <utility>

#include "lanczos/block_lanczos.hpp"
#include "python/call.hpp"
#include "python/registration.hpp"

namespace hesd::python {
namespace {

// The history of BlockLanczos: one panel, or a list of panels that hold its columns one after another.
class BorrowedHistory {
   public:
    BorrowedHistory(const py::object& object, const std::string& name) : is_list_(py::isinstance<py::list>(object)) {
        if (!is_list_) {
            tiles_.emplace_back(object, name, false);
            return;
        }
        for (const py::handle tile : object.cast<py::list>()) {
            tiles_.emplace_back(tile.cast<py::object>(), name + "[" + std::to_string(tiles_.size()) + "]", false);
            if (tiles_.back().rows() != rows() || tiles_.back().panel().precision != tiles_.front().panel().precision) {
                tiles_.back().fail("differs from the first tile in its number of vectors or its dtype");
            }
        }
        if (tiles_.empty()) {
            throw EngineError("`" + name + "` is an empty list; wanted a panel or a list of panels");
        }
    }

    [[nodiscard]] std::int64_t rows() const { return tiles_.front().rows(); }

    // Whether its tiles lie in the host's memory while `backend` works on a device.
    [[nodiscard]] bool in_host_memory(const Backend& backend) const {
        return is_list_ && backend.kernels().on_device() && !tiles_.front().cuda();
    }

    // Staging memory that `backend` needs for it.
    [[nodiscard]] std::int64_t staging_bytes(const Backend& backend) const {
        if (!in_host_memory(backend)) {
            return 0;
        }
        std::int64_t columns = 0;
        for (const BorrowedPanel& tile : tiles_) {
            columns = std::max(columns, tile.columns());
        }
        return backend.kernels().device->staging.bytes(rows(), columns, tiles_.front().panel().precision);
    }

    [[nodiscard]] BasisPanel basis_panel(const Backend& backend) const {
        std::vector<Panel> panels;
        for (const BorrowedPanel& tile : tiles_) {
            panels.push_back(tile.panel());
        }
        return BasisPanel(backend.kernels(), std::move(panels), in_host_memory(backend));
    }

    // Separate memory from that of `panel`, on the same device or, in tiles, all in the host's memory.
    void require_beside(const BorrowedPanel& panel, const Backend& backend) const {
        for (const BorrowedPanel& tile : tiles_) {
            if (in_host_memory(backend)) {
                Backend(tiles_.front()).require(tile);
            } else {
                backend.require(tile);
            }
            tile.require_apart(panel);
        }
    }

   private:
    bool is_list_;
    std::vector<BorrowedPanel> tiles_;
};

Reorthogonalization parse_reorthogonalization(const std::string& name) {
    const std::pair<const char*, Reorthogonalization> modes[] = {{"full", Reorthogonalization::full},
                                                                 {"partial", Reorthogonalization::partial},
                                                                 {"window", Reorthogonalization::window},
                                                                 {"none", Reorthogonalization::none}};
    for (const auto& [known, mode] : modes) {
        if (name == known) {
            return mode;
        }
    }
    throw EngineError("`reorthogonalization` is '" + name + "'; wanted 'full', 'partial', 'window' or 'none'");
}

// BlockLanczos with the panels and the reduction that it borrows from Python.
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
              backend_.kernels(), history_.basis_panel(backend_), working_panel_.panel(),
              {parse_reorthogonalization(reorthogonalization), block_size, max_steps, global_size, breakdown_multiple},
              reduction_.hook()) {
        history_.require_beside(working_panel_, backend_);
    }
    // Copies may still be under way to or from memory that is given back now.
    ~PythonBlockLanczos() {
        if (history_.in_host_memory(backend_)) {
            const ExecutionScope scope(backend_.execution());
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
    // Steps run without the GIL; until they return, no other thread may step or read. Taken and given back with the GIL
    // held.
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

    const Execution& prepare() {
        const std::int64_t rows = history_.rows() + working_panel_.rows();
        return backend_.prepare(rows, block_size_, BlockGramSchmidt::matrix_bytes(rows, block_size_),
                                history_.staging_bytes(backend_));
    }

    [[noreturn]] static void fail_working() {
        throw EngineError("BlockLanczos is in the middle of a step on another thread; wait for it to return");
    }

    std::atomic<bool> working_{false};
    BorrowedHistory history_;
    BorrowedPanel working_panel_;
    PythonReduction reduction_;
    Backend backend_;
    std::int64_t block_size_;
    BlockLanczos lanczos_;
};

template <typename T>
const T& converted(const T& value) {
    return value;
}
Matrix converted(const SmallMatrix& matrix) { return to_numpy(matrix); }
py::list converted(const std::vector<SmallMatrix>& blocks) {
    py::list result;
    for (const SmallMatrix& block : blocks) {
        result.append(to_numpy(block));
    }
    return result;
}

// A property that a method of BlockLanczos gives.
template <typename Method>
auto reader(Method method) {
    return [method](const PythonBlockLanczos& self) { return converted((self.lanczos().*method)()); };
}

}  // namespace

void register_block_lanczos(py::module_& module) {
    py::class_<PythonBlockLanczos>(module, "BlockLanczos", py::module_local())
        .def(py::init<const py::object&, const py::object&, std::int64_t, std::int64_t, std::int64_t,
                      const std::string&, double, const py::object&>(),
             py::arg("history"), py::arg("working"), py::arg("block_size"), py::arg("max_steps"),
             py::arg("global_size"), py::arg("reorthogonalization"), py::arg("breakdown_multiple"), py::arg("reduce"))
        .def("start", &PythonBlockLanczos::start)
        .def("advance", &PythonBlockLanczos::advance)
        .def("measure_orthogonality", &PythonBlockLanczos::measure_orthogonality)
        .def_property_readonly("current_row", reader(&BlockLanczos::current_row))
        .def_property_readonly("work_row", reader(&BlockLanczos::work_row))
        .def_property_readonly("current_width", reader(&BlockLanczos::current_width))
        .def_property_readonly("finished", reader(&BlockLanczos::finished))
        .def_property_readonly("invariant", reader(&BlockLanczos::invariant))
        .def_property_readonly("steps", reader(&BlockLanczos::steps))
        .def_property_readonly("start_factor", reader(&BlockLanczos::start_factor))
        .def_property_readonly("diagonal", reader(&BlockLanczos::diagonal))
        .def_property_readonly("offdiagonal", reader(&BlockLanczos::offdiagonal))
        .def_property_readonly("scale", reader(&BlockLanczos::scale))
        .def_property_readonly("recurrence_error", reader(&BlockLanczos::recurrence_error))
        .def_property_readonly("extra_sweeps", reader(&BlockLanczos::extra_sweeps))
        .def_property_readonly("partial_sweeps", reader(&BlockLanczos::partial_sweeps))
        .def_property_readonly("vectors_read", reader(&BlockLanczos::vectors_read))
        .def_property_readonly("estimated_overlap", reader(&BlockLanczos::estimated_overlap));
}

}  // namespace hesd::python
