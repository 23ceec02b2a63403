# The index of habits. `make demo` and `make test` set everything up by themselves.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
SOURCES := CMakeLists.txt setup.py pyproject.toml constraints.txt $(shell find csrc -name '*.[ch]pp')

.PHONY: setup demo test lint format bench fashion-mnist clean

setup: $(VENV)/.installed

# PyTorch comes from the release pinned in constraints.txt; the engine is built anew when its sources change.
$(VENV)/.installed: $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[test,lint]'
	touch $@

demo: setup
	$(BIN)/hesd demo

test: setup
	$(BIN)/python -m pytest

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(shell find csrc -name '*.[ch]pp')

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
	$(BIN)/clang-format -i $(shell find csrc -name '*.[ch]pp')

bench: setup
	$(BIN)/python -m pytest bench --benchmark-only

fashion-mnist: setup
	$(BIN)/python examples/fashion_mnist.py

clean:
	rm -rf $(VENV) build hesd_fast/*.so *.egg-info
