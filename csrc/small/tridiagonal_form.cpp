#include "small/tridiagonal_form.hpp"

#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

#include "cpu/parallel.hpp"
#include "hesd/panel.hpp"

namespace hesd {
namespace {

// What is smaller is zero, so that no square of what is left loses bits.
constexpr double kNegligibleSquare = 0x1p-900;

// For one eigenvalue; two are usual.
constexpr int kMostSweeps = 100;

// Steps of rotations below which threads, which wait for work by spinning, cost more than they save.
constexpr std::int64_t kWorthThreads = std::int64_t{1} << 21;

template <typename Body>
void for_each_piece(std::int64_t pieces, std::int64_t work, const Body& body) {
    if (pieces > 1 && work >= kWorthThreads) {
        parallel_for(pieces, [&](std::int64_t piece, int) { body(piece); });
    } else {
        for (std::int64_t piece = 0; piece < pieces; ++piece) {
            body(piece);
        }
    }
}

// In four parts, so that the sums need not wait for each other; the same order everywhere.
double dot(const double* x, const double* y, std::int64_t n) {
    double sums[4] = {0.0, 0.0, 0.0, 0.0};
    std::int64_t i = 0;
    for (; i + 4 <= n; i += 4) {
        for (std::int64_t lane = 0; lane < 4; ++lane) {
            sums[lane] += x[i + lane] * y[i + lane];
        }
    }
    for (; i < n; ++i) {
        sums[0] += x[i] * y[i];
    }
    return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

void add_multiple(double factor, const double* x, double* y, std::int64_t n) {
    for (std::int64_t i = 0; i < n; ++i) {
        y[i] += factor * x[i];
    }
}

// Rows of a lower band matrix with room for the bulges: 2 w - 1 diagonals below the main one.
class Band {
   public:
    Band(std::int64_t n, std::int64_t w, const double* band)
        : reach_(std::max<std::int64_t>(2 * w - 1, 1)), values_(static_cast<std::size_t>(n * (reach_ + 1))) {
        for (std::int64_t i = 0; i < n; ++i) {
            const std::int64_t length = std::min(i, w) + 1;
            std::copy_n(band + (i + 1) * (w + 1) - length, length, at(i, i - length + 1));
        }
    }
    double* at(std::int64_t i, std::int64_t j) { return values_.data() + i * reach_ + j + reach_; }

   private:
    std::int64_t reach_;
    std::vector<double> values_;
};

// H = I - tau v v^T with v_0 = 1 takes a vector to a multiple of the first unit vector.
struct Reflector {
    double tau = 0.0;
    std::vector<double> v, work;

    Reflector(std::int64_t w, std::int64_t r)
        : v(static_cast<std::size_t>(w)), work(static_cast<std::size_t>(std::max(2 * w, r))) {}

    // For column `source` of rows first ... last - 1, which it replaces by its image.
    void take(Band& band, std::int64_t source, std::int64_t first, std::int64_t last) {
        const double head = *band.at(first, source);
        double square = 0.0;
        for (std::int64_t i = first + 1; i < last; ++i) {
            double& entry = *band.at(i, source);
            v[static_cast<std::size_t>(i - first)] = entry;
            square += entry * entry;
            entry = 0.0;
        }
        tau = 0.0;
        if (square <= kNegligibleSquare) {
            return;
        }
        const double image = -std::copysign(std::sqrt(head * head + square), head);
        tau = (image - head) / image;
        v[0] = 1.0;
        for (std::int64_t i = 1; i < last - first; ++i) {
            v[static_cast<std::size_t>(i)] /= head - image;
        }
        *band.at(first, source) = image;
    }

    // Rows of length n, row(i) for i = 0 ... count - 1, become H times them.
    template <typename Row>
    void apply_to_rows(const Row& row, std::int64_t count, std::int64_t n) {
        std::fill_n(work.begin(), n, 0.0);
        for (std::int64_t i = 0; i < count; ++i) {
            add_multiple(v[static_cast<std::size_t>(i)], row(i), work.data(), n);
        }
        for (std::int64_t i = 0; i < count; ++i) {
            add_multiple(-tau * v[static_cast<std::size_t>(i)], work.data(), row(i), n);
        }
    }

    // H D H for the diagonal block of rows first ... last - 1, of which the lower triangle is kept.
    void apply_to_both_sides(Band& band, std::int64_t first, std::int64_t last) {
        const std::int64_t n = last - first;
        double* q = work.data();
        std::fill_n(q, n, 0.0);
        for (std::int64_t i = 0; i < n; ++i) {
            const double* row = band.at(first + i, first);
            add_multiple(tau * v[static_cast<std::size_t>(i)], row, q, i);
            q[i] += tau * dot(row, v.data(), i + 1);
        }
        add_multiple(-0.5 * tau * dot(q, v.data(), n), v.data(), q, n);
        for (std::int64_t i = 0; i < n; ++i) {
            double* row = band.at(first + i, first);
            add_multiple(-v[static_cast<std::size_t>(i)], q, row, i + 1);
            add_multiple(-q[i], v.data(), row, i + 1);
        }
    }
};

void chase_from_column(Band& band, std::int64_t column, std::int64_t n, std::int64_t w, std::int64_t r, double* rows,
                       Reflector& reflector) {
    std::int64_t source = column;
    for (std::int64_t first = column + 1; first + 1 < n; first += w) {
        const std::int64_t last = std::min(first + w, n);
        reflector.take(band, source, first, last);
        if (reflector.tau != 0.0) {
            reflector.apply_to_rows([&](std::int64_t i) { return band.at(first + i, source + 1); }, last - first,
                                    first - source - 1);
            reflector.apply_to_rows([&](std::int64_t i) { return rows + (first + i) * r; }, last - first, r);
            reflector.apply_to_both_sides(band, first, last);
            for (std::int64_t i = last; i < std::min(last + w, n); ++i) {
                double* row = band.at(i, first);
                const double factor = -reflector.tau * dot(row, reflector.v.data(), last - first);
                add_multiple(factor, reflector.v.data(), row, last - first);
            }
        }
        source = first;
    }
}

// x, y <- c x - s y, s x + c y
void rotate(double c, double s, double* x, double* y, std::int64_t n) {
    for (std::int64_t i = 0; i < n; ++i) {
        const double upper = x[i];
        const double lower = y[i];
        x[i] = c * upper - s * lower;
        y[i] = s * upper + c * lower;
    }
}

// One matrix of tridiagonal_eigenvalues: d its diagonal, e what is below it, z the rows.
struct ImplicitQL {
    std::int64_t n, r;
    double *d, *e, *z;
    double negligible;  // coupling

    // The end of the unreduced block that begins at `first`.
    [[nodiscard]] std::int64_t end_of_block(std::int64_t first) const {
        std::int64_t last = first;
        while (last + 1 < n) {
            const double neighbours = std::abs(d[last]) + std::abs(d[last + 1]);
            if (std::abs(e[last]) <= std::max(0x1p-53 * neighbours, negligible)) {
                break;
            }
            ++last;
        }
        return last;
    }

    // A sweep from the end of a block to its beginning, with Wilkinson's shift.
    void sweep(std::int64_t first, std::int64_t last) {
        const double half = (d[first + 1] - d[first]) / (2.0 * e[first]);
        double g = d[last] - d[first] + e[first] / (half + std::copysign(std::hypot(half, 1.0), half));
        double c = 1.0;
        double s = 1.0;
        double shifted = 0.0;
        for (std::int64_t i = last - 1; i >= first; --i) {
            const double f = s * e[i];
            const double b = c * e[i];
            const double square = f * f + g * g;
            if (square <= kNegligibleSquare) {  // the block falls into two
                e[i + 1] = 0.0;
                d[i + 1] -= shifted;
                e[last] = 0.0;
                return;
            }
            const double length = std::sqrt(square);
            e[i + 1] = length;
            s = f / length;
            c = g / length;
            g = d[i + 1] - shifted;
            const double t = (d[i] - g) * s + 2.0 * c * b;
            shifted = s * t;
            d[i + 1] = g + shifted;
            g = c * t - b;
            rotate(c, s, z + i * r, z + (i + 1) * r, r);
        }
        d[first] -= shifted;
        e[first] = g;
        e[last] = 0.0;
    }

    // Turns the matrix round where its large entries come first: QL errs by roundoffs of what it meets on its way up,
    // and leaves small ones to the end.
    void put_large_entries_last() {
        if (std::abs(d[0]) > std::abs(d[n - 1])) {
            std::reverse(d, d + n);
            std::reverse(e, e + n - 1);
            for (std::int64_t i = 0; i < n / 2; ++i) {
                std::swap_ranges(z + i * r, z + (i + 1) * r, z + (n - 1 - i) * r);
            }
        }
    }

    // Returns whether all eigenvalues converged.
    bool run() {
        put_large_entries_last();
        for (std::int64_t first = 0; first < n; ++first) {
            int sweeps = 0;
            for (std::int64_t last = end_of_block(first); last > first; last = end_of_block(first)) {
                if (++sweeps > kMostSweeps) {
                    return false;
                }
                sweep(first, last);
            }
        }
        return true;
    }
};

// A growing Jacobi matrix of one measure, of which the leading rows are kept.
struct GrowingJacobi {
    std::int64_t kept, columns;
    std::int64_t rows = 0;
    double mass = 0.0;  // its square is the mass of the nodes taken in
    std::vector<double> alpha, beta;
    std::vector<double> images, passing;  // Q^T Y, and its row of what is passed down

    GrowingJacobi(std::int64_t kept_rows, std::int64_t p)
        : kept(kept_rows),
          columns(p),
          alpha(static_cast<std::size_t>(kept_rows)),
          beta(static_cast<std::size_t>(kept_rows)),
          images(static_cast<std::size_t>(kept_rows * p)),
          passing(static_cast<std::size_t>(p)) {}

    // Turns row `row` and what is passed down.
    void rotate_images(std::int64_t row, double c, double s) {
        double* kept_row = images.data() + row * columns;
        for (std::int64_t i = 0; i < columns; ++i) {
            const double upper = kept_row[i];
            const double lower = passing[static_cast<std::size_t>(i)];
            kept_row[i] = c * upper + s * lower;
            passing[static_cast<std::size_t>(i)] = c * lower - s * upper;
        }
    }

    void take(double node, double weight, const double* coupling) {
        std::copy_n(coupling, columns, passing.begin());
        // What is passed down has `node` on the diagonal. `above` couples it to the row it has left, `beside` to the
        // next one, and `link` couples those two.
        double link = mass;
        double above = weight;
        double beside = 0.0;
        for (std::int64_t row = 0; row < rows; ++row) {
            double& diagonal = alpha[static_cast<std::size_t>(row)];
            const double next = beta[static_cast<std::size_t>(row)];
            const double square = link * link + above * above;
            const bool turns = square > kNegligibleSquare;
            const double length = turns ? std::sqrt(square) : link;
            const double c = turns ? link / length : 1.0;
            const double s = turns ? above / length : 0.0;
            link_above(row) = length;
            const double upper = diagonal;
            const double both = 2.0 * c * s * beside;
            diagonal = c * c * upper + both + s * s * node;
            above = c * s * (node - upper) + (c * c - s * s) * beside;
            node = s * s * upper - both + c * c * node;
            link = c * next;
            beside = -s * next;
            rotate_images(row, c, s);
        }
        if (rows < kept) {
            link_above(rows) = std::abs(above);
            alpha[static_cast<std::size_t>(rows)] = node;
            for (std::int64_t i = 0; i < columns; ++i) {
                images[static_cast<std::size_t>(rows * columns + i)] =
                    std::copysign(1.0, above) * passing[static_cast<std::size_t>(i)];
            }
            ++rows;
        }
    }

   private:
    double& link_above(std::int64_t row) { return row == 0 ? mass : beta[static_cast<std::size_t>(row - 1)]; }
};

}  // namespace

void tridiagonalize_band(std::int64_t n, std::int64_t w, const double* band, std::int64_t r, double* rows,
                         double* diagonal, double* offdiagonal) {
    Band work(n, w, band);
    Reflector reflector(std::max<std::int64_t>(w, 1), r);
    for (std::int64_t column = 0; w > 1 && column + 2 < n; ++column) {
        chase_from_column(work, column, n, w, r, rows, reflector);
    }
    for (std::int64_t i = 0; i < n; ++i) {
        diagonal[i] = *work.at(i, i);
        offdiagonal[i] = i + 1 < n ? *work.at(i + 1, i) : 0.0;
    }
}

void tridiagonal_eigenvalues(std::int64_t count, std::int64_t n, std::int64_t r, double* diagonal, double* offdiagonal,
                             double* rows) {
    std::vector<char> converged(static_cast<std::size_t>(count));
    for_each_piece(count, count * n * n, [&](std::int64_t matrix) {
        double* d = diagonal + matrix * n;
        double* e = offdiagonal + matrix * n;
        e[n - 1] = 0.0;
        double largest = 0.0;
        for (std::int64_t i = 0; i < n; ++i) {
            largest = std::max(largest, std::max(std::abs(d[i]), std::abs(e[i])));
        }
        ImplicitQL problem{n, r, d, e, rows + matrix * n * r, 0x1p-60 * largest};
        converged[static_cast<std::size_t>(matrix)] = problem.run() ? 1 : 0;
    });
    if (std::find(converged.begin(), converged.end(), 0) != converged.end()) {
        throw NumericalError("an eigenvalue of a tridiagonal matrix of order " + std::to_string(n) +
                             " did not converge; the matrix has numbers that are not finite");
    }
}

void jacobi_matrices(std::int64_t k, const double* nodes, std::int64_t b, const double* weights, std::int64_t p,
                     const double* couplings, std::int64_t steps, double* diagonal, double* offdiagonal) {
    const std::int64_t kept = std::min(steps + 1, k);  // one more has the last coupling within
    std::vector<GrowingJacobi> probes(static_cast<std::size_t>(b), GrowingJacobi(kept, p));
    for_each_piece(b, b * k * kept, [&](std::int64_t probe) {
        GrowingJacobi& jacobi = probes[static_cast<std::size_t>(probe)];
        for (std::int64_t i = 0; i < k; ++i) {
            jacobi.take(nodes[i], weights[probe * k + i], couplings + i * p);
        }
        const double* last = jacobi.images.data() + (steps - 1) * p;
        double& coupling = jacobi.beta[static_cast<std::size_t>(steps - 1)];
        coupling = std::sqrt(coupling * coupling + dot(last, last, p));
        std::copy_n(jacobi.alpha.begin(), steps, diagonal + probe * steps);
        std::copy_n(jacobi.beta.begin(), steps, offdiagonal + probe * steps);
    });
}

}  // namespace hesd
