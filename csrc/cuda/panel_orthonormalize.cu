#include <algorithm>

#include "cuda/kernels.hpp"
#include "cuda/sweep.hpp"
#include "cuda/tiles.cuh"

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
    Rows<T> last;             // for rows that are final
    Rows<T> between;          // for others; no data: what the transform makes is only squared, and not rounded
    const double* transform;  // (b, b); null: the rows are squared as they are
    double* partial;          // b (b + 1) / 2 sums for each block
    std::int64_t n;
    int b;
    int columns;
    const OrthonormalizeStage* stage;  // with a transform
    const int* condition;              // where it is zero, nothing is done
};

// The rows of a target <- transform times source, rounded to T, and, unless they are final, the inner products of the
// rows it makes. Each piece is read before it is written, so that the target may be the source.
template <typename T>
HESD_KERNEL HESD_LAUNCH_BOUNDS(kThreads, 1) rows_kernel(const RowsArguments<T> a) {
    if (a.condition != nullptr && *a.condition == 0) {
        return;
    }
    const bool last = a.transform != nullptr && *a.stage == OrthonormalizeStage::last;
    if (a.transform != nullptr && !last && *a.stage != OrthonormalizeStage::more) {
        return;
    }
    const Rows<T> target = last ? a.last : a.between;
    const int thread = static_cast<int>(threadIdx.x);
    const int warp = thread / kWarp;
    const int lane = thread % kWarp;
    const int pairs = a.b * (a.b + 1) / 2;
    double* before = reinterpret_cast<double*>(shared_memory());  // (b, columns)
    double* after = a.transform != nullptr ? before + a.b * a.columns : before;
    double* sums = last ? nullptr : a.partial + static_cast<std::int64_t>(blockIdx.x) * pairs;
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
                            target.data != nullptr ? static_cast<double>(static_cast<T>(made[q])) : made[q];
                    }
                }
            }
            __syncthreads();
            for (int item = thread; target.data != nullptr && item < a.b * steps; item += kThreads) {
                const int row = item / steps;
                const int c = item % steps * step;
                Vector<T> values;
#pragma unroll
                for (int e = 0; e < step; ++e) {
                    values.values[e] = static_cast<T>(after[row * a.columns + c + e]);
                }
                store(target.at(row, first + c), values, a.n - first - c, target.aligned);
            }
        }
        if (sums != nullptr) {
            add_self_products(after, a.columns, a.b, a.columns, sums, warp, lane);
        }
    }
}

// Without a state the rows are squared into gram, as they are. With one its transform is applied to them, into `last`
// where they are final, else into `between` (no data: nowhere), and they are squared into the state's Gram matrix.
template <typename T>
void run_rows(const Panel& w, const Orthonormalization* state, const Panel& last, const Panel& between, double* gram) {
    const std::int64_t b = w.rows;
    if (b > kMostRows) {
        throw EngineError("a panel of " + std::to_string(b) +
                          " vectors cannot be squared or orthonormalized on a CUDA device; at most " +
                          std::to_string(kMostRows) + " can. Take a smaller block");
    }
    Workspace workspace;
    RowsArguments<T> a{};
    a.source = rows_of<const T>(w);
    a.last = rows_of<T>(last);
    a.between = rows_of<T>(between);
    a.transform = state != nullptr ? state->transform : nullptr;
    a.stage = state != nullptr ? &state->facts->stage : nullptr;
    a.condition = current_execution().condition;
    a.n = w.columns;
    a.b = static_cast<int>(b);
    a.columns = piece_columns(b);
    const std::int64_t blocks = std::min<std::int64_t>(2 * kBlocks, (a.n + a.columns - 1) / a.columns);
    const Sums sums{0, nullptr, 1, 1, b, gram};
    a.partial = workspace.take<double>(blocks * sums.size());
    if (blocks > 0) {
        launch("rows", rows_kernel<T>, blocks, kThreads, (state != nullptr ? 2 : 1) * b * a.columns * 8, a);
    }
    sum_partials(a.partial, blocks, sums, a.stage);
}

void run_rows(const Panel& w, const Orthonormalization* state, const Panel& last, const Panel& between, double* gram) {
    if (w.rows == 0) {
        return;
    }
    if (w.precision == Precision::float64) {
        run_rows<double>(w, state, last, between, gram);
    } else {
        run_rows<float>(w, state, last, between, gram);
    }
}

}  // namespace

void self_gram(const Panel& w, double* gram) {
    const DeviceScope scope;
    run_rows(w, nullptr, w, w, gram);
}

void panel_orthonormalize(const Panel& w, const Panel& out, const Orthonormalization& state, bool first,
                          const Reduction& reduction) {
    const DeviceScope scope;
    // The usual two rounds on float32 rows take one writing: the first transform's rows are squared in float64 and not
    // kept, and the second one takes both transforms to the rows that were given. What float64 loses to the first one's
    // condition, at most 1e5, float32 does not see.
    const bool once = first && w.precision == Precision::float32;
    for (int round = 0; round < 2; ++round) {
        next_round(state, !once ? Transforms::separate : round == 0 ? Transforms::keep : Transforms::join);
        const bool kept_back = once && round == 0;
        run_rows(w, &state, out, kept_back ? Panel{nullptr, w.precision, w.rows, w.columns, w.stride} : w, state.gram);
        if (reduction.sum != nullptr) {
            OrthonormalizeStage stage{};
            to_host(&stage, &state.facts->stage, 1);
            if (stage != OrthonormalizeStage::more) {
                return;
            }
            reduce(&kDeviceMemory, reduction, state.gram, state.rows * state.rows);
        }
    }
}

}  // namespace hesd::cuda
