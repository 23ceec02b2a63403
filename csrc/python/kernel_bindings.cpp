// The kernels as Python calls them: arguments checked on entry, then the kernel without the GIL.

#include <pybind11/stl.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <utility>

#include "python/call.hpp"
#include "python/registration.hpp"
#include "small/pivoted_cholesky_qr.hpp"

namespace hesd::python {
namespace {

Matrix panel_gram(const py::object& v_object, const py::object& w_object) {
    const BorrowedPanel v(v_object, "V", false);
    const BorrowedPanel w(w_object, "W", true);
    v.require_equal_columns(w);
    Backend backend(w, {&v});
    Matrix gram({v.rows(), w.rows()});
    double* data = gram.mutable_data();
    {
        const std::int64_t count = v.rows() * w.rows();
        const Unlocked unlocked(backend.prepare(v.rows(), w.rows(), bytes_of(count)));
        CallMatrices matrices(backend);
        double* there = matrices.take_for(data, count);
        backend.kernels().panel_gram(v.panel(), w.panel(), there);
        matrices.fetch(data, there, count);
    }
    return gram;
}

py::tuple panel_project(const py::object& w_object, const py::object& v_object, const py::object& c_object,
                        bool with_gram, bool with_self_gram, std::int64_t gram_only) {
    const BorrowedPanel w(w_object, "W", true);
    const BorrowedPanel v(v_object, "V", false);
    v.require_equal_columns(w);
    w.require_apart(v);
    Backend backend(w, {&v});
    if (gram_only < 0 || gram_only > v.rows()) {
        throw EngineError("`gram_only` is " + std::to_string(gram_only) + "; wanted 0 to " + std::to_string(v.rows()) +
                          ", the number of vectors of `V`");
    }
    const std::int64_t b = w.rows();
    const Matrix c = checked_matrix(c_object, "C", v.rows() - gram_only, b);
    Matrix gram({with_gram ? v.rows() : 0, b});
    Matrix self_gram({with_self_gram ? b : 0, b});
    double* gram_data = with_gram ? gram.mutable_data() : nullptr;
    double* self_data = with_self_gram ? self_gram.mutable_data() : nullptr;
    const double* c_data = c.data();
    {
        const std::int64_t count = v.rows() * b;
        const Unlocked unlocked(backend.prepare(v.rows(), b, bytes_of(2 * count + b * b)));
        CallMatrices matrices(backend);
        const double* c_there = matrices.upload(c_data, (v.rows() - gram_only) * b);
        double* gram_there = matrices.take_for(gram_data, count);
        double* self_there = matrices.take_for(self_data, b * b);
        backend.kernels().panel_project(w.panel(), v.panel(), gram_only, c_there, gram_there, self_there);
        matrices.fetch(gram_data, gram_there, count);
        matrices.fetch(self_data, self_there, b * b);
    }
    return py::make_tuple(gram, self_gram);
}

py::tuple panel_orthonormalize(const py::object& w_object, const py::object& out_object, double tolerance,
                               std::int64_t max_rank, const py::object& reduce_function) {
    const BorrowedPanel w(w_object, "W", true);
    const BorrowedPanel out(out_object, "out", true);
    out.require_like(w);
    if (out.panel().data != w.panel().data || out.panel().stride != w.panel().stride) {
        w.require_apart(out);
    }
    Backend backend(w, {&out});
    if (!(tolerance >= 0.0)) {
        throw EngineError("`tolerance` is " + std::to_string(tolerance) + "; wanted a number >= 0");
    }
    if (max_rank < 0) {
        throw EngineError("`max_rank` is " + std::to_string(max_rank) + "; wanted a number >= 0");
    }
    const std::int64_t b = w.rows();
    Matrix factor({b, b});
    double* data = factor.mutable_data();
    PythonReduction reduction(reduce_function);
    OrthonormalizeFacts facts{};
    {
        const std::int64_t numbers = orthonormalization_numbers(b);
        const Unlocked unlocked(backend.prepare(b, b, bytes_of(numbers)));
        const Kernels& kernels = backend.kernels();
        CallMatrices matrices(backend);
        LanczosStep begin{};
        begin.tolerance = tolerance;
        begin.max_rank = max_rank;
        begin.orthonormalization = orthonormalization_in(matrices.take(numbers), b, b);
        const Orthonormalization& state = begin.orthonormalization;
        kernels.panel_gram(w.panel(), w.panel(), state.gram);
        reduce(kernels.device, reduction.hook(), state.gram, b * b);
        kernels.lanczos_task(StepTask::begin_rows, begin);
        facts = orthonormalize(kernels, w.panel(), out.panel(), state, reduction.hook());
        matrices.fetch(data, state.factor, b * b);
    }
    return py::make_tuple(facts.rank, facts.weakest, factor);
}

void panel_combine(const py::object& s_object, const py::object& v_object, const py::object& x_object) {
    const BorrowedPanel v(v_object, "V", false);
    const BorrowedPanel x(x_object, "X", false);
    v.require_equal_columns(x);
    x.require_apart(v);
    const Matrix s = checked_matrix(s_object, "S", x.rows(), v.rows());
    const double* data = s.data();
    Backend backend(x, {&v});
    const std::int64_t count = x.rows() * v.rows();
    const Unlocked unlocked(backend.prepare(v.rows(), x.rows(), bytes_of(count)));
    CallMatrices matrices(backend);
    backend.kernels().panel_combine(matrices.upload(data, count), v.panel(), x.panel());
}

void require_part_of(const BorrowedPanel& part, std::int64_t offset, const BorrowedPanel& out) {
    if (part.rows() != out.rows() || offset < 0 || offset > out.columns() - part.columns()) {
        part.fail("has shape (" + std::to_string(part.rows()) + ", " + std::to_string(part.columns()) + ") at offset " +
                  std::to_string(offset) + ", which does not fit into `out` of shape (" + std::to_string(out.rows()) +
                  ", " + std::to_string(out.columns()) + ")");
    }
    if (element_bytes(part.panel().precision) > element_bytes(out.panel().precision)) {
        part.fail("has a higher precision than `out`; wanted the same or a lower one");
    }
}

void require_disjoint(const std::vector<HvpPart>& parts) {
    std::vector<std::pair<std::int64_t, std::int64_t>> ranges;
    for (const HvpPart& part : parts) {
        if (part.values.columns > 0) {
            ranges.emplace_back(part.offset, part.offset + part.values.columns);
        }
    }
    std::sort(ranges.begin(), ranges.end());
    for (std::size_t i = 1; i < ranges.size(); ++i) {
        if (ranges[i].first < ranges[i - 1].second) {
            throw EngineError("`offsets` makes two parts overlap at column " + std::to_string(ranges[i].first) +
                              " of `out`; wanted disjoint column ranges");
        }
    }
}

void accumulate_hvp(const py::object& out_object, const std::vector<py::object>& part_objects,
                    const std::vector<std::int64_t>& offsets, double alpha, const py::object& compensation_object) {
    const BorrowedPanel out(out_object, "out", true);
    if (!std::isfinite(alpha)) {
        throw EngineError("`alpha` is " + std::to_string(alpha) + "; wanted a finite number");
    }
    if (part_objects.size() != offsets.size()) {
        throw EngineError("`parts` has " + std::to_string(part_objects.size()) + " tensors and `offsets` " +
                          std::to_string(offsets.size()) + " numbers; wanted one offset for each part");
    }
    Backend backend(out);
    std::vector<BorrowedPanel> borrowed;
    borrowed.reserve(part_objects.size());
    std::vector<HvpPart> parts;
    for (std::size_t i = 0; i < part_objects.size(); ++i) {
        const BorrowedPanel& part = borrowed.emplace_back(part_objects[i], "parts[" + std::to_string(i) + "]", false);
        require_part_of(part, offsets[i], out);
        backend.require(part);
        part.require_apart(out);
        parts.push_back({part.panel(), offsets[i]});
    }
    require_disjoint(parts);
    std::optional<BorrowedPanel> compensation;
    if (!compensation_object.is_none()) {
        compensation.emplace(compensation_object, "compensation", true);
        compensation->require_like(out);
        backend.require(*compensation);
        compensation->require_apart(out);
        for (const BorrowedPanel& part : borrowed) {
            part.require_apart(*compensation);
        }
    }
    const Unlocked unlocked(backend.prepare(0, 0, 0));
    backend.kernels().accumulate_hvp(out.panel(), parts.data(), static_cast<std::int64_t>(parts.size()), alpha,
                                     compensation ? &compensation->panel() : nullptr);
}

void fill_probes(const py::object& out_object, std::uint64_t seed, std::uint32_t first_probe, std::uint64_t first_index,
                 const std::string& kind) {
    const BorrowedPanel out(out_object, "out", true);
    if (kind != "rademacher" && kind != "gaussian") {
        throw EngineError("`kind` is '" + kind + "'; wanted 'rademacher' or 'gaussian'");
    }
    const auto value = kind == "gaussian" ? ProbeKind::gaussian : ProbeKind::rademacher;
    Backend backend(out);
    const Unlocked unlocked(backend.prepare(0, 0, 0));
    backend.kernels().fill_probes(out.panel(), seed, first_probe, first_index, value);
}

void pin(std::uintptr_t address, std::int64_t bytes) {
    const Staging& staging = cuda_kernels().device->staging;
    const py::gil_scoped_release unlocked;
    staging.pin(reinterpret_cast<void*>(address), bytes);
}

void unpin(std::uintptr_t address) {
    const Staging& staging = cuda_kernels().device->staging;
    const py::gil_scoped_release unlocked;
    staging.unpin(reinterpret_cast<void*>(address));
}

}  // namespace

void register_kernels(py::module_& module) {
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
    module.def("pin", &pin, py::arg("address"), py::arg("bytes"));
    module.def("unpin", &unpin, py::arg("address"));
}

}  // namespace hesd::python
