// lanczos_task: what a step of block Lanczos does with its small matrices between one pass over the vectors and the
// next. It happens where the kernels work, and so do the decisions in the usual course of a step: the host puts a whole
// step to work and reads its status once, at the end.
//
// With B the rows of the basis that take part, V those before the last two blocks and R the last two, k = history +
// recent of them, and W the product of b = width rows:
//
//   take_recent_coefficients   given overlap[history:] = R W^T:
//                                removed = (0, overlap[history:]);  begins the facts, finite if these numbers are
//   decide_second_projection   given next = B W^T after R was projected out, gram = W W^T:
//                                overlap = next;  removed += next;
//                                project_twice if for some row j  sum_{i < history} overlap[i, j]^2 > limit^2 gram[j,
//                                j] (or is not a number), else project_once; neither where a number of next is not
//                                finite
//   accumulate_second          given next = B W^T after that projection:  overlap = next;  removed += next;
//                                project_twice no more where a number of next is not finite
//   begin_product              given gram = W W^T, projected:
//                                scale = max(scale, sqrt(sum_i removed[i, j]^2 + gram[j, j]) over rows j);
//                                cancellation = min(1, sqrt(g / (g + s)) over rows j with s > 0),
//                                  g = gram[j, j], s = sum_i overlap[i, j]^2;
//                                begins to orthonormalize W with the tolerance * scale
//   begin_probes               given gram: begins to orthonormalize W with the tolerance * its longest row
//   begin_rows                 begins to orthonormalize W with the tolerance
//   record_overlap             swept_overlap = max |overlap[i, j]|
//   record_larger_overlap      swept_overlap = max(swept_overlap, |overlap[i, j]|)
//
// overlap, next, removed     (k, b) row-major float64, those of V first. Coefficients that become overlap and are added
//                            to removed are rounded to float32 first where in_float32 is set, as panel_project does it.
// orthonormalization         its gram is (b, b); begun as orthonormalize_begin does, with max_rank.
//
// Where facts->finite is zero, decide_second_projection does nothing, and begin_product leaves the orthonormalization
// at not_finite, as it does where gram has such a number. Where project_twice is zero, accumulate_second does nothing.
// k = 0 gives sums of zero. Sums over i run in order on the CPU; on a device each thread of one block sums every 256th
// number, and the threads' sums are added in a fixed order: the same bits in every run, not on every backend. Traffic:
// no panel.
#pragma once

#include "hesd/panel_orthonormalize.hpp"

namespace hesd {

enum class StepTask : int {
    take_recent_coefficients,
    decide_second_projection,
    accumulate_second,
    begin_product,
    begin_probes,
    begin_rows,
    record_overlap,
    record_larger_overlap,
};

struct StepFacts {
    int finite;            // no value so far that is not finite
    int project_once;      // one projection against the whole basis is enough
    int project_twice;     // it is not
    double scale;          // largest norm of a row of any product so far
    double cancellation;   // least fraction of a row's norm that outlived the last projection
    double swept_overlap;  // largest overlap that sweeps took out
};

// One step's matrices: pointers to where the kernels work.
struct LanczosStep {
    std::int64_t history;  // rows of the basis that are not among the last two blocks
    std::int64_t recent;   // rows of the last two blocks
    std::int64_t width;
    bool in_float32;   // panel_project's arithmetic, so that what is recorded is what was subtracted
    double limit;      // one projection is enough for a row of which the history takes out no more than this part
    double tolerance;  // for directions of the new block; relative where the task says so
    double scale;      // of the steps before
    std::int64_t max_rank;
    StepFacts* facts;
    double* overlap;                        // what the next projection takes out
    double* next;                           // Gram matrix after a projection
    double* removed;                        // all that was taken out
    Orthonormalization orthonormalization;  // its `gram` is W W^T after a projection
};

using LanczosTask = void(StepTask task, const LanczosStep& step);

}  // namespace hesd
