// The tasks of hesd/lanczos_task.hpp, for any team of threads.
#pragma once

#include <cmath>

#include "hesd/add.hpp"
#include "hesd/lanczos_task.hpp"
#include "small/pivoted_cholesky_qr.hpp"

namespace hesd {

// For kernels that work in the host's memory, as Kernels has them.
LanczosTask lanczos_task;
Add add;

namespace team_work {

template <typename Team>
HESD_TEAM_WORK bool all_finite(const Team& team, const double* values, std::int64_t count) {
    double others = 0.0;
    for_each_in_team(team, 0, count, [&](std::int64_t i) { others += is_finite(values[i]) ? 0.0 : 1.0; });
    return team.sum(others) == 0.0;
}

// Sum of squares of a column of rows [0, rows) of a matrix of `width` columns.
template <typename Team>
HESD_TEAM_WORK double square_of_column(const Team& team, const double* values, std::int64_t rows, std::int64_t width,
                                       std::int64_t column) {
    double square = 0.0;
    for_each_in_team(team, 0, rows,
                     [&](std::int64_t i) { square += values[i * width + column] * values[i * width + column]; });
    return team.sum(square);
}

// The coefficients in `source`, as they are used.
template <typename Team>
HESD_TEAM_WORK void take_coefficients(const Team& team, const LanczosStep& step, const double* source,
                                      std::int64_t first, bool add) {
    for_each_in_team(team, first, (step.history + step.recent) * step.width, [&](std::int64_t i) {
        const double value = step.in_float32 ? static_cast<double>(static_cast<float>(source[i])) : source[i];
        step.overlap[i] = value;
        step.removed[i] = add ? step.removed[i] + value : value;
    });
}

template <typename Team>
HESD_TEAM_WORK void take_recent_coefficients(const Team& team, const LanczosStep& step) {
    const std::int64_t first = step.history * step.width;
    const bool finite = all_finite(team, step.overlap + first, step.recent * step.width);
    for_each_in_team(team, 0, first, [&](std::int64_t i) { step.removed[i] = 0.0; });
    take_coefficients(team, step, step.overlap, first, false);
    if (team.thread == 0) {
        *step.facts = {finite ? 1 : 0, 0, 0, step.scale, 1.0, 0.0};
    }
}

// Those of the Gram matrix after a projection, on top of what was removed before; whether they are finite.
template <typename Team>
HESD_TEAM_WORK bool take_next_coefficients(const Team& team, const LanczosStep& step) {
    const bool finite = all_finite(team, step.next, (step.history + step.recent) * step.width);
    take_coefficients(team, step, step.next, 0, true);
    return finite;
}

template <typename Team>
HESD_TEAM_WORK void decide_second_projection(const Team& team, const LanczosStep& step) {
    if (step.facts->finite == 0) {
        return;
    }
    const bool finite = take_next_coefficients(team, step);
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
        step.facts->project_once = finite && !twice ? 1 : 0;
        step.facts->project_twice = finite && twice ? 1 : 0;
    }
}

template <typename Team>
HESD_TEAM_WORK void accumulate_second(const Team& team, const LanczosStep& step) {
    if (step.facts->project_twice == 0) {
        return;
    }
    const bool finite = take_next_coefficients(team, step);
    if (team.thread == 0) {
        step.facts->finite = step.facts->project_twice = finite ? 1 : 0;
    }
}

// Norms of what is left of the product and of what was taken out of it.
template <typename Team>
HESD_TEAM_WORK void begin_product(const Team& team, const LanczosStep& step) {
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
HESD_TEAM_WORK void record_overlap(const Team& team, const LanczosStep& step, double before) {
    double largest = 0.0;
    for_each_in_team(team, 0, (step.history + step.recent) * step.width,
                     [&](std::int64_t i) { largest = larger(largest, std::fabs(step.overlap[i])); });
    largest = team.largest(largest);
    if (team.thread == 0) {
        step.facts->swept_overlap = larger(before, largest);
    }
}

template <typename Team>
HESD_TEAM_WORK void do_task(const Team& team, StepTask task, const LanczosStep& step) {
    switch (task) {
        case StepTask::take_recent_coefficients:
            take_recent_coefficients(team, step);
            break;
        case StepTask::decide_second_projection:
            decide_second_projection(team, step);
            break;
        case StepTask::accumulate_second:
            accumulate_second(team, step);
            break;
        case StepTask::begin_product:
            begin_product(team, step);
            break;
        case StepTask::begin_probes:
            begin_probes(team, step);
            break;
        case StepTask::begin_rows:
            begin_orthonormalization(team, step.orthonormalization, step.tolerance, step.max_rank);
            break;
        case StepTask::record_overlap:
            record_overlap(team, step, 0.0);
            break;
        case StepTask::record_larger_overlap:
            record_overlap(team, step, step.facts->swept_overlap);
            break;
    }
}

}  // namespace team_work
}  // namespace hesd
