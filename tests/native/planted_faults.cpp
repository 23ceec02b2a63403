// Faults on purpose, compiled with the flags of the sanitized engine and called from Python as the engine is. A test
// expects a report of each: without it, silence from the other tests would mean nothing.

#include <atomic>
#include <cstdint>
#include <thread>

#include "cpu/parallel.hpp"

#define HESD_PLANTED extern "C" __attribute__((visibility("default")))

// Reads `length` doubles of an array that is shorter.
HESD_PLANTED double read_past_the_end(const double* values, std::int64_t length) {
    double sum = 0.0;
    for (std::int64_t i = 0; i < length; ++i) {
        sum += values[i];
    }
    return sum;
}

// Writes before the array.
HESD_PLANTED void write_before_the_start(double* values) { values[-1] = 1.0; }

HESD_PLANTED double read_after_free() {
    double* volatile values = new double[4]();  // volatile: the compiler must not see the fault
    delete[] values;
    return values[2];
}

HESD_PLANTED std::int64_t overflow(std::int64_t value) { return value + 1; }

HESD_PLANTED float read_misaligned(const char* bytes) { return *reinterpret_cast<const float*>(bytes + 1); }

// Two pieces add to one sum, in the loop that the kernels use. Each waits for the other to have begun, so that they are
// on two threads; relaxed, so that waiting is not a synchronization.
HESD_PLANTED double race() {
    double sum = 0.0;
    std::atomic<int> begun{0};
    hesd::parallel_for(2, [&](std::int64_t piece, int) {
        begun.fetch_add(1, std::memory_order_relaxed);
        while (begun.load(std::memory_order_relaxed) < 2) {
            std::this_thread::yield();
        }
        sum += static_cast<double>(piece);
    });
    return sum;
}

// The same without the fault: each piece has a place of its own.
HESD_PLANTED void no_race(double* values, std::int64_t pieces) {
    hesd::parallel_for(pieces, [&](std::int64_t piece, int) { values[piece] = static_cast<double>(piece); });
}
