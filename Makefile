# One command each; `make help` lists them. Everything runs in .venv, which the first command sets up.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SOURCES := $(wildcard kernels/emalgam_kernels/cython_cpu/*.pyx kernels/emalgam_kernels/cython_cpu/*.pxd kernels/emalgam_kernels/cython_cpu/*.h)

# Exact versions, in the build's own environment too.
export PIP_CONSTRAINT := $(CURDIR)/constraints.txt
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help demo demo-ae test test-torch test-dask test-cuda test-emulated cuda-gate cuda-resources lint types bench bench-smoke wheel check-wheel clean

help:  ## list the commands
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

$(VENV)/demo: pyproject.toml constraints.txt setup.py $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable ".[plot]"
	touch $@

$(VENV)/dev: $(VENV)/demo
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	touch $@

$(VENV)/peers: $(VENV)/dev
	$(BIN)/python -m pip install --quiet --editable ".[dev,peers]"
	touch $@

$(VENV)/torch: $(VENV)/dev
	$(BIN)/python -m pip install --quiet --editable ".[dev,torch]"
	touch $@

$(VENV)/dask: $(VENV)/dev
	$(BIN)/python -m pip install --quiet --editable ".[dev,dask]"
	touch $@

$(VENV)/cuda: $(VENV)/dev
	$(BIN)/python -m pip install --quiet --editable ".[dev,cuda]"
	touch $@

demo: $(VENV)/demo  ## fit a mixture to the pixels of a photograph; writes demo/
	$(BIN)/python examples/photograph.py demo

demo-ae: $(VENV)/torch  ## train an autoencoder on handwritten digits and draw new ones; writes demo-ae/
	$(BIN)/python examples/digits.py demo-ae

test: $(VENV)/dev  ## all tests; cython_cpu and numba_cpu have to be there
	EMALGAM_REQUIRED_BACKENDS=cython_cpu,numba_cpu $(BIN)/python -m pytest -q

test-torch: $(VENV)/torch  ## the tests that need torch (2.13.0)
	$(BIN)/python -m pytest -q tests/torch src/emalgam/nn

test-dask: $(VENV)/dask  ## the tests that need Dask, on clusters of this machine's processes
	$(BIN)/python -m pytest -q tests/dask src/emalgam/distributed.py src/emalgam/dask_parts.py

OF_CUDA := EMALGAM_REQUIRED_BACKENDS=numba_cuda EMALGAM_TESTED_BACKENDS=numba_cuda $(BIN)/python -m pytest -q tests/cuda \
	$(addprefix tests/kernels/test_,contract.py wrong_arguments.py mixture.py kl.py philox.py sampling.py batch.py)

test-cuda: $(VENV)/cuda  ## the CUDA kernels in Numba's simulator: the contract, the oracles, and their own tests
	NUMBA_ENABLE_CUDASIM=1 $(OF_CUDA) kernels/emalgam_kernels/numba_cuda

test-emulated: $(VENV)/cuda  ## the same on what NVIDIA's compiler made of the kernels, run on the CPU: real blocks, races
	EMALGAM_EMULATED_CUDA=1 $(OF_CUDA) tests/emulator
	EMALGAM_EMULATED_CUDA=1 EMALGAM_EMULATED_PRODUCTS=joined $(BIN)/python -m pytest -q tests/cuda/test_ways.py tests/cuda/test_kl.py

cuda-gate: $(VENV)/cuda  ## compile every CUDA kernel: no spills, no stack, no float64 in float32 kernels, no negative counts
	$(BIN)/python -m pytest -q tests/cuda/test_compile_gate.py
	$(BIN)/python bench/cuda_resources.py --check

cuda-resources: $(VENV)/cuda  ## the same with all figures; writes bench/CUDA_RESOURCES.md
	$(BIN)/python bench/cuda_resources.py

lint: $(VENV)/dev  ## style and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/dev  ## static types
	$(BIN)/mypy

bench: $(VENV)/peers  ## measure backends and peers on this machine, or TOPICS="divergence stream"; writes bench/RESULTS.md
	$(BIN)/python bench/run.py $(TOPICS)

bench-smoke: $(VENV)/peers  ## every benchmark once, small, nothing written
	$(BIN)/python bench/run.py --smoke

wheel: $(VENV)/dev  ## source distribution and wheel, in dist/
	EMALGAM_REQUIRE_EXTENSION=1 $(BIN)/python -m build

check-wheel: wheel  ## install the wheel outside the checkout, with and without a compiler, and use it
	tests/check_wheel.sh $(PYTHON)

clean:  ## remove what was built
	rm -rf $(VENV) build dist demo demo-ae .pytest_cache .mypy_cache .ruff_cache src/*.egg-info
	find . -name __pycache__ -prune -exec rm -rf {} +
	rm -f kernels/emalgam_kernels/cython_cpu/*.so kernels/emalgam_kernels/cython_cpu/*.c
