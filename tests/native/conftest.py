"""The tests of this folder see NumPy and the compiled engine, no PyTorch: they also run on a sanitized build.

``HESD_NATIVE_ENGINE`` names the folder of that build; without it they run on the ordinary one.
"""

from __future__ import annotations

import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # read when NumPy is first imported

import native_engine
import pytest

SANITIZED = "HESD_NATIVE_SANITIZER" in os.environ


@pytest.fixture(params=native_engine.targets())
def target(request):
    """Each instruction set of this build that the machine has, and the emulated CUDA kernels."""
    if request.param == "emulated" and request.module.__name__ == "test_native_block_lanczos" and SANITIZED:
        pytest.skip("minutes of it; sanitizers watch the emulated kernels in tests of their own")
    before = native_engine.load().build_info()["cpu_target"]
    native_engine.load().select_target(request.param)
    yield request.param
    native_engine.load().select_target(before)
