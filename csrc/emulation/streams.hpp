// Streams and events of the emulated device. Work is done when it is put on a stream; after defer(), only when the host
// waits, and then in an order that the streams and their events allow: what another order would spoil shows.
#pragma once

#include <cstdint>
#include <functional>

namespace hesd::emulation {

// How often an event was recorded, and the last record that its stream has come to.
struct Event {
    std::uint64_t recorded = 0;
    std::uint64_t reached = 0;
};

// Which stream goes on where several can: at_once puts nothing off; the stream that was used first, as long as it can;
// the one that was used last; or pseudo-randomly, from this number on.
enum Order : std::int64_t { at_once = -1, first_used = 0, last_used = 1, random = 2 };
// Changes it; what was put off is done first.
void defer(std::int64_t order);

void put(void* stream, std::function<void()> work);
void record(Event* event, void* stream);
// Lets what is put on the stream from now on wait for the event's last record.
void wait_for(Event* event, void* stream);
// Does what was put on a stream, and what that waits for.
void finish(void* stream);
// Does everything.
void finish_all();

}  // namespace hesd::emulation
