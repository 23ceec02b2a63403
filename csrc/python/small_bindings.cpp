// Tridiagonal forms of small matrices, on NumPy arrays that the package makes itself.

#include <algorithm>
#include <string>
#include <vector>

#include "python/call.hpp"
#include "python/registration.hpp"
#include "small/tridiagonal_form.hpp"

namespace hesd::python {
namespace {

// Throws EngineError unless it has two dimensions of these lengths; -1 stands for any.
void require_shape(const Matrix& matrix, const std::string& name, std::int64_t rows, std::int64_t columns) {
    if (matrix.ndim() != 2 || (rows >= 0 && matrix.shape(0) != rows) || (columns >= 0 && matrix.shape(1) != columns) ||
        matrix.shape(0) < 1) {
        const auto length = [](std::int64_t n) { return n < 0 ? std::string("any") : std::to_string(n); };
        throw EngineError("`" + name + "` is not a matrix of shape (" + length(rows) + ", " + length(columns) + ")");
    }
}

py::tuple tridiagonalize_band(const Matrix& band, const Matrix& rows) {
    require_shape(band, "band", -1, -1);
    const std::int64_t n = band.shape(0);
    require_shape(rows, "rows", n, -1);
    Matrix images({n, rows.shape(1)});
    Matrix diagonal(n);
    Matrix offdiagonal(n);
    std::copy_n(rows.data(), rows.size(), images.mutable_data());
    const double* band_data = band.data();
    double* image_data = images.mutable_data();
    double* diagonal_data = diagonal.mutable_data();
    double* offdiagonal_data = offdiagonal.mutable_data();
    {
        const py::gil_scoped_release unlocked;
        hesd::tridiagonalize_band(n, band.shape(1) - 1, band_data, images.shape(1), image_data, diagonal_data,
                                  offdiagonal_data);
    }
    return py::make_tuple(diagonal, offdiagonal, images);
}

py::tuple tridiagonal_eigenvalues(const Matrix& diagonal, const Matrix& offdiagonal, const Matrix& rows) {
    require_shape(diagonal, "diagonal", -1, -1);
    const std::int64_t count = diagonal.shape(0);
    const std::int64_t n = diagonal.shape(1);
    require_shape(offdiagonal, "offdiagonal", count, n);
    if (rows.ndim() != 3 || rows.shape(0) != count || rows.shape(1) != n) {
        throw EngineError("`rows` is not an array of shape (" + std::to_string(count) + ", " + std::to_string(n) +
                          ", any)");
    }
    Matrix values({count, n});
    Matrix images({count, n, rows.shape(2)});
    std::vector<double> work(offdiagonal.data(), offdiagonal.data() + offdiagonal.size());
    std::copy_n(diagonal.data(), diagonal.size(), values.mutable_data());
    std::copy_n(rows.data(), rows.size(), images.mutable_data());
    double* value_data = values.mutable_data();
    double* image_data = images.mutable_data();
    {
        const py::gil_scoped_release unlocked;
        hesd::tridiagonal_eigenvalues(count, n, images.shape(2), value_data, work.data(), image_data);
    }
    return py::make_tuple(values, images);
}

py::tuple jacobi_matrices(const Matrix& nodes, const Matrix& weights, const Matrix& couplings, std::int64_t steps) {
    require_shape(nodes, "nodes", 1, -1);
    const std::int64_t k = nodes.shape(1);
    require_shape(weights, "weights", -1, k);
    require_shape(couplings, "couplings", k, -1);
    if (steps < 1 || steps > k) {
        throw EngineError("`steps` is " + std::to_string(steps) + "; wanted 1 to " + std::to_string(k) +
                          ", the number of nodes");
    }
    const std::int64_t b = weights.shape(0);
    const std::int64_t p = couplings.shape(1);
    Matrix diagonal({b, steps});
    Matrix offdiagonal({b, steps});
    const double* node_data = nodes.data();
    const double* weight_data = weights.data();
    const double* coupling_data = couplings.data();
    double* diagonal_data = diagonal.mutable_data();
    double* offdiagonal_data = offdiagonal.mutable_data();
    {
        const py::gil_scoped_release unlocked;
        hesd::jacobi_matrices(k, node_data, b, weight_data, p, coupling_data, steps, diagonal_data, offdiagonal_data);
    }
    return py::make_tuple(diagonal, offdiagonal);
}

}  // namespace

void register_small_matrices(py::module_& module) {
    module.def("tridiagonalize_band", &tridiagonalize_band, py::arg("band"), py::arg("rows"));
    module.def("tridiagonal_eigenvalues", &tridiagonal_eigenvalues, py::arg("diagonal"), py::arg("offdiagonal"),
               py::arg("rows"));
    module.def("jacobi_matrices", &jacobi_matrices, py::arg("nodes"), py::arg("weights"), py::arg("couplings"),
               py::arg("steps"));
}

}  // namespace hesd::python
