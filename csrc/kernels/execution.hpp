// Where kernels with a device of their own work: the caller's stream, and memory on the device that the caller owns.
#pragma once

#include <cstdint>

namespace hesd {

struct Execution {
    std::int64_t device = 0;
    void* stream = nullptr;     // cudaStream_t
    void* workspace = nullptr;  // device memory, 256-byte aligned
    std::int64_t workspace_bytes = 0;
    void* matrices = nullptr;  // more of it, for the caller's small matrices
    std::int64_t matrix_bytes = 0;
    void* staging = nullptr;  // more of it, for two tiles of a basis in the host's memory
    std::int64_t staging_bytes = 0;
    // A flag in device memory: where it is zero, panel_gram, panel_project and add do nothing.
    const int* condition = nullptr;
};

// The execution of this thread.
inline Execution& current_execution() {
    thread_local Execution execution;
    return execution;
}

// Sets it for a scope.
class ExecutionScope {
   public:
    explicit ExecutionScope(const Execution& execution) : before_(current_execution()) {
        current_execution() = execution;
    }
    ~ExecutionScope() { current_execution() = before_; }
    ExecutionScope(const ExecutionScope&) = delete;
    ExecutionScope& operator=(const ExecutionScope&) = delete;

   private:
    Execution before_;
};

// Makes the kernels put to work in a scope depend on a flag in device memory.
class ConditionScope {
   public:
    explicit ConditionScope(const int* flag) { current_execution().condition = flag; }
    ~ConditionScope() { current_execution().condition = nullptr; }
    ConditionScope(const ConditionScope&) = delete;
    ConditionScope& operator=(const ConditionScope&) = delete;
};

}  // namespace hesd
