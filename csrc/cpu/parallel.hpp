// Loops over independent pieces of work. With OpenMP; with std::thread where HESD_STD_THREADS is defined, for the
// thread sanitizer, which cannot see the synchronization inside OpenMP's runtime. Everything has internal linkage,
// because the file is compiled once per instruction set.
#pragma once

#include <cstdint>

#if defined(HESD_STD_THREADS)
#include <atomic>
#include <cstdlib>
#include <thread>
#include <vector>
#else
#include <omp.h>
#endif

namespace hesd {
namespace {

#if defined(HESD_STD_THREADS)

inline int most_threads() {
    const char* wanted = std::getenv("OMP_NUM_THREADS");
    const int count = wanted != nullptr ? std::atoi(wanted) : 0;
    return count > 0 ? count : static_cast<int>(std::thread::hardware_concurrency());
}

// body(piece, thread) for each piece in [0, pieces), in any order; thread in [0, most_threads()).
template <typename Body>
inline void parallel_for(std::int64_t pieces, const Body& body) {
    std::atomic<std::int64_t> next{0};
    std::vector<std::thread> threads;
    for (int thread = 0; thread < most_threads(); ++thread) {
        threads.emplace_back([&, thread] {
            for (std::int64_t piece = next++; piece < pieces; piece = next++) {
                body(piece, thread);
            }
        });
    }
    for (std::thread& thread : threads) {
        thread.join();
    }
}

#else

inline int most_threads() { return omp_get_max_threads(); }

// body(piece, thread) for each piece in [0, pieces), in any order; thread in [0, most_threads()).
template <typename Body>
inline __attribute__((always_inline)) void parallel_for(std::int64_t pieces, const Body& body) {
#pragma omp parallel for schedule(dynamic, 1)
    for (std::int64_t piece = 0; piece < pieces; ++piece) {
        body(piece, omp_get_thread_num());
    }
}

#endif

}  // namespace
}  // namespace hesd
