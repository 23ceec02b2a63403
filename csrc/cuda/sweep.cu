#include <algorithm>

#include "cuda/sweep.hpp"
#include "cuda/tiles.cuh"

namespace hesd::cuda {
namespace {

// The second use of a piece of V, for the Gram matrix, should find it in the second-level cache (40 MiB on an A100,
// 50 MiB on an H100): pieces of all blocks at work together stay within this.
constexpr std::int64_t kCache = 24 * 1024 * 1024;

template <typename S, typename T, int B>
struct SweepArguments {
    using C = typename Common<S, T>::type;
    Rows<const S> v;
    Rows<T> w;
    std::int64_t k;
    std::int64_t gram_only;  // first rows of V, which are not subtracted
    std::int64_t n;
    const C* coefficients;  // (k - gram_only, B), zeros beyond b; null: W is only read
    double* partial;        // for each block k * b sums if with_gram, then b (b + 1) / 2 if with_self
    int b;
    int subpieces;
    int segments;  // warps that share a group of rows, each with its subpieces
    bool with_gram;
    bool with_self;
    bool shared_sums;
    const int* condition;  // where it is zero, nothing is done
};

// A piece of W, from column `first` on, to shared memory (B, width), and there less the combination of V's rows, which
// is also written.
template <typename S, typename T, int B, typename C>
HESD_DEVICE void take_piece(const SweepArguments<S, T, B>& a, std::int64_t first, int width, C* w_rows, C* scratch,
                            int thread) {
    using Shape = Tile<S, C, B>;
    const int warp = thread / kWarp;
    const int lane = thread % kWarp;
    for (int m = 0; m < a.subpieces; ++m) {
        const std::int64_t column = first + m * Shape::columns;
        if (a.coefficients != nullptr) {
            C x[B][Shape::load] = {};
            combine_rows<S, C, B>(a.v, a.gram_only, a.k, column + lane * Shape::load, a.n, a.coefficients, warp, x);
            share_sums<S, C, B>(x, scratch, warp, lane);
        }
        constexpr int step = Vector<T>::length;
        for (int item = thread; item < B * Shape::columns / step; item += kThreads) {
            const int j = item / (Shape::columns / step);
            const int c = item % (Shape::columns / step) * step;
            const std::int64_t valid = j < a.b ? a.n - column - c : 0;
            Vector<T> values = load<T>(a.w.at(j, column + c), valid, a.w.aligned);
            if (a.coefficients != nullptr) {
#pragma unroll
                for (int e = 0; e < step; ++e) {
                    const C sum = combined_sum<S, C, B>(scratch, j, c + e);
                    narrow(static_cast<C>(values.values[e]) - sum, &values.values[e]);
                }
                store(a.w.at(j, column + c), values, valid, a.w.aligned);
            }
#pragma unroll
            for (int e = 0; e < step; ++e) {
                w_rows[j * width + m * Shape::columns + Shape::place(c + e)] =
                    e < valid ? static_cast<C>(values.values[e]) : C(0);
            }
        }
    }
}

// A block's sums from shared memory to its own part of the device's, segments added up.
template <typename S, typename T, int B>
HESD_DEVICE void write_sums(const SweepArguments<S, T, B>& a, const double* sums, double* partial, std::int64_t entries,
                            std::int64_t pairs, int thread) {
    for (std::int64_t i = thread; i < entries + pairs; i += kThreads) {
        double sum = 0.0;
        if (i < entries) {
            for (int segment = 0; segment < a.segments; ++segment) {
                sum += sums[segment * entries + i];
            }
        } else {
            sum = sums[a.segments * entries + i - entries];
        }
        partial[i] = sum;
    }
}

template <typename S, typename T, int B>
HESD_KERNEL HESD_LAUNCH_BOUNDS(kThreads, (Tile<S, typename Common<S, T>::type, B>::blocks_per_multiprocessor))
    sweep_kernel(const SweepArguments<S, T, B> a) {
    if (a.condition != nullptr && *a.condition == 0) {
        return;
    }
    using C = typename Common<S, T>::type;
    using Shape = Tile<S, C, B>;
    const int thread = static_cast<int>(threadIdx.x);
    const int warp = thread / kWarp;
    const int lane = thread % kWarp;
    const int width = a.subpieces * Shape::columns;
    const std::int64_t entries = a.with_gram ? a.k * a.b : 0;
    const std::int64_t pairs = a.with_self ? a.b * (a.b + 1) / 2 : 0;
    C* w_rows = reinterpret_cast<C*>(shared_memory());  // (B, width)
    C* scratch = w_rows + B * width;
    double* partial = a.partial + blockIdx.x * (entries + pairs);
    double* sums = partial;  // (segments, k, b), then the pairs
    if (a.shared_sums) {
        sums = reinterpret_cast<double*>(reinterpret_cast<char*>(scratch) +
                                         (a.coefficients != nullptr ? Shape::scratch_bytes : 0));
    }
    for (std::int64_t i = thread; i < a.segments * entries + pairs; i += kThreads) {
        sums[i] = 0.0;
    }

    const std::int64_t pieces = (a.n + width - 1) / width;
    for (std::int64_t piece = blockIdx.x; piece < pieces; piece += gridDim.x) {
        const std::int64_t first = piece * width;
        __syncthreads();  // all have read the last piece of W
        take_piece(a, first, width, w_rows, scratch, thread);
        __syncthreads();  // the piece of W is whole
        if (a.with_gram) {
            const std::int64_t groups = (a.k + Shape::rows - 1) / Shape::rows;
            const int segment = warp % a.segments;
            for (std::int64_t group = warp / a.segments; group < groups; group += kWarps / a.segments) {
                C tile[Shape::rows * B] = {};
                for (int m = segment; m < a.subpieces; m += a.segments) {
                    const std::int64_t column = first + m * Shape::columns + lane * Shape::load;
                    Vector<S> v_rows[Shape::rows];
#pragma unroll
                    for (int r = 0; r < Shape::rows; ++r) {
                        const std::int64_t row = group * Shape::rows + r;
                        v_rows[r] = load<S>(a.v.at(row, column), row < a.k ? a.n - column : 0, a.v.aligned,
                                            a.coefficients != nullptr && row >= a.gram_only);
                    }
#pragma unroll
                    for (int e = 0; e < Shape::load; e += Shape::quad) {
#pragma unroll
                        for (int j = 0; j < B; ++j) {
                            const auto w = *reinterpret_cast<const Vector<C>*>(w_rows + j * width + m * Shape::columns +
                                                                               Shape::place(lane, e));
#pragma unroll
                            for (int q = 0; q < Shape::quad; ++q) {
#pragma unroll
                                for (int r = 0; r < Shape::rows; ++r) {
                                    tile[r * B + j] += widen<C>(v_rows[r].values[e + q]) * w.values[q];
                                }
                            }
                        }
                    }
                }
                const C sum = sum_over_warp(tile, lane);
                constexpr int lanes = kWarp / (Shape::rows * B);  // that hold the same value
                const int value = lane / lanes;
                const std::int64_t row = group * Shape::rows + value / B;
                if (lane % lanes == 0 && row < a.k && value % B < a.b) {
                    sums[segment * entries + row * a.b + value % B] += static_cast<double>(sum);
                }
            }
        }
        if (a.with_self) {
            add_self_products(w_rows, width, a.b, width, sums + a.segments * entries, warp, lane);
        }
    }
    if (a.shared_sums) {
        __syncthreads();
        write_sums(a, sums, partial, entries, pairs, thread);
    }
}

// Rows of W in one tile; coefficients and gram have a row stride.
template <typename S, typename T, int B>
void sweep_tile(const Panel& w, const Panel& v, std::int64_t gram_only, const double* coefficients, std::int64_t stride,
                double* gram, double* self_gram) {
    using Arguments = SweepArguments<S, T, B>;
    using C = typename Arguments::C;
    using Shape = Tile<S, C, B>;
    const std::int64_t k = v.rows;
    const std::int64_t b = w.rows;
    Workspace workspace;
    Arguments a{};
    a.v = rows_of<const S>(v);
    a.w = rows_of<T>(w);
    a.k = k;
    a.gram_only = gram_only;
    a.n = w.columns;
    a.b = static_cast<int>(b);
    a.with_gram = gram != nullptr && k > 0;
    a.with_self = self_gram != nullptr;
    a.condition = current_execution().condition;
    if (coefficients != nullptr) {
        a.coefficients = arrange<C>(workspace, {coefficients, k - gram_only, b, stride, 1}, B);
    }
    std::int64_t blocks = kBlocks * Shape::blocks_per_multiprocessor;
    a.subpieces = Shape::most_subpieces;
    if (coefficients != nullptr && a.with_gram) {
        const std::int64_t subpiece_bytes = k * Shape::columns * static_cast<std::int64_t>(sizeof(S));
        while (a.subpieces > 1 && a.subpieces * subpiece_bytes * blocks > kCache) {
            a.subpieces /= 2;
        }
        if (subpiece_bytes * blocks > kCache) {
            blocks = kBlocks;
        }
    }
    const std::int64_t width = a.subpieces * Shape::columns;
    blocks = std::min(blocks, (w.columns + width - 1) / width);
    a.segments = 1;
    const std::int64_t groups = (k + Shape::rows - 1) / Shape::rows;
    while (a.with_gram && a.segments * 2 <= a.subpieces && a.segments * 2 * groups <= kWarps) {
        a.segments *= 2;
    }
    const std::int64_t entries = a.with_gram ? k * b : 0;
    const std::int64_t pairs = a.with_self ? b * (b + 1) / 2 : 0;
    a.shared_sums = a.segments * entries <= Shape::shared_sums;
    a.segments = a.shared_sums ? a.segments : 1;
    a.partial = workspace.take<double>(blocks * (entries + pairs));
    const std::int64_t shared = B * width * static_cast<std::int64_t>(sizeof(C)) +
                                (coefficients != nullptr ? Shape::scratch_bytes : 0) +
                                (a.shared_sums ? (a.segments * entries + pairs) * 8 : 0);
    if (blocks > 0) {
        launch("sweep", sweep_kernel<S, T, B>, blocks, kThreads, shared, a);
    }
    if (entries + pairs > 0) {
        sum_partials(a.partial, blocks, {entries, gram, b, stride, a.with_self ? b : 0, self_gram});
    }
}

}  // namespace

void sweep(const Panel& w, const Panel& v, std::int64_t gram_only, const double* coefficients, double* gram,
           double* self_products) {
    coefficients = v.rows > 0 ? coefficients : nullptr;
    const DeviceScope scope;
    const bool fused = w.rows <= kWidestTile;  // wider blocks are swept in parts, and squared by themselves
    for (std::int64_t first = 0; first < w.rows && (v.rows > 0 || fused); first += kWidestTile) {
        const Panel rows = w.slice(first, std::min(kWidestTile, w.rows - first));
        with_storage(v.precision, [&](auto* storage) {
            with_working(w.precision, [&](auto* working) {
                using S = std::remove_pointer_t<decltype(storage)>;
                using T = std::remove_pointer_t<decltype(working)>;
                const auto run = rows.rows == 1   ? sweep_tile<S, T, 1>
                                 : rows.rows <= 4 ? sweep_tile<S, T, 4>
                                                  : sweep_tile<S, T, 8>;
                run(rows, v, gram_only, coefficients != nullptr ? coefficients + first : nullptr, w.rows,
                    gram != nullptr ? gram + first : nullptr, fused ? self_products : nullptr);
            });
        });
    }
    if (self_products != nullptr && !fused) {
        self_gram(w, self_products);
    }
}

}  // namespace hesd::cuda
