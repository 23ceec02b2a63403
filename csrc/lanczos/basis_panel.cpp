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

BasisPanel::BasisPanel(const Kernels& kernels, std::vector<Panel> tiles, bool in_host_memory)
    : kernels_(&kernels), tiles_(std::move(tiles)), in_host_memory_(in_host_memory) {
    for (const Panel& tile : tiles_) {
        columns_ += tile.columns;
    }
}

void BasisPanel::store(std::int64_t first, const Panel& source) const {
    std::int64_t column = 0;
    for (const Panel& tile : tiles_) {
        const Panel part = columns_of(source, column, tile.columns);
        const Panel rows = tile.slice(first, source.rows);
        if (in_host_memory_) {
            kernels_->device->staging.send(part, rows);
        } else {
            kernels_->panel_combine(nullptr, part, rows);
        }
        column += tile.columns;
    }
}

void BasisPanel::clear(std::int64_t first, std::int64_t count) const {
    for (const Panel& tile : tiles_) {
        const Panel nothing{nullptr, tile.precision, 0, tile.columns, tile.columns};
        kernels_->panel_combine(nullptr, nothing, tile.slice(first, count));
    }
}

template <typename Body>
void BasisRows::for_each_tile(const Panel& w, Body body) const {
    const std::vector<Panel>& tiles = panel->tiles_;
    const bool staged = panel->in_host_memory_ && count > 0;
    const auto prepare = [&](std::size_t t) {
        if (count == 0 || t >= tiles.size()) {
            return;
        }
        if (staged) {
            panel->kernels_->device->staging.fetch(tiles[t].slice(first, count), static_cast<int>(t % 2));
        } else if (t > 0) {
            read_ahead(tiles[t].slice(first, count));
        }
    };
    std::int64_t column = 0;
    prepare(0);
    for (std::size_t t = 0; t < tiles.size(); ++t) {
        prepare(t + 1);
        const Panel rows = tiles[t].slice(first, count);
        body(staged ? panel->kernels_->device->staging.arrived(rows, static_cast<int>(t % 2)) : rows,
             columns_of(w, column, rows.columns));
        column += rows.columns;
    }
}

void BasisRows::gram(const Panel& w, double* gram, double* part) const {
    const Kernels& kernels = *panel->kernels_;
    bool begun = false;
    for_each_tile(w, [&](const Panel& rows, const Panel& columns) {
        kernels.panel_gram(rows, columns, begun ? part : gram);
        if (begun) {
            kernels.add(gram, part, count * w.rows);
        }
        begun = true;
    });
}

void BasisRows::project(const Panel& w, std::int64_t gram_only, const double* coefficients, double* gram,
                        double* self_gram, double* part) const {
    const Kernels& kernels = *panel->kernels_;
    const std::int64_t gram_size = gram != nullptr ? count * w.rows : 0;
    const std::int64_t self_size = self_gram != nullptr ? w.rows * w.rows : 0;
    bool begun = false;
    for_each_tile(w, [&](const Panel& rows, const Panel& columns) {
        const auto place = [&](double* whole, double* of_tile) { return begun && whole != nullptr ? of_tile : whole; };
        kernels.panel_project(columns, rows, gram_only, coefficients, place(gram, part),
                              place(self_gram, part + gram_size));
        if (begun) {
            kernels.add(gram, part, gram_size);
            kernels.add(self_gram, part + gram_size, self_size);
        }
        begun = true;
    });
}

}  // namespace hesd
