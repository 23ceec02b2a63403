"""Problems on a device, in a process of their own: PyTorch takes a new device before the first backward pass only."""

from __future__ import annotations

import devices
import emulation
import pretended
import pytest

from hesd_fast.engine import cuda

if not devices.REAL:
    pretended.start()


@pytest.fixture
def device(monkeypatch):
    """The device. A pretended one's panels go to the emulated CUDA kernels, those of the CPU to the CPU's."""
    if devices.REAL:
        yield "cuda:0"
        return
    engine = emulation.engine()
    engine.select_target(engine.build_info()["cpu_targets_available"][0])
    emulation.use_emulated_engine(monkeypatch)
    monkeypatch.setattr(cuda, "is_cuda", lambda device: device.type == pretended.TYPE)
    monkeypatch.setattr(cuda, "free_memory", lambda device: 2**30)
    monkeypatch.setattr(cuda, "peak_memory", lambda device: 2**20)
    monkeypatch.setattr(cuda, "name", str)
    monkeypatch.setattr(cuda, "synchronize", lambda device: None)
    engine.take_traffic()
    yield f"{pretended.TYPE}:0"
    engine.select_target("emulated")
