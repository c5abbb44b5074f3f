# make demo   sets up .venv and trains a capsule network on handwritten digits
# make test   sets up .venv, checks the style and runs the tests
# make bench  the table of the README
# make docs   the pages of docs/, in build/docs
# make gpu-proof   what can be shown of the GPU kernels without a GPU (half an hour on 2 cores)
# make gpu-check   everything on a GPU: the tests, the benchmarks, compute-sanitizer; a report to paste into an issue
# make cuda-build  with a CUDA build of torch (several GB): links the CUDA kernels and loads them
PYTHON ?= python3
# The CPU wheel where the index has one; any torch >= 2.13 will do.
TORCH ?= torch==2.13.0
CUDA_TORCH ?= torch==2.14.1

BIN := .venv/bin
SOURCES := $(shell git ls-files 'csrc/*')

.PHONY: demo test lint bench docs gpu-proof gpu-check cuda-build clean
demo: .venv/installed
	$(BIN)/capsroute demo --out demo

test: lint
	$(BIN)/python -m pytest

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(filter %.h %.cpp %.cu %.cuh,$(SOURCES)) tests/cpp/*.h tests/cpp/*.cpp benchmarks/*.cpp examples/*.cpp

bench: .venv/installed
	$(BIN)/capsroute bench --case mnist mnist-1 mind comirec segcaps --threads 1 --memory --seconds 4

docs: .venv/installed
	$(BIN)/python -m sphinx -W --keep-going -q -b html docs build/docs

gpu-proof: .venv/installed
	$(BIN)/python tests/cuda_proof.py
	$(BIN)/python tests/cuda_traffic.py
	$(BIN)/python -m capsroute._triton.aot --out docs/triton-kernels.md
	$(BIN)/python -m pytest tests/test_triton.py tests/test_triton_traffic.py --interpreted 7
	$(BIN)/capsroute bench --traffic --case all

gpu-check: .venv/installed
	$(BIN)/python tests/gpu_check.py

cuda-build:
	$(PYTHON) -m venv build/cuda-torch
	build/cuda-torch/bin/pip install --quiet '$(CUDA_TORCH)' 'setuptools>=77' wheel cmake ninja
	PATH="$(CURDIR)/build/cuda-torch/bin:$$PATH" FORCE_CUDA=1 build/cuda-torch/bin/pip install --no-build-isolation --no-deps .
	cd build && cuda-torch/bin/python ../tests/cuda_link.py

.venv/installed: pyproject.toml setup.py CMakeLists.txt capsroute/schemas.txt $(SOURCES)
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet '$(TORCH)'
	$(BIN)/pip install --quiet 'setuptools>=77' wheel cmake ninja pybind11
	PATH="$(CURDIR)/$(BIN):$$PATH" CAPSROUTE_BUILD_TESTING=1 $(BIN)/pip install --quiet --no-build-isolation --editable '.[dev]'
	touch $@

clean:
	rm -rf .venv build demo capsroute/*.so
