"""Problems on a device, in a process of their own: PyTorch takes a new device before the first backward pass only."""

from __future__ import annotations

import devices
import emulation
import fake_cuda
import pytest

from hesd_fast.engine import cuda

if not devices.REAL:
    fake_cuda.start()


@pytest.fixture
def device(monkeypatch):
    """The device. Panels of a fake one go to the emulated CUDA kernels, those of the CPU to the CPU's."""
    if devices.REAL:
        yield "cuda:0"
        return
    engine = emulation.engine()
    engine.select_target(engine.build_info()["cpu_targets_available"][0])
    emulation.use_emulated_engine(monkeypatch)
    monkeypatch.setattr(cuda, "runtime", fake_cuda.FakeCudaRuntime())
    engine.take_traffic()
    yield f"{fake_cuda.TYPE}:0"
    engine.select_target("emulated")
