#include "emulation/streams.hpp"

#include <deque>
#include <mutex>
#include <utility>
#include <vector>

#include "hesd/panel.hpp"

namespace hesd::emulation {
namespace {

struct Item {
    std::function<void()> work;  // or an event:
    Event* event;
    std::uint64_t number;  // of its record
    bool is_record;

    [[nodiscard]] bool ready() const { return event == nullptr || is_record || event->reached >= number; }
};

struct Stream {
    void* name;
    std::deque<Item> items;
};

std::recursive_mutex mutex;
std::vector<Stream> streams;  // in the order of their first use
std::int64_t order = at_once;
std::uint64_t state = 0;

void enqueue(void* name, Item item) {
    for (Stream& stream : streams) {
        if (stream.name == name) {
            stream.items.push_back(std::move(item));
            return;
        }
    }
    streams.push_back({name, {}});
    streams.back().items.push_back(std::move(item));
}

Stream* next() {
    std::vector<Stream*> ready;
    for (Stream& stream : streams) {
        if (!stream.items.empty() && stream.items.front().ready()) {
            ready.push_back(&stream);
        }
    }
    if (ready.empty()) {
        return nullptr;
    }
    if (order < random) {
        return order == last_used ? ready.back() : ready.front();
    }
    state = state * 6364136223846793005u + 1442695040888963407u;
    return ready[(state >> 33) % ready.size()];
}

// Goes on until the stream, or with none every stream, has nothing left.
void work_off(const void* const* name) {
    const auto is_left = [&] {
        for (const Stream& stream : streams) {
            if ((name == nullptr || stream.name == *name) && !stream.items.empty()) {
                return true;
            }
        }
        return false;
    };
    while (is_left()) {
        Stream* stream = next();
        if (stream == nullptr) {
            streams.clear();
            throw EngineError("emulation: streams that wait for each other");
        }
        const Item item = std::move(stream->items.front());
        stream->items.pop_front();
        if (item.work) {
            try {
                item.work();
            } catch (...) {
                streams.clear();
                throw;
            }
        } else if (item.is_record) {
            item.event->reached = item.number;
        }
    }
}

}  // namespace

void defer(std::int64_t wanted) {
    const std::lock_guard<std::recursive_mutex> lock(mutex);
    work_off(nullptr);
    streams.clear();
    order = wanted;
    state = static_cast<std::uint64_t>(wanted);
}

void put(void* stream, std::function<void()> work) {
    {
        const std::lock_guard<std::recursive_mutex> lock(mutex);
        if (order != at_once) {
            enqueue(stream, {std::move(work), nullptr, 0, false});
            return;
        }
    }
    work();
}

void record(Event* event, void* stream) {
    const std::lock_guard<std::recursive_mutex> lock(mutex);
    const std::uint64_t number = ++event->recorded;
    if (order == at_once) {
        event->reached = number;
    } else {
        enqueue(stream, {nullptr, event, number, true});
    }
}

void wait_for(Event* event, void* stream) {
    const std::lock_guard<std::recursive_mutex> lock(mutex);
    if (order != at_once) {
        enqueue(stream, {nullptr, event, event->recorded, false});
    }
}

void finish(void* stream) {
    const std::lock_guard<std::recursive_mutex> lock(mutex);
    work_off(&stream);
}

void finish_all() {
    const std::lock_guard<std::recursive_mutex> lock(mutex);
    work_off(nullptr);
}

}  // namespace hesd::emulation
