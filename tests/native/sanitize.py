"""Build the engine with a sanitizer and run the tests of this folder on it, without PyTorch in the process.

``python tests/native/sanitize.py address`` (with undefined behaviour) or ``thread``; further arguments go to pytest.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

from build_engine import ROOT, build

NATIVE = Path(__file__).resolve().parent

OPTIONS = {
    "address": {
        # No leak check: Python, NumPy and pytest keep memory until the process ends. Who gives panels back, and when,
        # has tests of its own.
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=1:strict_string_checks=1",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        # Each Python object in a block of its own, so that the bindings' use of them is watched as well.
        "PYTHONMALLOC": "malloc",
        "OMP_NUM_THREADS": "2",
        "OMP_WAIT_POLICY": "passive",  # many short loops: threads that wait must not keep others from the cores
    },
    "thread": {
        "TSAN_OPTIONS": "halt_on_error=1:second_deadlock_stack=1",
        "OMP_NUM_THREADS": "3",
    },
}
# A Python that was not built with the sanitizer needs its runtime loaded first. The address sanitizer looks for the
# C++ library's functions when it starts, long before an extension brings them.
RUNTIMES = {"address": ("libasan.so", "libstdc++.so.6"), "thread": ("libtsan.so",)}


def compiler_of(folder: Path) -> str:
    """Return the compiler that the build chose: its sanitizer's runtime is the one to load."""
    for line in (folder / "CMakeCache.txt").read_text(encoding="utf-8").splitlines():
        if line.startswith("CMAKE_CXX_COMPILER:"):
            return line.partition("=")[2]
    sys.exit(f"sanitize.py: {folder} names no compiler; remove it and try again")


def runtime(compiler: str, name: str) -> str:
    """Return the path of a library that comes with the compiler."""
    found = subprocess.run([compiler, f"-print-file-name={name}"], check=True, capture_output=True, text=True).stdout
    if not os.path.isabs(found.strip()):
        sys.exit(f"sanitize.py: {compiler} has no {name}; use g++ with its sanitizers installed")
    return found.strip()


def fixed_addresses() -> list[str]:
    """Return the command in front of Python that switches random addresses off, if the machine has and allows it.

    The thread sanitizer of older compilers does not start where the kernel spreads addresses widely.
    """
    setarch = shutil.which("setarch")
    if setarch is None:
        return []
    command = [setarch, os.uname().machine, "-R"]
    return command if subprocess.run([*command, "true"], check=False, capture_output=True).returncode == 0 else []


def main() -> int:
    """Build and run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("sanitizer", choices=sorted(OPTIONS))
    arguments, for_pytest = parser.parse_known_args()
    sanitizer: str = arguments.sanitizer
    folder = build(ROOT / "build" / "native" / sanitizer, f"-DHESD_SANITIZE={sanitizer}")
    compiler = compiler_of(folder)
    environment = {
        **os.environ,
        **OPTIONS[sanitizer],
        "LD_PRELOAD": os.pathsep.join(runtime(compiler, name) for name in RUNTIMES[sanitizer]),
        "OPENBLAS_NUM_THREADS": "1",
        "HESD_NATIVE_ENGINE": str(folder),
        "HESD_NATIVE_SANITIZER": sanitizer,
    }
    command = [
        *(fixed_addresses() if sanitizer == "thread" else []),
        *(sys.executable, "-m", "pytest", str(NATIVE)),
        f"--confcutdir={NATIVE}",  # the conftest.py above imports PyTorch
        "--capture=sys",  # a report is written by the process that ends with it: it must not be held back
        *("-p", "no:faulthandler"),  # the sanitizer's own handler tells more
        *("-p", "no:benchmark"),
        *for_pytest,
    ]
    return subprocess.run(command, check=False, cwd=ROOT, env=environment).returncode


if __name__ == "__main__":
    sys.exit(main())
