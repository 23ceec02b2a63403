# The index of habits. `make demo` and `make test` set everything up by themselves.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
CXX_FILES := $(shell find csrc tests -name '*.[ch]pp' -o -name '*.cu' -o -name '*.cuh')
SOURCES := CMakeLists.txt setup.py pyproject.toml constraints.txt hesd_fast/__init__.py $(filter csrc/%,$(CXX_FILES))

.PHONY: setup demo test emulated native-test cuda-build cuda-test cuda-bench cross-test lint format bench bench-report bench-smoke fashion-mnist clean

setup: $(VENV)/.installed

# PyTorch comes from the release pinned in constraints.txt; the engine is built anew when its sources change.
$(VENV)/.installed: $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[test,lint]'
	touch $@

# What benches compare with, besides.
$(VENV)/.bench-installed: $(VENV)/.installed
	$(BIN)/pip install --quiet --constraint constraints.txt 'hesd-fast[bench]'
	$(BIN)/pip install --quiet --constraint constraints.txt --no-deps curvlinops-for-pytorch
	touch $@

demo: setup
	$(BIN)/hesd demo

# Two processes, a file of tests each; every test runs on one thread. First problems on a device, in processes of their
# own, and the examples in docstrings and in the README.
test: setup emulated
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/device -q -n 2
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q --doctest-modules --doctest-glob=README.md hesd_fast README.md
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

# The engine that runs the CUDA sources on the CPU, for tests.
emulated: setup
	$(BIN)/python tests/native/build_engine.py

# What ptxas says of each CUDA kernel, into bench/results/cuda-resources.json; spills and stack are errors.
cuda-build: setup
	$(BIN)/python bench/cuda_resources.py

# On a machine with a GPU.
cuda-test: setup
	$(BIN)/python -m pytest tests/device -rs
	$(BIN)/python -m pytest -rs -m cuda

cuda-bench: setup
	$(BIN)/python bench/cuda_bench.py

# The emulated kernels and block Lanczos on them; then the engine with sanitizers: addresses and undefined behaviour,
# then data races.
native-test: setup emulated
	HESD_NATIVE_ENGINE=$(CURDIR)/build/native/emulated $(BIN)/python -m pytest tests/native -q -k emulated \
		--confcutdir=tests/native -p no:benchmark
	$(BIN)/python tests/native/sanitize.py address -q
	$(BIN)/python tests/native/sanitize.py thread -q

# The kernels against plain loops, here and on 64-bit Arm under an emulator (Debian: g++-aarch64-linux-gnu
# libc6-dev-arm64-cross qemu-user-static).
cross-test: setup
	tests/native/cross/run.sh native aarch64

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(CXX_FILES)

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
	$(BIN)/clang-format -i $(CXX_FILES)

# A part of it: make bench BENCH="-k sweep". Results are merged into bench/results/<machine>.json.
bench: $(VENV)/.bench-installed
	$(BIN)/python -m pytest bench -rs $(BENCH)

# The tables in docs/performance-tables.md.
bench-report: setup
	$(BIN)/python bench/report.py

# Every benchmark's checks at small sizes; its times mean nothing.
bench-smoke: $(VENV)/.bench-installed
	$(BIN)/python -m pytest bench -rs --sizes smoke

fashion-mnist: setup
	$(BIN)/python examples/fashion_mnist.py

clean:
	rm -rf $(VENV) build hesd_fast/engine/*.so *.egg-info
