// What a step of block Lanczos does with its small matrices between one pass over the vectors and the next. It happens
// where the kernels work, and so do the decisions in the usual course of a step: the host puts a whole step to work and
// looks at the facts once, at its end.
#pragma once

#include <cmath>

#include "orthonormalize_rounds.hpp"

namespace hesd {

struct LanczosFacts {
    int finite;           // no value that is not finite so far
    int once;             // one projection against the whole basis is enough
    int twice;            // it is not
    double scale;         // largest norm of a row of any product so far
    double cancellation;  // least fraction of a row's norm that outlived the last projection
    double swept;         // largest overlap that sweeps took out
};

// One step's matrices: pointers to where the kernels work. Those of overlaps are (history + recent, width).
struct LanczosStep {
    std::int64_t history;  // rows of the basis that are not among the last two blocks
    std::int64_t recent;   // rows of the last two blocks
    std::int64_t width;
    bool in_float32;   // panel_project's arithmetic, so that what is recorded is what was subtracted
    double limit;      // one projection is enough for a row of which the history takes out no more than this part
    double tolerance;  // for directions of the new block; relative where the task says so
    double scale;      // of the steps before
    std::int64_t max_rank;
    LanczosFacts* facts;
    double* overlap;                        // what the next projection takes out
    double* next;                           // Gram matrix after a projection
    double* removed;                        // all that was taken out
    Orthonormalization orthonormalization;  // its `gram` is W W^T after a projection
};

enum class LanczosTask : int {
    recent,         // overlap has the last two blocks' part; sets finite and removed
    whole,          // next has the Gram matrix after that was taken out: overlap becomes it; sets once and twice
    again,          // likewise in the course of `twice`
    product,        // W is projected: sets scale and cancellation, begins to orthonormalize with tolerance * scale
    probes,         // begins to orthonormalize W with tolerance * its longest row
    block,          // begins to orthonormalize W with the tolerance
    swept,          // sets swept to the largest overlap
    swept_further,  // or to swept, where that is larger
};

// For kernels that work in the host's memory, as Kernels has them.
void lanczos_task(LanczosTask task, const LanczosStep& step);
void add(double* target, const double* source, std::int64_t count);

namespace team_work {

template <typename Team>
HESD_TEAM_WORK bool all_finite(const Team& team, const double* values, std::int64_t count) {
    double others = 0.0;
    share(team, 0, count, [&](std::int64_t i) { others += is_finite(values[i]) ? 0.0 : 1.0; });
    return team.sum(others) == 0.0;
}

// Sum of squares of a column of rows [0, rows) of a matrix of `width` columns.
template <typename Team>
HESD_TEAM_WORK double square_of_column(const Team& team, const double* values, std::int64_t rows, std::int64_t width,
                                       std::int64_t column) {
    double square = 0.0;
    share(team, 0, rows, [&](std::int64_t i) { square += values[i * width + column] * values[i * width + column]; });
    return team.sum(square);
}

// The coefficients in `source`, as they are used.
template <typename Team>
HESD_TEAM_WORK void take_coefficients(const Team& team, const LanczosStep& step, const double* source,
                                      std::int64_t first, bool add) {
    share(team, first, (step.history + step.recent) * step.width, [&](std::int64_t i) {
        const double value = step.in_float32 ? static_cast<double>(static_cast<float>(source[i])) : source[i];
        step.overlap[i] = value;
        step.removed[i] = add ? step.removed[i] + value : value;
    });
}

template <typename Team>
HESD_TEAM_WORK void take_recent(const Team& team, const LanczosStep& step) {
    const std::int64_t first = step.history * step.width;
    const bool finite = all_finite(team, step.overlap + first, step.recent * step.width);
    share(team, 0, first, [&](std::int64_t i) { step.removed[i] = 0.0; });
    take_coefficients(team, step, step.overlap, first, false);
    if (team.thread == 0) {
        *step.facts = {finite ? 1 : 0, 0, 0, step.scale, 1.0, 0.0};
    }
}

template <typename Team>
HESD_TEAM_WORK void take_whole(const Team& team, const LanczosStep& step) {
    if (step.facts->finite == 0) {
        return;
    }
    const bool finite = all_finite(team, step.next, (step.history + step.recent) * step.width);
    take_coefficients(team, step, step.next, 0, true);
    team.sync();
    // Whether the history takes so much out of a row that one projection is not enough: what it leaves of an overlap is
    // the rounding of the coefficient and the history's own loss of orthogonality.
    bool twice = false;
    for (std::int64_t j = 0; j < step.width; ++j) {
        const double square = square_of_column(team, step.overlap, step.history, step.width, j);
        const double row = step.orthonormalization.gram[j * step.width + j];
        twice = twice || !(square <= step.limit * step.limit * row);  // not a number counts as much
    }
    if (team.thread == 0) {
        step.facts->finite = finite ? 1 : 0;
        step.facts->once = finite && !twice ? 1 : 0;
        step.facts->twice = finite && twice ? 1 : 0;
    }
}

template <typename Team>
HESD_TEAM_WORK void take_again(const Team& team, const LanczosStep& step) {
    if (step.facts->twice == 0) {
        return;
    }
    const bool finite = all_finite(team, step.next, (step.history + step.recent) * step.width);
    take_coefficients(team, step, step.next, 0, true);
    if (team.thread == 0) {
        step.facts->finite = step.facts->twice = finite ? 1 : 0;
    }
}

// Norms of what is left of the product and of what was taken out of it.
template <typename Team>
HESD_TEAM_WORK void weigh_product(const Team& team, const LanczosStep& step) {
    const double* left = step.orthonormalization.gram;
    const std::int64_t rows = step.history + step.recent;
    double scale = step.scale;
    double cancellation = 1.0;
    const bool finite = step.facts->finite != 0 && all_finite(team, left, step.width * step.width);
    for (std::int64_t j = 0; j < step.width && finite; ++j) {
        const double all = square_of_column(team, step.removed, rows, step.width, j);
        const double last = square_of_column(team, step.overlap, rows, step.width, j);
        const double row = left[j * step.width + j];
        scale = larger(scale, std::sqrt(all + row));
        if (last > 0.0) {
            cancellation = smaller(cancellation, std::sqrt(row / (row + last)));
        }
    }
    team.sync();
    begin_orthonormalization(team, step.orthonormalization, step.tolerance * scale, step.max_rank);
    if (team.thread == 0) {
        step.facts->finite = finite ? 1 : 0;
        step.facts->scale = scale;
        step.facts->cancellation = cancellation;
        if (!finite) {
            step.orthonormalization.facts->stage = OrthonormalizeStage::not_finite;
        }
    }
}

template <typename Team>
HESD_TEAM_WORK void begin_probes(const Team& team, const LanczosStep& step) {
    double longest = 0.0;
    for (std::int64_t i = 0; i < step.width; ++i) {
        longest = larger(longest, step.orthonormalization.gram[i * step.width + i]);
    }
    begin_orthonormalization(team, step.orthonormalization, step.tolerance * std::sqrt(longest), step.max_rank);
}

template <typename Team>
HESD_TEAM_WORK void note_swept(const Team& team, const LanczosStep& step, double before) {
    double largest = 0.0;
    share(team, 0, (step.history + step.recent) * step.width,
          [&](std::int64_t i) { largest = larger(largest, std::fabs(step.overlap[i])); });
    largest = team.largest(largest);
    if (team.thread == 0) {
        step.facts->swept = larger(before, largest);
    }
}

template <typename Team>
HESD_TEAM_WORK void do_task(const Team& team, LanczosTask task, const LanczosStep& step) {
    switch (task) {
        case LanczosTask::recent:
            take_recent(team, step);
            break;
        case LanczosTask::whole:
            take_whole(team, step);
            break;
        case LanczosTask::again:
            take_again(team, step);
            break;
        case LanczosTask::product:
            weigh_product(team, step);
            break;
        case LanczosTask::probes:
            begin_probes(team, step);
            break;
        case LanczosTask::block:
            begin_orthonormalization(team, step.orthonormalization, step.tolerance, step.max_rank);
            break;
        case LanczosTask::swept:
            note_swept(team, step, 0.0);
            break;
        case LanczosTask::swept_further:
            note_swept(team, step, step.facts->swept);
            break;
    }
}

}  // namespace team_work
}  // namespace hesd
