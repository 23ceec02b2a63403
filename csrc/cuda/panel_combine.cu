#include <algorithm>

#include "cuda/kernels.hpp"
#include "cuda/tiles.cuh"

namespace hesd::cuda {
namespace {

template <typename S, typename C, int B>
struct CombineArguments {
    Rows<const S> v;
    void* x;
    std::int64_t x_stride;
    Precision x_precision;
    bool x_aligned;
    std::int64_t k;
    std::int64_t r;
    std::int64_t n;
    const C* coefficients;  // (tiles of B rows of X, k, B), zeros beyond r
};

// Rounds the sums in scratch to rows [row, row + B) of X, columns from `column` on.
template <typename X, typename S, typename C, int B>
HESD_DEVICE void store_rows(const CombineArguments<S, C, B>& a, const C* scratch, std::int64_t row, std::int64_t column,
                            int thread) {
    constexpr int columns = Tile<S, C, B>::columns;
    constexpr int step = Vector<X>::length;
    const Rows<X> x{static_cast<X*>(a.x), a.x_stride, a.x_aligned};
    for (int item = thread; item < B * columns / step; item += kThreads) {
        const int j = item / (columns / step);
        const int c = item % (columns / step) * step;
        Vector<X> values;
#pragma unroll
        for (int e = 0; e < step; ++e) {
            narrow(combined_sum<S, C, B>(scratch, j, c + e), &values.values[e]);
        }
        store(x.at(row + j, column + c), values, row + j < a.r ? a.n - column - c : 0, x.aligned);
    }
}

template <typename S, typename C, int B>
HESD_KERNEL HESD_LAUNCH_BOUNDS(kThreads, (Tile<S, C, B>::blocks_per_multiprocessor))
    combine_kernel(const CombineArguments<S, C, B> a) {
    using Shape = Tile<S, C, B>;
    const int thread = static_cast<int>(threadIdx.x);
    const int warp = thread / kWarp;
    const int lane = thread % kWarp;
    C* scratch = reinterpret_cast<C*>(shared_memory());
    const std::int64_t pieces = (a.n + Shape::columns - 1) / Shape::columns;
    for (std::int64_t piece = blockIdx.x; piece < pieces; piece += gridDim.x) {
        const std::int64_t column = piece * Shape::columns;
        // Tiles of X after the first find the piece of V in the cache.
        for (std::int64_t row = 0; row < a.r; row += B) {
            C x[B][Shape::load] = {};
            combine_rows<S, C, B>(a.v, 0, a.k, column + lane * Shape::load, a.n, a.coefficients + row * a.k, warp, x,
                                  row > 0);
            share_sums<S, C, B>(x, scratch, warp, lane);
            if constexpr (sizeof(C) == 8) {
                if (a.x_precision == Precision::float64) {
                    store_rows<double>(a, scratch, row, column, thread);
                    continue;
                }
            }
            switch (a.x_precision) {
                case Precision::float32:
                    store_rows<float>(a, scratch, row, column, thread);
                    break;
                case Precision::bfloat16:
                    store_rows<BFloat16>(a, scratch, row, column, thread);
                    break;
                default:
                    store_rows<Float16>(a, scratch, row, column, thread);
                    break;
            }
        }
    }
}

template <typename S, typename C, int B>
void combine(const double* s, const Panel& v, const Panel& x) {
    using Shape = Tile<S, C, B>;
    const std::int64_t k = v.rows;
    const std::int64_t r = x.rows;
    Workspace workspace;
    CombineArguments<S, C, B> a{};
    a.v = rows_of<const S>(v);
    a.x = x.data;
    a.x_stride = x.stride;
    a.x_precision = x.precision;
    a.x_aligned = aligned(x);
    a.k = k;
    a.r = r;
    a.n = x.columns;
    a.coefficients = arrange<C>(workspace, {s, k, r, 1, k}, B);
    const std::int64_t blocks = std::min<std::int64_t>(kBlocks * Shape::blocks_per_multiprocessor,
                                                       (x.columns + Shape::columns - 1) / Shape::columns);
    launch("combine", combine_kernel<S, C, B>, blocks, kThreads, Shape::scratch_bytes, a);
}

template <typename S, typename C>
void combine(const double* s, const Panel& v, const Panel& x) {
    if (x.rows <= 4) {
        combine<S, C, 4>(s, v, x);
    } else {
        combine<S, C, 8>(s, v, x);
    }
}

}  // namespace

void panel_combine(const double* s, const Panel& v, const Panel& x) {
    if (x.rows == 0 || x.columns == 0) {
        return;
    }
    const DeviceScope scope;
    with_storage(v.precision, [&](auto* storage) {
        using S = std::remove_pointer_t<decltype(storage)>;
        if (x.precision == Precision::float64) {
            combine<S, double>(s, v, x);
        } else {
            combine<S, typename Common<S, float>::type>(s, v, x);
        }
    });
}

}  // namespace hesd::cuda
