#include "small/step_tasks.hpp"

namespace hesd {

void lanczos_task(StepTask task, const LanczosStep& step) { team_work::do_task(SingleThread{}, task, step); }

void add(double* target, const double* source, std::int64_t count) {
    for (std::int64_t i = 0; i < count; ++i) {
        target[i] += source[i];
    }
}

}  // namespace hesd
