// Work on small matrices, written once for both teams that do it: a single CPU thread, and the threads of one block on
// a device. Such a function is called by all of a team; a value that one thread writes is another's after the next
// sync().
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define HESD_TEAM_WORK __device__
#else
#define HESD_TEAM_WORK
#endif

namespace hesd {

struct SingleThread {
    static constexpr std::int64_t thread = 0;
    static constexpr std::int64_t threads = 1;
    void sync() const {}
    // Of one value from each thread, to all of them; in a fixed order.
    [[nodiscard]] double sum(double value) const { return value; }
    [[nodiscard]] double largest(double value) const { return value; }
};

// Calls body(i) for i in [first, last), shared out among the team.
template <typename Team, typename Body>
HESD_TEAM_WORK void for_each_in_team(const Team& team, std::int64_t first, std::int64_t last, Body body) {
    for (std::int64_t i = first + team.thread; i < last; i += team.threads) {
        body(i);
    }
}

HESD_TEAM_WORK inline bool is_finite(double value) { return value - value == 0.0; }
template <typename T>
HESD_TEAM_WORK T larger(T a, T b) {
    return a < b ? b : a;
}
template <typename T>
HESD_TEAM_WORK T smaller(T a, T b) {
    return b < a ? b : a;
}

}  // namespace hesd
