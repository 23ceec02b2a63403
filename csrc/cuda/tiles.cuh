// Tiles of the kernels that pass over a panel V (k, n) together with a few rows of W (b, n) or X (r, n).
//
// A block of 256 threads takes a piece of the columns: `subpieces` times 32 lanes times one 16-byte load. Rows of W
// come in tiles of B = 1, 4 or 8 (wider blocks in several passes over V).
//
//     S (V)        columns of a    products of a lane to       rows of V in a register tile
//                  subpiece        one float32 sum             B = 1    B = 4    B = 8
//     float64        64              -                           8        8        4
//     float32       128              at most 64 (B = 8: 32)      8        8        4
//     16 bits       256              at most 64 (B = 8: 32)      4        4        4
//
// Linear combinations of V's rows (a projection, Ritz vectors): the 8 warps share the rows, each lane keeps B sums for
// its columns in registers, and the warps' sums meet in shared memory. Inner products: the piece of W lies in shared
// memory, each warp takes `rows` rows of V at a time, and each lane keeps rows * B sums, which then are summed over the
// lanes. Where there are fewer such groups of rows than warps, several warps share one, each with its subpieces.
#pragma once

#include "cuda/elements.cuh"
#include "hesd/panel_orthonormalize.hpp"

namespace hesd::cuda {

constexpr std::int64_t kWidestTile = 8;  // rows of W
// Shared memory that a block can have on every device since compute capability 8.0; 8.6 has the least. What goes there
// must not depend on the device, as the order of sums does on it.
constexpr int kSharedMemory = 99 * 1024;

template <typename S, typename C, int B>
struct Tile {
    static constexpr int load = Vector<S>::length;            // columns of a lane in a subpiece
    static constexpr int columns = kWarp * load;              // of a subpiece
    static constexpr int quad = Vector<C>::length;            // sums in 16 bytes of shared memory
    static constexpr int rows = B == 8 || load == 8 ? 4 : 8;  // of V in a register tile
    // The registers of a multiprocessor hold two blocks, or one that has as many loads in flight.
    static constexpr int blocks_per_multiprocessor = sizeof(C) == 4 && load * B < 64 ? 2 : 1;
    static constexpr int ahead = load == 8 && blocks_per_multiprocessor == 2 ? 2 : 4;  // rows loaded at once, combining
    static constexpr int row_bytes = columns * static_cast<int>(sizeof(C));
    static constexpr int scratch_bytes = kWarps / 2 * B * row_bytes;
    static constexpr int most_by_memory = (scratch_bytes > 32 * 1024 ? 16 : 32) * 1024 / (B * row_bytes);
    static constexpr int most_by_run = 64 / load;
    static constexpr int most_subpieces = most_by_memory < most_by_run ? most_by_memory : most_by_run;
    // Sums of a block that stay in shared memory; more of them lie in device memory, in practice in the cache.
    static constexpr int pairs = B * (B + 1) / 2;
    static constexpr int sums_by_memory = (kSharedMemory - most_subpieces * B * row_bytes - scratch_bytes) / 8 - pairs;
    static constexpr int shared_sums = sums_by_memory < 4096 ? sums_by_memory : 4096;

    static_assert(B == 1 || B == 4 || B == kWidestTile, "rows of W come in tiles of 1, 4 or 8");
    static_assert(rows * B <= kWarp, "a lane's sums are summed over the warp at one value for each lane");
    static_assert(load % quad == 0, "a lane's columns fill whole 16 bytes of shared memory");
    static_assert(most_subpieces >= 1 && (most_subpieces & (most_subpieces - 1)) == 0, "halved until they fit");
    static_assert(sizeof(C) == 8 || most_subpieces * load <= 64, "products that one float32 sum takes");
    static_assert(shared_sums >= 2048, "a usual number of rows of V has its sums in shared memory");

    // Where a lane's e-th column of a subpiece lies in shared memory, so that 16-byte accesses of the lanes follow each
    // other.
    HESD_DEVICE static int place(int lane, int e) { return e / quad * kWarp * quad + lane * quad + e % quad; }
    HESD_DEVICE static int place(int column) { return place(column / load, column % load); }
};

// x[j][e] += sum over i of coefficients[i - first][j] * V[i][column + e] for every eighth row i, from first + warp on.
template <typename S, typename C, int B>
HESD_DEVICE void combine_rows(const Rows<const S>& v, std::int64_t first, std::int64_t k, std::int64_t column,
                              std::int64_t n, const C* coefficients, int warp, C (&x)[B][Vector<S>::length],
                              bool again = false) {
    constexpr int ahead = Tile<S, C, B>::ahead;
    for (std::int64_t i = first + warp; i < k; i += kWarps * ahead) {
        Vector<S> rows[ahead];
#pragma unroll
        for (int u = 0; u < ahead; ++u) {
            const std::int64_t row = i + kWarps * u;
            rows[u] = load(v.at(row, column), row < k ? n - column : 0, v.aligned, again);
        }
#pragma unroll
        for (int u = 0; u < ahead; ++u) {
            const std::int64_t row = i + kWarps * u;
            if (row < k) {
                const C* factors = coefficients + (row - first) * B;
#pragma unroll
                for (int j = 0; j < B; ++j) {
#pragma unroll
                    for (int e = 0; e < Vector<S>::length; ++e) {
                        x[j][e] += factors[j] * widen<C>(rows[u].values[e]);
                    }
                }
            }
        }
    }
}

// Leaves in scratch [4][B][columns] the sums of x over pairs of warps; combined_sum adds them up. All threads call it,
// and may read scratch when it returns.
template <typename S, typename C, int B>
HESD_DEVICE void share_sums(const C (&x)[B][Vector<S>::length], C* scratch, int warp, int lane) {
    using Shape = Tile<S, C, B>;
    C* mine = scratch + warp % (kWarps / 2) * B * Shape::columns;
    __syncthreads();
#pragma unroll
    for (int half = 1; half >= 0; --half) {
        if (warp / (kWarps / 2) == half) {
#pragma unroll
            for (int j = 0; j < B; ++j) {
#pragma unroll
                for (int e = 0; e < Shape::load; e += Shape::quad) {
                    auto* place = reinterpret_cast<Vector<C>*>(mine + j * Shape::columns + Shape::place(lane, e));
                    Vector<C> sums;
#pragma unroll
                    for (int q = 0; q < Shape::quad; ++q) {
                        sums.values[q] = half == 1 ? x[j][e + q] : x[j][e + q] + place->values[q];
                    }
                    *place = sums;
                }
            }
        }
        __syncthreads();
    }
}

template <typename S, typename C, int B>
HESD_DEVICE C combined_sum(const C* scratch, int j, int column) {
    using Shape = Tile<S, C, B>;
    const C* sums = scratch + j * Shape::columns + Shape::place(column);
    return (sums[0] + sums[B * Shape::columns]) + (sums[2 * B * Shape::columns] + sums[3 * B * Shape::columns]);
}

// The p-th pair (i, j), i <= j, of an upper triangle by rows of j.
struct Pair {
    int i;
    int j;
};
HESD_DEVICE Pair pair_of(int p) {
    int j = 0;
    while ((j + 1) * (j + 2) / 2 <= p) {
        ++j;
    }
    return {p - j * (j + 1) / 2, j};
}

// sums[p] += the inner product, in float64, of rows i and j of a piece in shared memory, for all pairs of b rows.
// The warp p % 8 owns pair p.
template <typename C>
HESD_DEVICE void add_self_products(const C* rows, int stride, int b, int columns, double* sums, int warp, int lane) {
    for (int p = warp; p < b * (b + 1) / 2; p += kWarps) {
        const Pair pair = pair_of(p);
        double sum[1] = {0.0};
        for (int c = lane; c < columns; c += kWarp) {
            sum[0] += static_cast<double>(rows[pair.i * stride + c]) * static_cast<double>(rows[pair.j * stride + c]);
        }
        const double total = sum_over_warp(sum, lane);
        if (lane == 0) {
            sums[p] += total;
        }
    }
}

// Where the sums of a launch go, on the device: `entries` to a matrix of `width` columns (gram), then those of pairs,
// as add_self_products orders them, to a symmetric one (b, b).
struct Sums {
    std::int64_t entries;
    double* gram;
    std::int64_t width;
    std::int64_t gram_stride;
    std::int64_t b;  // 0: no pairs
    double* self_gram;

    [[nodiscard]] std::int64_t size() const { return entries + b * (b + 1) / 2; }
};

// Adds the partial sums (blocks, sums.size()) up over the blocks, in a fixed order. With a stage, only where more
// rounds are to come.
void sum_partials(const double* partial, std::int64_t blocks, const Sums& sums,
                  const OrthonormalizeStage* stage = nullptr);

// Coefficients as a kernel's tiles take them: matrix (rows, columns), with the given strides, to tiles of B columns
// (columns / B rounded up, rows, B), zeros beyond the columns. A null matrix is the identity.
struct Coefficients {
    const double* matrix;
    std::int64_t rows;
    std::int64_t columns;
    std::int64_t row_stride;
    std::int64_t column_stride;
};
template <typename C>
C* arrange(Workspace& workspace, const Coefficients& of, std::int64_t tile);

}  // namespace hesd::cuda
