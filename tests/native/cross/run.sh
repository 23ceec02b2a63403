#!/usr/bin/env bash
# The kernels against plain loops, without Python: on this machine, and compiled for 64-bit Arm under an emulator.
#
#   tests/native/cross/run.sh native aarch64        one or both
#
# For aarch64: g++-aarch64-linux-gnu, libc6-dev-arm64-cross and qemu-user-static, by their names in Debian.
set -euo pipefail
cd "$(dirname "$0")/../../.."

python=$PWD/${VENV:-.venv}/bin/python
cmake=$(PATH="$(dirname "$python"):$PATH" command -v cmake)

# check FOLDER EMULATOR [CMAKE_ARGUMENT...]: builds with the flags of the engine, runs.
check() {
    local folder=build/native/cross/$1 emulator=$2
    shift 2
    "$cmake" -S . -B "$folder" -DHESD_CUDA=OFF -G "Unix Makefiles" -DPython_EXECUTABLE="$python" \
        -Dpybind11_DIR="$("$python" -m pybind11 --cmakedir)" "$@" > /dev/null
    "$cmake" --build "$folder" --target check_kernels --parallel "$(nproc)" > /dev/null
    $emulator "$folder/check_kernels"
}

for machine in "$@"; do
    echo "== $machine"
    case $machine in
        native) check native "" ;;
        aarch64)
            export QEMU_LD_PREFIX=/usr/aarch64-linux-gnu
            check aarch64 qemu-aarch64-static -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 \
                -DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++
            ;;
        *)
            echo "run.sh: $machine is not known; wanted native or aarch64" >&2
            exit 2
            ;;
    esac
done
