#include "lanczos/basis_panel.hpp"

#include <utility>

#if defined(__unix__) || defined(__APPLE__)
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace hesd {
namespace {

// Advice only: where it is not understood, nothing is lost but time.
void read_ahead(const Panel& panel) {
#if defined(__unix__) || defined(__APPLE__)
    static const auto page = static_cast<std::uintptr_t>(sysconf(_SC_PAGESIZE));
    const auto begin = reinterpret_cast<std::uintptr_t>(panel.data) / page * page;
    const auto end = reinterpret_cast<std::uintptr_t>(panel.data) +
                     static_cast<std::uintptr_t>(panel.rows * panel.stride * element_bytes(panel.precision));
    madvise(reinterpret_cast<void*>(begin), end - begin, MADV_WILLNEED);
#else
    static_cast<void>(panel);
#endif
}

// Columns [first, first + count).
Panel columns_of(Panel panel, std::int64_t first, std::int64_t count) {
    panel.columns = count;
    panel.data = static_cast<char*>(panel.data) + first * element_bytes(panel.precision);
    return panel;
}

}  // namespace

BasisPanel::BasisPanel(std::vector<Panel> tiles, bool far) : tiles_(std::move(tiles)), far_(far) {
    for (const Panel& tile : tiles_) {
        columns_ += tile.columns;
    }
}

template <typename Body>
void BasisPanel::for_each_tile(const Kernels& kernels, std::int64_t first, std::int64_t count, const Panel& w,
                               Body body) const {
    const auto come = [&](std::size_t t) {
        if (count == 0 || t >= tiles_.size()) {
            return;
        }
        if (far_) {
            kernels.device->staging.fetch(tiles_[t].slice(first, count), static_cast<int>(t % 2));
        } else if (t > 0) {
            read_ahead(tiles_[t].slice(first, count));
        }
    };
    std::int64_t column = 0;
    come(0);
    for (std::size_t t = 0; t < tiles_.size(); ++t) {
        come(t + 1);
        const Panel rows = tiles_[t].slice(first, count);
        body(far_ && count > 0 ? kernels.device->staging.arrived(rows, static_cast<int>(t % 2)) : rows,
             columns_of(w, column, rows.columns));
        column += rows.columns;
    }
}

void BasisPanel::gram(const Kernels& kernels, std::int64_t first, std::int64_t count, const Panel& w, double* gram,
                      double* part) const {
    bool begun = false;
    for_each_tile(kernels, first, count, w, [&](const Panel& rows, const Panel& columns) {
        kernels.panel_gram(rows, columns, begun ? part : gram);
        if (begun) {
            kernels.add(gram, part, count * w.rows);
        }
        begun = true;
    });
}

void BasisPanel::project(const Kernels& kernels, std::int64_t first, std::int64_t count, const Panel& w,
                         std::int64_t idle, const double* coefficients, double* gram, double* self_gram,
                         double* part) const {
    const std::int64_t gram_size = gram != nullptr ? count * w.rows : 0;
    const std::int64_t self_size = self_gram != nullptr ? w.rows * w.rows : 0;
    bool begun = false;
    for_each_tile(kernels, first, count, w, [&](const Panel& rows, const Panel& columns) {
        const auto place = [&](double* whole, double* of_tile) { return begun && whole != nullptr ? of_tile : whole; };
        kernels.panel_project(columns, rows, idle, coefficients, place(gram, part), place(self_gram, part + gram_size));
        if (begun) {
            kernels.add(gram, part, gram_size);
            kernels.add(self_gram, part + gram_size, self_size);
        }
        begun = true;
    });
}

void BasisPanel::store(const Kernels& kernels, std::int64_t first, const Panel& source) const {
    std::int64_t column = 0;
    for (const Panel& tile : tiles_) {
        const Panel part = columns_of(source, column, tile.columns);
        const Panel rows = tile.slice(first, source.rows);
        if (far_) {
            kernels.device->staging.send(part, rows);
        } else {
            kernels.panel_combine(nullptr, part, rows);
        }
        column += tile.columns;
    }
}

}  // namespace hesd
