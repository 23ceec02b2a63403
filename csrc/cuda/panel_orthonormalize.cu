#include <algorithm>
#include <vector>

#include "cuda/kernels.hpp"
#include "cuda/sweep.hpp"
#include "cuda/tiles.cuh"
#include "orthonormalize_plan.hpp"
#include "small_matrix.hpp"

namespace hesd::cuda {
namespace {

// Shared memory for a piece of the rows before and after the transform, in float64.
constexpr std::int64_t kPieceBytes = 96 * 1024;
constexpr int kMostColumns = 256;
constexpr int kOutputs = 4;  // rows that a thread makes of one reading of the piece

constexpr int piece_columns(std::int64_t b) {
    int columns = kMostColumns;
    while (columns > kWarp && 2 * b * columns * 8 > kPieceBytes) {
        columns /= 2;
    }
    return columns;
}
static_assert(piece_columns(8) == kMostColumns, "the usual blocks take whole pieces");
static_assert(2 * kMostRows * piece_columns(kMostRows) * 8 <= kPieceBytes, "the widest block fits");

template <typename T>
struct RowsArguments {
    Rows<const T> source;
    Rows<T> target;           // no data: what the transform makes is only squared, and not rounded
    const double* transform;  // (b, b); null: the rows are squared as they are
    double* partial;          // b (b + 1) / 2 sums for each block; null: none wanted
    std::int64_t n;
    int b;
    int columns;
};

// target <- transform times source, rounded to T, and the inner products of the rows it makes. Each piece is read
// before it is written, so that the target may be the source.
template <typename T>
HESD_KERNEL HESD_LAUNCH_BOUNDS(kThreads, 1) rows_kernel(const RowsArguments<T> a) {
    const int thread = static_cast<int>(threadIdx.x);
    const int warp = thread / kWarp;
    const int lane = thread % kWarp;
    const int pairs = a.b * (a.b + 1) / 2;
    double* before = reinterpret_cast<double*>(shared_memory());  // (b, columns)
    double* after = a.transform != nullptr ? before + a.b * a.columns : before;
    double* sums = a.partial != nullptr ? a.partial + static_cast<std::int64_t>(blockIdx.x) * pairs : nullptr;
    for (int p = thread; sums != nullptr && p < pairs; p += kThreads) {
        sums[p] = 0.0;
    }
    constexpr int step = Vector<T>::length;
    const int steps = a.columns / step;
    const std::int64_t pieces = (a.n + a.columns - 1) / a.columns;
    for (std::int64_t piece = blockIdx.x; piece < pieces; piece += gridDim.x) {
        const std::int64_t first = piece * a.columns;
        __syncthreads();  // all have read the last piece
        for (int item = thread; item < a.b * steps; item += kThreads) {
            const int row = item / steps;
            const int c = item % steps * step;
            const Vector<T> values = load<T>(a.source.at(row, first + c), a.n - first - c, a.source.aligned);
#pragma unroll
            for (int e = 0; e < step; ++e) {
                before[row * a.columns + c + e] = static_cast<double>(values.values[e]);
            }
        }
        __syncthreads();
        if (a.transform != nullptr) {
            for (int item = thread; item < (a.b + kOutputs - 1) / kOutputs * a.columns; item += kThreads) {
                const int row = item / a.columns * kOutputs;
                const int c = item % a.columns;
                double made[kOutputs] = {};
                for (int j = 0; j < a.b; ++j) {
                    const double value = before[j * a.columns + c];
#pragma unroll
                    for (int q = 0; q < kOutputs; ++q) {
                        if (row + q < a.b) {
                            made[q] += a.transform[(row + q) * a.b + j] * value;
                        }
                    }
                }
#pragma unroll
                for (int q = 0; q < kOutputs; ++q) {
                    if (row + q < a.b) {
                        after[(row + q) * a.columns + c] =
                            a.target.data != nullptr ? static_cast<double>(static_cast<T>(made[q])) : made[q];
                    }
                }
            }
            __syncthreads();
            for (int item = thread; a.target.data != nullptr && item < a.b * steps; item += kThreads) {
                const int row = item / steps;
                const int c = item % steps * step;
                Vector<T> values;
#pragma unroll
                for (int e = 0; e < step; ++e) {
                    values.values[e] = static_cast<T>(after[row * a.columns + c + e]);
                }
                store(a.target.at(row, first + c), values, a.n - first - c, a.target.aligned);
            }
        }
        if (sums != nullptr) {
            add_self_products(after, a.columns, a.b, a.columns, sums, warp, lane);
        }
    }
}

template <typename T>
void run_rows(const Panel& source, const double* transform, const Panel& target, double* gram) {
    const std::int64_t b = source.rows;
    if (source.columns == 0 || b == 0) {
        std::fill_n(gram, gram != nullptr ? b * b : 0, 0.0);
        return;
    }
    if (b > kMostRows) {
        throw EngineError("a panel of " + std::to_string(b) +
                          " vectors cannot be squared or orthonormalized on a CUDA device; at most " +
                          std::to_string(kMostRows) + " can. Take a smaller block");
    }
    const DeviceScope scope;
    Workspace workspace;
    RowsArguments<T> a{};
    a.source = rows_of<const T>(source);
    a.target = rows_of<T>(target);
    a.n = source.columns;
    a.b = static_cast<int>(b);
    a.columns = piece_columns(b);
    if (transform != nullptr) {
        double* on_device = workspace.take<double>(b * b);
        to_device(on_device, transform, b * b);
        a.transform = on_device;
    }
    const std::int64_t blocks = std::min<std::int64_t>(2 * kBlocks, (a.n + a.columns - 1) / a.columns);
    const std::int64_t pairs = b * (b + 1) / 2;
    a.partial = gram != nullptr ? take_sums(workspace, blocks, pairs) : nullptr;
    const std::int64_t shared = (transform != nullptr ? 2 : 1) * b * a.columns * 8;
    launch("rows", rows_kernel<T>, blocks, kThreads, shared, a);
    if (gram != nullptr) {
        std::vector<double> totals(static_cast<std::size_t>(pairs));
        sum_partials(a.partial, blocks, pairs, totals.data());
        unpack_pairs(totals.data(), b, gram);
    }
}

void run_rows(const Panel& source, const double* transform, const Panel& target, double* gram) {
    if (source.precision == Precision::float64) {
        run_rows<double>(source, transform, target, gram);
    } else {
        run_rows<float>(source, transform, target, gram);
    }
}

// No place to write to.
Panel nothing_of(const Panel& w) { return {nullptr, w.precision, w.rows, w.columns, w.stride}; }

}  // namespace

void self_gram(const Panel& w, double* gram) { run_rows(w, nullptr, w, gram); }

OrthonormalizeResult panel_orthonormalize(const Panel& w, const Panel& out, double tolerance, std::int64_t max_rank,
                                          const Reduction& reduction, const double* gram, double* factor) {
    const std::int64_t b = w.rows;
    std::vector<double> current(static_cast<std::size_t>(b * b));
    if (gram != nullptr) {
        std::copy_n(gram, b * b, current.data());
    } else {
        self_gram(w, current.data());
        reduction(current.data(), b * b);
    }
    OrthonormalizePlan plan(b, tolerance, max_rank);
    // The usual two rounds on float32 rows take one writing: the first transform's rows are squared in float64 and not
    // kept, and the second one takes both transforms to the rows that were given. What float64 loses to the first one's
    // condition, at most 1e5, float32 does not see.
    const bool once = w.precision == Precision::float32;
    SmallMatrix transform(b, b);
    for (int round = 0;; ++round) {
        const SmallMatrix before = transform;
        const bool last = plan.next(current.data());
        std::copy_n(plan.transform(), b * b, transform.values.data());
        if (once && round == 1) {
            transform = product(transform, before);
        }
        if (last) {
            run_rows(w, transform.values.data(), out, nullptr);
            return plan.finish(factor);
        }
        run_rows(w, transform.values.data(), once && round == 0 ? nothing_of(w) : w, current.data());
        reduction(current.data(), b * b);
    }
}

}  // namespace hesd::cuda
