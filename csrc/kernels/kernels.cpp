#include "kernels/kernels.hpp"

#include <vector>

#include "small/pivoted_cholesky_qr.hpp"

namespace hesd {

void reduce(const DeviceMemory* device, const Reduction& reduction, double* values, std::int64_t count) {
    if (reduction.sum == nullptr || device == nullptr || count == 0) {
        reduction(values, count);
        return;
    }
    const std::int64_t bytes = count * static_cast<std::int64_t>(sizeof(double));
    std::vector<double> here(static_cast<std::size_t>(count));
    device->download(here.data(), values, bytes);
    reduction(here.data(), count);
    device->upload(values, here.data(), bytes);
}

OrthonormalizeFacts orthonormalize(const Kernels& kernels, const Panel& w, const Panel& out,
                                   const Orthonormalization& state, const Reduction& reduction) {
    const OrthonormalizeFacts facts = orthonormalize(kernels, w, out, state, reduction, [&] {
        OrthonormalizeFacts read{};
        download(kernels, &read, state.facts, 1);
        return read;
    });
    orthonormalize_require(facts);
    return facts;
}

}  // namespace hesd
