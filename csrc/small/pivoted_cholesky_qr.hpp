// The small-matrix half of panel_orthonormalize: from Gram matrices to row transforms. Sees no panel.
#pragma once

#include <cmath>
#include <limits>

#include "hesd/panel_orthonormalize.hpp"
#include "small/thread_team.hpp"

namespace hesd {

// What orthonormalize_next does for rows that are not rewritten between the first two rounds: keeps the first round's
// transform, or puts it behind the second round's.
enum class Transforms : int { separate, keep, join };

// The state of up to `most` rows in memory of orthonormalization_numbers(most) numbers of 8 bytes. Facts and factor
// come last, and follow each other.
constexpr std::int64_t orthonormalization_numbers(std::int64_t most) {
    return 3 * most * most + orthonormalize_scratch(most) + static_cast<std::int64_t>(sizeof(OrthonormalizeFacts) / 8);
}
inline Orthonormalization orthonormalization_in(double* memory, std::int64_t most, std::int64_t rows) {
    static_assert(sizeof(OrthonormalizeFacts) % 8 == 0, "whole numbers");
    Orthonormalization state{};
    state.rows = rows;
    state.gram = memory;
    state.transform = state.gram + most * most;
    state.scratch = state.transform + most * most;
    state.facts = reinterpret_cast<OrthonormalizeFacts*>(state.scratch + orthonormalize_scratch(most));
    state.factor = reinterpret_cast<double*>(state.facts + 1);
    return state;
}

// To be called by the host where the kernels work in its memory.
void orthonormalize_begin(const Orthonormalization& state, double tolerance, std::int64_t max_rank);
void orthonormalize_next(const Orthonormalization& state);

// Throws EngineError where W was not finite or could not be squared. Facts in the host's memory.
void orthonormalize_require(const OrthonormalizeFacts& facts);

namespace team_work {

// A scaled pivot (squared sine) is wrong by about epsilon over the least pivot taken before it. Products of the two
// below this are not trusted: the Gram matrix has lost them to rounding.
constexpr double kPivotFloor = 1e-10;
// A Gram matrix this close to the identity, in the largest row sum, makes the next transform the last one.
constexpr double kNearIdentity = 0.1;
constexpr double kInfinity = std::numeric_limits<double>::infinity();

// State of a round, in the scratch of an Orthonormalization. Positions are rows in the order of the new ones.
struct Round {
    double* cholesky;     // (b, b) by position: factor of the Gram matrix scaled to a unit diagonal
    double* other;        // (b, b)
    double* first;        // (b, b): the first round's transform, where it is kept
    double* norm;         // by row; infinite where the row of the Gram matrix is not finite
    double* pivot;        // by position: squared sine left
    double* row_sum;      // by position: off-diagonal entries of the scaled matrix
    std::int64_t* order;  // by position: row
    std::int64_t* candidates;
    std::int64_t* goes_on;
};

HESD_TEAM_WORK inline Round round_in(double* scratch, std::int64_t b) {
    Round round{};
    round.cholesky = scratch;
    round.other = round.cholesky + b * b;
    round.first = round.other + b * b;
    round.norm = round.first + b * b;
    round.pivot = round.norm + b;
    round.row_sum = round.pivot + b;
    static_assert(sizeof(std::int64_t) == sizeof(double), "one place for either");
    round.order = reinterpret_cast<std::int64_t*>(round.row_sum + b);
    round.candidates = round.order + b;
    round.goes_on = round.candidates + 1;
    return round;
}

template <typename Team>
HESD_TEAM_WORK void begin_orthonormalization(const Team& team, const Orthonormalization& o, double tolerance,
                                             std::int64_t max_rank) {
    const std::int64_t b = o.rows;
    for_each_in_team(team, 0, b * b, [&](std::int64_t e) { o.factor[e] = e / b == e % b ? 1.0 : 0.0; });
    if (team.thread == 0) {
        *o.facts = {
            OrthonormalizeStage::more, tolerance, larger<std::int64_t>(0, smaller(b, max_rank)), 0, 0, b, kInfinity};
    }
    team.sync();
}

// Row norms, and the rows that are not dropped; false where some are not finite. By one thread.
HESD_TEAM_WORK inline bool choose_candidates(const OrthonormalizeFacts& facts, const Round& round) {
    std::int64_t candidates = 0;
    bool finite = true;
    for (std::int64_t i = 0; i < facts.live; ++i) {
        finite = finite && is_finite(round.norm[i]);
        if (i < facts.rank || round.norm[i] > facts.tolerance) {
            round.order[candidates++] = i;
        }
    }
    *round.candidates = candidates;
    return finite;
}

// Brings the longest remainder that is trusted and above the tolerance to the position `accepted`; false where there is
// none, or where one that is not trusted may be longer: the next round measures it. By one thread.
HESD_TEAM_WORK inline bool bring_longest(const OrthonormalizeFacts& facts, const Round& round, std::int64_t b,
                                         std::int64_t accepted, double least_pivot) {
    std::int64_t best = accepted;
    double longest = -1.0;
    double untrusted = 0.0;  // what a row that is not trusted may have left
    for (std::int64_t p = accepted; p < *round.candidates; ++p) {
        const double length = round.norm[round.order[p]];
        const double remainder = round.pivot[p] * length * length;
        if (round.pivot[p] * least_pivot <= kPivotFloor) {
            untrusted = larger(untrusted, kPivotFloor / least_pivot * length * length);
        } else if (remainder > facts.tolerance * facts.tolerance && remainder > longest) {
            longest = remainder;
            best = p;
        }
    }
    if (longest < untrusted || longest < 0.0) {
        return false;
    }
    const std::int64_t row = round.order[accepted];
    round.order[accepted] = round.order[best];
    round.order[best] = row;
    const double pivot = round.pivot[accepted];
    round.pivot[accepted] = round.pivot[best];
    round.pivot[best] = pivot;
    for (std::int64_t q = 0; q < accepted; ++q) {
        const double entry = round.cholesky[accepted * b + q];
        round.cholesky[accepted * b + q] = round.cholesky[best * b + q];
        round.cholesky[best * b + q] = entry;
    }
    return true;
}

// Ends what is ended: false where no transform is wanted. `facts` are those of the round before.
template <typename Team>
HESD_TEAM_WORK bool wants_round(const Team& team, const Orthonormalization& o, const OrthonormalizeFacts& facts) {
    // Two rounds are enough for a well-conditioned panel, and each further dependent direction takes at most two more.
    const bool too_many = facts.rounds >= 2 * o.rows + 8;
    if (facts.stage == OrthonormalizeStage::more && !too_many) {
        return true;
    }
    if (team.thread == 0 && facts.stage == OrthonormalizeStage::last) {
        o.facts->stage = OrthonormalizeStage::finished;
    } else if (team.thread == 0 && facts.stage == OrthonormalizeStage::more) {
        o.facts->stage = OrthonormalizeStage::no_convergence;
    }
    return false;
}

// Sets norms, pivots and candidates from the Gram matrix, and the factor to zeros; false where that is not finite.
template <typename Team>
HESD_TEAM_WORK bool measure_rows(const Team& team, const Orthonormalization& o, const OrthonormalizeFacts& facts,
                                 const Round& round) {
    const std::int64_t b = o.rows;
    for_each_in_team(team, 0, facts.live, [&](std::int64_t i) {
        bool finite = true;
        for (std::int64_t j = 0; j < b; ++j) {
            finite = finite && is_finite(o.gram[i * b + j]);
        }
        const double square = o.gram[i * b + i];
        round.norm[i] = finite ? std::sqrt(larger(square, 0.0)) : kInfinity;
    });
    for_each_in_team(team, 0, b, [&](std::int64_t p) { round.pivot[p] = 1.0; });
    for_each_in_team(team, 0, b * b, [&](std::int64_t e) { round.cholesky[e] = 0.0; });
    team.sync();
    if (team.thread == 0) {
        *round.goes_on = choose_candidates(facts, round) ? 1 : 0;
        if (*round.goes_on == 0) {
            o.facts->stage = OrthonormalizeStage::not_finite;
        }
    }
    team.sync();
    return *round.goes_on != 0;
}

// Entry of the Gram matrix scaled to a unit diagonal, by position.
HESD_TEAM_WORK inline double scaled(const Orthonormalization& o, const Round& round, std::int64_t p, std::int64_t q) {
    const std::int64_t i = round.order[p];
    const std::int64_t j = round.order[q];
    return o.gram[i * o.rows + j] / (round.norm[i] * round.norm[j]);
}

// Cholesky factorization of the scaled matrix; returns how many rows it takes. Resolved rows keep their places; among
// the residual rows the longest remainder comes next.
template <typename Team>
HESD_TEAM_WORK std::int64_t factor_with_pivoting(const Team& team, const Orthonormalization& o,
                                                 const OrthonormalizeFacts& facts, const Round& round,
                                                 std::int64_t candidates) {
    const std::int64_t b = o.rows;
    std::int64_t accepted = 0;
    double least_pivot = 1.0;
    team.sync();
    while (accepted < candidates && accepted < facts.max_rank) {
        if (accepted >= facts.rank) {
            if (team.thread == 0) {
                *round.goes_on = bring_longest(facts, round, b, accepted, least_pivot) ? 1 : 0;
            }
            team.sync();
            if (*round.goes_on == 0) {
                break;
            }
        }
        const double trusted = larger(round.pivot[accepted], kPivotFloor);
        least_pivot = smaller(least_pivot, trusted);
        const double diagonal = std::sqrt(trusted);
        if (team.thread == 0) {
            round.cholesky[accepted * b + accepted] = diagonal;
        }
        for_each_in_team(team, accepted + 1, candidates, [&](std::int64_t p) {
            double sum = scaled(o, round, p, accepted);
            for (std::int64_t q = 0; q < accepted; ++q) {
                sum -= round.cholesky[p * b + q] * round.cholesky[accepted * b + q];
            }
            const double entry = sum / diagonal;
            round.cholesky[p * b + accepted] = entry;
            round.pivot[p] -= entry * entry;
        });
        team.sync();
        ++accepted;
    }
    return accepted;
}

// accepted rows:  Y_a = C^-1 D_a^-1 X_a;    residual rows:  Y_r = X_r - D_r C_r Y_a;    by columns
template <typename Team>
HESD_TEAM_WORK void write_transform(const Team& team, const Orthonormalization& o, std::int64_t live,
                                    const Round& round, std::int64_t accepted, std::int64_t kept) {
    const std::int64_t b = o.rows;
    for_each_in_team(team, 0, b, [&](std::int64_t i) {
        for (std::int64_t p = 0; p < b; ++p) {
            double entry = 0.0;
            if (p < kept && i < live) {
                const std::int64_t row = round.order[p];
                const bool residual = p >= accepted;
                const double length = round.norm[row];
                entry = row != i ? 0.0 : residual ? 1.0 : 1.0 / length;
                for (std::int64_t q = 0; q < smaller(p, accepted); ++q) {
                    entry -= round.cholesky[p * b + q] * (residual ? length : 1.0) * o.transform[q * b + i];
                }
                entry = residual ? entry : entry / round.cholesky[p * b + p];
            }
            o.transform[p * b + i] = entry;
        }
    });
}

// rows at first = factor X with X_a = D_a C Y_a, X_r = Y_r + D_r C_r Y_a
template <typename Team>
HESD_TEAM_WORK void update_factor(const Team& team, const Orthonormalization& o, const Round& round,
                                  std::int64_t candidates, std::int64_t accepted, std::int64_t kept) {
    const std::int64_t b = o.rows;
    for_each_in_team(team, 0, b * b, [&](std::int64_t e) {
        const std::int64_t i = e / b;
        const std::int64_t q = e % b;
        double entry = 0.0;
        if (q < accepted) {
            for (std::int64_t p = q; p < candidates; ++p) {
                const std::int64_t row = round.order[p];
                entry += o.factor[i * b + row] * round.norm[row] * round.cholesky[p * b + q];
            }
        } else if (q < kept) {
            entry = o.factor[i * b + round.order[q]];
        }
        round.other[e] = entry;
    });
    team.sync();
    for_each_in_team(team, 0, b * b, [&](std::int64_t e) { o.factor[e] = round.other[e]; });
}

// Off-diagonal row sums of the scaled matrix, as far as it was factored.
template <typename Team>
HESD_TEAM_WORK void sum_rows(const Team& team, const Orthonormalization& o, const Round& round, std::int64_t candidates,
                             std::int64_t accepted) {
    for_each_in_team(team, 0, candidates, [&](std::int64_t p) {
        double sum = 0.0;
        for (std::int64_t q = 0; q < candidates; ++q) {
            sum += q != p && smaller(p, q) < accepted ? std::fabs(scaled(o, round, p, q)) : 0.0;
        }
        round.row_sum[p] = sum;
    });
}

// The facts after this round: it is the last one where the Gram matrix was near the identity. By one thread.
HESD_TEAM_WORK inline OrthonormalizeFacts facts_after(const OrthonormalizeFacts& facts, const Round& round,
                                                      std::int64_t b, std::int64_t accepted, std::int64_t kept) {
    double distance = 0.0;
    double weakest = facts.weakest;
    for (std::int64_t p = 0; p < *round.candidates; ++p) {
        const double length = round.norm[round.order[p]];
        distance = larger(distance, round.row_sum[p]);
        if (p < facts.rank) {
            distance = larger(distance, std::fabs(length * length - 1.0));
        } else if (p < accepted) {
            weakest = smaller(weakest, length * round.cholesky[p * b + p]);
        }
    }
    const bool last = kept == accepted && distance <= kNearIdentity;
    return {last ? OrthonormalizeStage::last : OrthonormalizeStage::more,
            facts.tolerance,
            facts.max_rank,
            facts.rounds + 1,
            accepted,
            kept,
            weakest};
}

// Keeps the transform for the next round, or puts it behind the one that was kept.
template <typename Team>
HESD_TEAM_WORK void keep_or_join(const Team& team, const Orthonormalization& o, const Round& round,
                                 Transforms transforms) {
    const std::int64_t b = o.rows;
    if (transforms == Transforms::keep) {
        for_each_in_team(team, 0, b * b, [&](std::int64_t e) { round.first[e] = o.transform[e]; });
    } else if (transforms == Transforms::join) {
        for_each_in_team(team, 0, b * b, [&](std::int64_t e) {
            double entry = 0.0;
            for (std::int64_t k = 0; k < b; ++k) {
                entry += o.transform[e / b * b + k] * round.first[k * b + e % b];
            }
            round.other[e] = entry;
        });
        team.sync();
        for_each_in_team(team, 0, b * b, [&](std::int64_t e) { o.transform[e] = round.other[e]; });
    }
}

// Takes the Gram matrix of the rows as they are and prepares the transform to be applied to them.
template <typename Team>
HESD_TEAM_WORK void next_transform(const Team& team, const Orthonormalization& o, Transforms transforms) {
    const Round round = round_in(o.scratch, o.rows);
    const OrthonormalizeFacts facts = *o.facts;
    team.sync();
    if (!wants_round(team, o, facts) || !measure_rows(team, o, facts, round)) {
        return;
    }
    const std::int64_t candidates = *round.candidates;
    const std::int64_t accepted = factor_with_pivoting(team, o, facts, round, candidates);
    // Rows beyond the largest rank are let go only after a round of their own against the rows that stay, so that their
    // coefficients are as good as those of any other row.
    const bool full = accepted == facts.max_rank && facts.rank == facts.max_rank;
    const std::int64_t kept = full ? accepted : candidates;
    sum_rows(team, o, round, candidates, accepted);
    write_transform(team, o, facts.live, round, accepted, kept);
    update_factor(team, o, round, candidates, accepted, kept);
    if (team.thread == 0) {
        *o.facts = facts_after(facts, round, o.rows, accepted, kept);
    }
    team.sync();
    keep_or_join(team, o, round, transforms);
}

}  // namespace team_work
}  // namespace hesd
