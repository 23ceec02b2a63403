// Fibers and their scheduler. Compiled without sanitizers: to them this file is the hardware.
#include "emulation/emulation.hpp"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <new>
#include <string>
#include <utility>
#include <vector>

#include "hesd/panel.hpp"

#if defined(HESD_EMULATION_ADDRESS)
#include <sanitizer/common_interface_defs.h>
#elif defined(HESD_EMULATION_THREAD)
#include <sanitizer/tsan_interface.h>
#endif
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

#if defined(__x86_64__)
// Saves what the calling convention asks to save on the stack that is left.
extern "C" void hesd_emulation_switch(void** left, void* entered);
asm(R"(
.text
.hidden hesd_emulation_switch
.globl hesd_emulation_switch
.type hesd_emulation_switch, @function
hesd_emulation_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.size hesd_emulation_switch, .-hesd_emulation_switch
)");
#endif

namespace hesd::emulation {
namespace {

constexpr int kWarp = 32;
constexpr unsigned kMostThreads = 1024;
constexpr std::size_t kStack = 256 * 1024;

// Tells the sanitizers which fiber runs. With the thread sanitizer a switch orders nothing; release and acquire do.
#if defined(HESD_EMULATION_THREAD)
void release(void* token) { __tsan_release(token); }
void acquire(void* token) { __tsan_acquire(token); }
#else
void release(void*) {}
void acquire(void*) {}
#endif

// A place where execution can be left and taken up again.
struct Context {
#if defined(__x86_64__)
    void* stack_pointer = nullptr;
#else
    ucontext_t place{};
#endif
#if defined(HESD_EMULATION_ADDRESS)
    void* fake_stack = nullptr;
    const void* bottom = nullptr;
    std::size_t size = 0;
#elif defined(HESD_EMULATION_THREAD)
    void* thread = nullptr;
#endif
};

// Called first thing by the side that is entered: a fiber by the host, or the host by a fiber. The host's stack is not
// known before.
void entered([[maybe_unused]] Context& here, [[maybe_unused]] Context& host) {
#if defined(HESD_EMULATION_ADDRESS)
    const void* bottom = nullptr;
    std::size_t size = 0;
    __sanitizer_finish_switch_fiber(here.fake_stack, &bottom, &size);
    if (&here != &host) {
        host.bottom = bottom;
        host.size = size;
    }
#endif
}

void switch_to(Context& from, Context& to, Context& host) {
#if defined(HESD_EMULATION_ADDRESS)
    __sanitizer_start_switch_fiber(&from.fake_stack, to.bottom, to.size);
#elif defined(HESD_EMULATION_THREAD)
    __tsan_switch_to_fiber(to.thread, __tsan_switch_to_fiber_no_sync);
#endif
#if defined(__x86_64__)
    hesd_emulation_switch(&from.stack_pointer, to.stack_pointer);
#else
    swapcontext(&from.place, &to.place);
#endif
    entered(from, host);
}

enum class State { ready, at_barrier, in_warp, done };

struct Fiber {
    Context context;
    char* stack = nullptr;
    unsigned thread = 0;
    State state = State::done;
    unsigned barriers = 0;   // passed
    unsigned exchanges = 0;  // made

    [[nodiscard]] unsigned warp() const { return thread / kWarp; }
    [[nodiscard]] unsigned lane() const { return thread % kWarp; }
};

// What the lanes of a warp exchange, in two sets: a lane that is ahead by one exchange does not disturb the others.
struct Warp {
    std::uint64_t slots[2][kWarp];
    char tokens[2];
};

struct Free {
    void operator()(char* memory) const { std::free(memory); }
};

struct Block {
    std::unique_ptr<char, Free> memory;  // shared memory, to the byte
    std::vector<Warp> warps;
    char tokens[2];
    char start;
};

// One launch at a time; everything about it.
struct Machine {
    std::mutex mutex;
    std::vector<std::unique_ptr<Fiber>> fibers;
    Context host;
    Fiber* current = nullptr;
    Block* block = nullptr;
    const std::function<void()>* body = nullptr;
    const char* failure = nullptr;
    unsigned block_number = 0;
    unsigned blocks = 0;
    unsigned threads = 0;
    Traffic traffic;
    std::map<std::string, Launches> launches;
    char launched = 0;
    char ended = 0;
};
Machine machine;

[[noreturn]] void live() {
    Fiber& self = *machine.current;
    entered(self.context, machine.host);
    for (;;) {
        acquire(&machine.launched);
        acquire(&machine.block->start);
        (*machine.body)();
        release(&machine.ended);
        self.state = State::done;
        switch_to(self.context, machine.host, machine.host);
    }
}

#if !defined(__x86_64__)
void live_anywhere() { live(); }
#endif

std::unique_ptr<Fiber> new_fiber(unsigned thread) {
    auto fiber = std::make_unique<Fiber>();
    void* memory = mmap(nullptr, kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) {
        throw std::bad_alloc();
    }
    fiber->stack = static_cast<char*>(memory);
    fiber->thread = thread;
#if defined(__x86_64__)
    // As if switched away from: six registers, then where to go on, on a stack that is aligned as after a call.
    void** top = reinterpret_cast<void**>(fiber->stack + kStack) - 1;
    *top = nullptr;
    *--top = reinterpret_cast<void*>(&live);
    for (int i = 0; i < 6; ++i) {
        *--top = nullptr;
    }
    fiber->context.stack_pointer = top;
#else
    getcontext(&fiber->context.place);
    fiber->context.place.uc_stack.ss_sp = fiber->stack;
    fiber->context.place.uc_stack.ss_size = kStack;
    makecontext(&fiber->context.place, &live_anywhere, 0);
#endif
#if defined(HESD_EMULATION_ADDRESS)
    fiber->context.bottom = fiber->stack;
    fiber->context.size = kStack;
#elif defined(HESD_EMULATION_THREAD)
    fiber->context.thread = __tsan_create_fiber(0);
#endif
    return fiber;
}

// After a failure the fibers are in the middle of their work, and are given up.
void give_up() {
    for (const auto& fiber : machine.fibers) {
#if defined(HESD_EMULATION_THREAD)
        __tsan_destroy_fiber(fiber->context.thread);
#endif
        munmap(fiber->stack, kStack);
    }
    machine.fibers.clear();
}

void run(Fiber& fiber) {
    machine.current = &fiber;
    switch_to(machine.host, fiber.context, machine.host);
    machine.current = nullptr;
}

// Runs the fibers of a warp until all wait for the block or have ended; false if some wait for lanes that never come.
bool run_warp(unsigned first, unsigned last) {
    for (;;) {
        unsigned in_warp = 0;
        for (unsigned i = first; i < last; ++i) {
            Fiber& fiber = *machine.fibers[i];
            if (fiber.state == State::ready) {
                run(fiber);
                if (machine.failure != nullptr) {
                    return true;
                }
            }
            in_warp += fiber.state == State::in_warp ? 1 : 0;
        }
        if (in_warp == 0) {
            return true;
        }
        if (in_warp < kWarp) {
            return false;
        }
        for (unsigned i = first; i < last; ++i) {
            machine.fibers[i]->state = State::ready;
        }
    }
}

// Runs one block to its end; what went wrong, or null.
const char* run_block() {
    for (unsigned i = 0; i < machine.threads; ++i) {
        Fiber& fiber = *machine.fibers[i];
        fiber.state = State::ready;
        fiber.barriers = fiber.exchanges = 0;
    }
    for (;;) {
        for (unsigned first = 0; first < machine.threads; first += kWarp) {
            if (!run_warp(first, std::min(first + kWarp, machine.threads))) {
                return "a warp exchange that not all lanes of the warp take part in";
            }
            if (machine.failure != nullptr) {
                return machine.failure;
            }
        }
        unsigned waiting = 0;
        for (unsigned i = 0; i < machine.threads; ++i) {
            waiting += machine.fibers[i]->state == State::at_barrier ? 1 : 0;
        }
        if (waiting == 0) {
            return nullptr;
        }
        if (waiting < machine.threads) {
            return "a __syncthreads that not all threads of the block reach";
        }
        for (unsigned i = 0; i < machine.threads; ++i) {
            machine.fibers[i]->state = State::ready;
        }
    }
}

void wait(State state) {
    Fiber& self = *machine.current;
    self.state = state;
    switch_to(self.context, machine.host, machine.host);
}

}  // namespace

Index thread_index() { return {machine.current->thread, 0, 0}; }
Index block_index() { return {machine.block_number, 0, 0}; }
Index block_size() { return {machine.threads, 1, 1}; }
Index grid_size() { return {machine.blocks, 1, 1}; }
int lane() { return static_cast<int>(machine.current->lane()); }
char* shared_memory() { return machine.block->memory.get(); }

namespace {

// Memory of the device, and how many scopes reach it now.
struct DeviceMemory {
    std::mutex mutex;
    std::vector<std::pair<void*, std::size_t>> pieces;
    int scopes = 0;

    void protect(int protection) const {
        for (const auto& [first, bytes] : pieces) {
            mprotect(first, bytes, protection);
        }
    }
};
DeviceMemory& memory_of_device() {
    static DeviceMemory memory;
    return memory;
}
std::atomic<std::int64_t> waits{0};

}  // namespace

std::shared_ptr<void> device_memory(std::size_t bytes) {
    const auto page = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
    const std::size_t reachable = std::max<std::size_t>((bytes + page - 1) / page, 1) * page;
    // One page more, which is never reachable.
    void* first = mmap(nullptr, reachable + page, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (first == MAP_FAILED) {
        throw std::bad_alloc();
    }
    DeviceMemory& memory = memory_of_device();
    {
        const std::lock_guard<std::mutex> lock(memory.mutex);
        memory.pieces.emplace_back(first, reachable);
        if (memory.scopes > 0) {
            mprotect(first, reachable, PROT_READ | PROT_WRITE);
        }
    }
    return {static_cast<char*>(first) + (reachable - bytes) / 256 * 256, [first, reachable, page](void*) {
                DeviceMemory& owner = memory_of_device();
                const std::lock_guard<std::mutex> lock(owner.mutex);
                owner.pieces.erase(std::find(owner.pieces.begin(), owner.pieces.end(), std::pair(first, reachable)));
                munmap(first, reachable + page);
            }};
}

Reach::Reach() {
    DeviceMemory& memory = memory_of_device();
    const std::lock_guard<std::mutex> lock(memory.mutex);
    if (memory.scopes++ == 0) {
        memory.protect(PROT_READ | PROT_WRITE);
    }
}
Reach::~Reach() {
    DeviceMemory& memory = memory_of_device();
    const std::lock_guard<std::mutex> lock(memory.mutex);
    if (--memory.scopes == 0) {
        memory.protect(PROT_NONE);
    }
}

void count_wait() { ++waits; }
std::int64_t take_waits() { return waits.exchange(0); }

Traffic take_traffic() {
    const std::lock_guard<std::mutex> between_launches(machine.mutex);
    return std::exchange(machine.traffic, Traffic{});
}
std::map<std::string, Launches> take_launches() {
    const std::lock_guard<std::mutex> between_launches(machine.mutex);
    return std::exchange(machine.launches, {});
}
void count_read(std::int64_t bytes, bool again) {
    (again ? machine.traffic.read_again : machine.traffic.read) += bytes > 0 ? bytes : 0;
}
void count_written(std::int64_t bytes) { machine.traffic.written += bytes > 0 ? bytes : 0; }

void fail(const char* what) {
    machine.failure = what;
    wait(State::done);
    std::abort();  // this fiber is never resumed
}

void wait_for_block() {
    // Two tokens in turn: a fiber that is already at the next barrier releases nothing to those still leaving this one.
    char* token = &machine.block->tokens[machine.current->barriers++ % 2];
    release(token);
    wait(State::at_barrier);
    acquire(token);
}

void wait_for_warp() {
    Fiber& self = *machine.current;
    char* token = &machine.block->warps[self.warp()].tokens[self.exchanges++ % 2];
    release(token);
    wait(State::in_warp);
    acquire(token);
}

// What the lanes of a warp gave, one of them `bits`. An exchange orders no other memory, as on the hardware.
static const std::uint64_t* exchanged(std::uint64_t bits) {
    Fiber& self = *machine.current;
    std::uint64_t* slots = machine.block->warps[self.warp()].slots[self.exchanges++ % 2];
    slots[self.lane()] = bits;
    wait(State::in_warp);
    return slots;
}

std::uint64_t exchange(std::uint64_t bits, int source) { return exchanged(bits)[source]; }

unsigned ballot(bool vote) {
    const std::uint64_t* slots = exchanged(vote ? 1 : 0);
    unsigned votes = 0;
    for (int i = 0; i < kWarp; ++i) {
        votes |= static_cast<unsigned>(slots[i]) << i;
    }
    return votes;
}

void launch(const char* name, unsigned blocks, unsigned threads, std::size_t shared,
            const std::function<void()>& body) {
    const Reach reach;
    if (blocks == 0 || threads == 0 || threads > kMostThreads) {
        throw EngineError("emulation: a launch of " + std::to_string(blocks) + " blocks of " + std::to_string(threads) +
                          " threads");
    }
    const std::lock_guard<std::mutex> one_at_a_time(machine.mutex);
    Launches& so_far = machine.launches[name];
    ++so_far.count;
    so_far.shared_bytes = std::max(so_far.shared_bytes, static_cast<std::int64_t>(shared));
    while (machine.fibers.size() < threads) {
        machine.fibers.push_back(new_fiber(static_cast<unsigned>(machine.fibers.size())));
    }
#if defined(HESD_EMULATION_ADDRESS)
    machine.host = Context{};  // another thread's stack, perhaps
#elif defined(HESD_EMULATION_THREAD)
    machine.host.thread = __tsan_get_current_fiber();
#endif
    machine.blocks = blocks;
    machine.threads = threads;
    machine.body = &body;
    machine.failure = nullptr;
    release(&machine.launched);
    // The thread sanitizer must see each block in memory of its own, as nothing orders two of them.
#if defined(HESD_EMULATION_THREAD)
    const unsigned memories = blocks;
#else
    const unsigned memories = 1;
#endif
    std::vector<Block> places(memories);
    const char* failure = nullptr;
    for (unsigned number = 0; number < blocks && failure == nullptr; ++number) {
        Block& block = places[number % memories];
        if (number < memories) {
            void* memory = nullptr;
            if (posix_memalign(&memory, 16, std::max<std::size_t>(shared, 1)) != 0) {
                throw std::bad_alloc();
            }
            block.memory.reset(static_cast<char*>(memory));
            block.warps.resize((threads + kWarp - 1) / kWarp);
        }
        std::memset(block.memory.get(), 0xff, shared);
        machine.block = &block;
        machine.block_number = number;
        release(&block.start);
        failure = run_block();
    }
    acquire(&machine.ended);
    if (failure != nullptr) {
        give_up();
        throw EngineError(std::string("emulation: ") + failure);
    }
}

}  // namespace hesd::emulation

// 16-bit numbers, by arithmetic on the value: slow, and nothing like the kernels' ways.

float __half2float(__half value) {
    const int exponent = value.bits >> 10 & 0x1f;
    const int fraction = value.bits & 0x3ff;
    float magnitude;
    if (exponent == 0x1f) {
        const std::uint32_t bits = 0x7f800000u | static_cast<std::uint32_t>(fraction) << 13;
        magnitude = std::bit_cast<float>(bits);
    } else {
        magnitude = exponent == 0 ? static_cast<float>(fraction) * 0x1p-24f
                                  : static_cast<float>(0x400 | fraction) * std::bit_cast<float>((exponent + 102) << 23);
    }
    return std::bit_cast<float>(std::bit_cast<std::uint32_t>(magnitude) |
                                static_cast<std::uint32_t>(value.bits & 0x8000) << 16);
}

__half __float2half_rn(float value) {
    const auto bits = std::bit_cast<std::uint32_t>(value);
    const auto sign = static_cast<std::uint16_t>(bits >> 16 & 0x8000u);
    const float magnitude = std::bit_cast<float>(bits & 0x7fffffffu);
    if (magnitude != magnitude) {
        return {static_cast<std::uint16_t>(sign | 0x7fffu)};
    }
    if (magnitude >= 65520.0f) {  // half way between the largest number and the next power of two
        return {static_cast<std::uint16_t>(sign | 0x7c00u)};
    }
    // The spacing of float16 at this magnitude, at least 2^-24; adding and subtracting 2^23 of it rounds to its
    // multiples.
    int exponent = static_cast<int>(bits >> 23 & 0xff) - 127;
    exponent = exponent < -14 ? -14 : exponent;
    const float spacing = std::bit_cast<float>((exponent - 10 + 127) << 23);
    const auto units = static_cast<std::uint32_t>((magnitude / spacing + 0x1p23f) - 0x1p23f);
    const std::uint32_t base = static_cast<std::uint32_t>(exponent + 14) << 10;
    return {static_cast<std::uint16_t>(sign | (base + units))};
}

__nv_bfloat16 __float2bfloat16_rn(float value) {
    const auto bits = std::bit_cast<std::uint32_t>(value);
    if (value != value) {
        return {0x7fff};
    }
    const std::uint32_t below = bits & 0xffffu;
    std::uint32_t kept = bits >> 16;
    if (below > 0x8000u || (below == 0x8000u && (kept & 1u) != 0)) {
        ++kept;
    }
    return {static_cast<std::uint16_t>(kept)};
}
