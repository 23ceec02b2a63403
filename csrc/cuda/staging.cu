#include <vector>

#include "cuda/kernels.hpp"
#include "cuda/runtime.cuh"

namespace hesd::cuda {
namespace {

// Copies go on a stream of their own, beside the kernels. Made when first needed, for each host thread and device.
struct Copies {
    cudaStream_t stream;
    cudaEvent_t used[2];     // all that read the place before is done
    cudaEvent_t arrived[2];  // its rows are there
};

Copies& copies() {
    thread_local std::vector<Copies> of_devices;
    const auto device = static_cast<std::size_t>(current_execution().device);
    while (of_devices.size() <= device) {
        of_devices.emplace_back();
    }
    Copies& made = of_devices[device];
    if (made.stream == nullptr) {
        for (int place = 0; place < 2; ++place) {
            check(cudaEventCreateWithFlags(&made.used[place], cudaEventDisableTiming), "a new event");
            check(cudaEventCreateWithFlags(&made.arrived[place], cudaEventDisableTiming), "a new event");
        }
        check(cudaStreamCreateWithFlags(&made.stream, cudaStreamNonBlocking), "a new stream");
    }
    return made;
}

// One of the two halves of the staging memory, as a panel for these rows.
Panel staged(const Panel& rows, int place) {
    const std::int64_t stride = (rows.columns + 15) / 16 * 16;
    const std::int64_t half = current_execution().staging_bytes / 2 / 256 * 256;
    if (rows.rows * stride * element_bytes(rows.precision) > half) {
        throw EngineError("CUDA: rows of " + std::to_string(rows.rows) + " by " + std::to_string(rows.columns) +
                          " elements do not fit into half of " + std::to_string(current_execution().staging_bytes) +
                          " bytes of staging memory");
    }
    return {static_cast<char*>(current_execution().staging) + place * half, rows.precision, rows.rows, rows.columns,
            stride};
}

void copy(const Panel& target, const Panel& source, cudaMemcpyKind kind, cudaStream_t on) {
    const auto bytes = static_cast<std::size_t>(element_bytes(source.precision));
    check(cudaMemcpy2DAsync(target.data, static_cast<std::size_t>(target.stride) * bytes, source.data,
                            static_cast<std::size_t>(source.stride) * bytes,
                            static_cast<std::size_t>(source.columns) * bytes, static_cast<std::size_t>(source.rows),
                            kind, on),
          "copy of a tile");
}

void fetch(const Panel& rows, int place) {
    const DeviceScope scope;
    Copies& lane = copies();
    check(cudaEventRecord(lane.used[place], stream()), "an event");
    check(cudaStreamWaitEvent(lane.stream, lane.used[place], 0), "to wait for an event");
    copy(staged(rows, place), rows, cudaMemcpyHostToDevice, lane.stream);
    check(cudaEventRecord(lane.arrived[place], lane.stream), "an event");
}

Panel arrived(const Panel& rows, int place) {
    const DeviceScope scope;
    check(cudaStreamWaitEvent(stream(), copies().arrived[place], 0), "to wait for an event");
    return staged(rows, place);
}

void send(const Panel& source, const Panel& rows) {
    const DeviceScope scope;
    const Panel rounded = staged(rows, 0);
    panel_combine(nullptr, source, rounded);
    copy(rows, rounded, cudaMemcpyDeviceToHost, stream());
}

void finish() {
    const DeviceScope scope;
    // Another thread may have put copies to work, on a stream of its own.
    check(cudaDeviceSynchronize(), "to wait for copies");
}

// For all devices, whichever is current.
void pin(void* memory, std::int64_t bytes) {
    check(cudaHostRegister(memory, static_cast<std::size_t>(bytes), cudaHostRegisterPortable), "to pin memory");
}

void unpin(void* memory) {
    if (cudaHostUnregister(memory) != cudaSuccess) {
        cudaGetLastError();
    }
}

std::int64_t staging_bytes(std::int64_t rows, std::int64_t columns, Precision precision) {
    return 2 * (rows * ((columns + 15) / 16 * 16) * element_bytes(precision) + 256);
}

}  // namespace

const DeviceMemory kDeviceMemory{
    upload, download, workspace_bytes, {fetch, arrived, send, finish, pin, unpin, staging_bytes}};

}  // namespace hesd::cuda
