"""What a source distribution holds, what a build says that it makes, and what an installation says that it is."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from fnmatch import fnmatch
from importlib.metadata import version
from pathlib import Path

import pybind11
import pytest

import hesd_fast as hesd

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("folder", ["csrc", "tests", "bench", "docs", "examples"])
def test_the_source_distribution_has_every_file(folder):
    lines = [line.split() for line in (ROOT / "MANIFEST.in").read_text(encoding="utf-8").splitlines()]
    (patterns,) = (line[2:] for line in lines if line[:2] == ["recursive-include", folder])
    hidden = ("__pycache__", ".pytest_cache", ".benchmarks")
    files = [path for path in (ROOT / folder).rglob("*") if path.is_file() and not set(path.parts) & set(hidden)]
    assert files
    assert [str(path) for path in files if not any(fnmatch(path.name, pattern) for pattern in patterns)] == []


def test_the_package_its_engine_and_its_installation_are_of_one_version():
    assert hesd.build_info()["version"] == hesd.__version__ == version("hesd-fast")


def configure(folder, *options):
    """What CMake says before a build, its lines joined, where there is no CUDA compiler; nothing is built."""
    cmake = shutil.which("cmake", path=os.pathsep.join((os.path.dirname(sys.executable), os.environ["PATH"])))
    paths = (f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}")
    command = (cmake, "-S", str(ROOT), "-B", str(folder), "-G", "Unix Makefiles", *paths, *options)
    environment = os.environ | {"CUDACXX": str(folder / "no-nvcc")}
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)
    return done.returncode, " ".join(done.stdout.split())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ((), "no CUDA kernels: no working nvcc was found on PATH or named by CUDACXX"),
        (("-DHESD_CUDA=AUTO",), "no CUDA kernels: no working nvcc was found"),
        (("-DHESD_CUDA=OFF",), "no CUDA kernels: HESD_CUDA is OFF"),
        (("-DHESD_EMULATION=ON",), "CUDA kernels emulated on the CPU, for tests"),
    ],
)
def test_a_build_says_what_it_makes(tmp_path, options, said):
    status, output = configure(tmp_path, *options)
    assert status == 0, output
    line = output.partition(f"-- hesd-fast {hesd.__version__}: ")[2].partition(" -- ")[0]
    targets, _, device = line.partition("; ")
    assert targets.startswith("CPU kernels for ")
    assert set(hesd.build_info()["cpu_targets_available"]) <= set(targets.removeprefix("CPU kernels for ").split(", "))
    assert device.startswith(said)


@pytest.mark.parametrize(
    ("options", "cause", "remedy"),
    [
        (
            ("-DHESD_CUDA=ON",),
            "HESD_CUDA is ON, but no working nvcc was found",
            "install the CUDA toolkit, or set it to",
        ),
        (("-DHESD_CUDA=maybe",), "HESD_CUDA is 'maybe'", "wanted AUTO (CUDA kernels where nvcc is found), ON or OFF"),
    ],
)
def test_a_build_that_cannot_be_had_is_refused(tmp_path, options, cause, remedy):
    status, output = configure(tmp_path, *options)
    assert status != 0
    assert cause in output
    assert remedy in output


def test_nvcc_is_looked_for_again_where_an_earlier_build_found_none(tmp_path):
    for _ in range(2):
        status, output = configure(tmp_path)
        assert status == 0, output
        assert "Looking for a CUDA compiler - NOTFOUND" in output
