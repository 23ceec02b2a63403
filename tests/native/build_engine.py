"""Build the engine for tests, in a folder of its own beside the installed one.

``python tests/native/build_engine.py`` builds the one that also runs the CUDA sources, emulated on the CPU.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
EMULATED = ROOT / "build" / "native" / "emulated"


def build(folder: Path, *options: str) -> Path:
    """Compile what is out of date with these options of CMake and return the folder with the engine."""
    import pybind11  # here: what else this file does needs no packages

    cmake = shutil.which("cmake", path=os.pathsep.join((os.path.dirname(sys.executable), os.environ["PATH"])))
    if cmake is None:
        sys.exit("build_engine.py: no cmake; install the `test` extra: pip install -e '.[test]'")
    configure = [
        *(cmake, "-S", str(ROOT), "-B", str(folder), "-G", "Unix Makefiles"),
        *("-DCMAKE_BUILD_TYPE=Release", "-DHESD_EMULATION=ON", *options),
        *(f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}"),
    ]
    subprocess.run(configure, check=True, stdout=subprocess.DEVNULL)
    jobs = str(len(os.sched_getaffinity(0)))
    subprocess.run([cmake, "--build", str(folder), "--parallel", jobs], check=True)
    return folder


if __name__ == "__main__":
    build(EMULATED)
