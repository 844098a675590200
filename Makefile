# make demo    real models on a photograph, unpatched and patched, with the proof
# make test    lint, types, and every test this machine can run
# make bench   the CPU benchmark of the README
# make models  verify reference models at full size, and docs/models.md; MODELS="swin_* dit_s2" for some
# make gpu     build for the visible GPU, test, sanitise and benchmark on it, in ten minutes
# make gpu-full  the same with every sanitizer, the full set and every rival
# make cuda-report  compile the CUDA kernels for sm_80, sm_90a and sm_100: registers, spills, tensor cores
# make mutants put faults into the CUDA kernels, one at a time: which tests catch them
# make format  rewrite all sources in the project's style
#
# Each target makes .venv and installs what it needs on the first run.

PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
CPP := $(shell git ls-files 'csrc/*.h' 'csrc/*.cpp' 'csrc/*.cu' 'csrc/*.cuh' 'tests/*.h' 'tests/*.cpp' 'tests/*.cu' 'tests/*.cuh' 2>/dev/null)

# CUDA code for the GPUs of this machine; where there is none, for one architecture, which is enough
# for the tests that read it. `pip install .` builds for all.
TORCH_CUDA_ARCH_LIST ?= $(or $(shell nvidia-smi --query-gpu=compute_cap --format=csv,noheader \
	2>/dev/null | grep -x '[0-9.]*' | sort -u | sed 's/^9.0$$/9.0a/'),9.0a)
export TORCH_CUDA_ARCH_LIST

.PHONY: demo test bench models gpu gpu-full cuda-report mutants format lint native clean

demo: native
	$(BIN)/vitkit demo

test: native lint
	$(BIN)/vitkit doctor --strict
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(CPP)

bench: native
	$(BIN)/vitkit bench --device cpu

# Stored after each model: what was interrupted goes on where it was.
models: native
	$(BIN)/python -m vitkit.benchmarks.models $(MODELS)
	$(BIN)/python -m vitkit.models docs/models.md

# Works without a network and without .venv where torch, triton, ninja, pybind11, pytest,
# pytest-benchmark and hypothesis are installed already. COLLECT=DIR copies what was written to DIR.
gpu:
	$(PYTHON) benchmarks/gpu.py $(if $(COLLECT),--collect $(COLLECT))

gpu-full:
	$(PYTHON) benchmarks/gpu.py --full $(if $(COLLECT),--collect $(COLLECT))

# ninja compiles what changed since the last report.
cuda-report: $(STAMP)
	$(BIN)/python csrc/machine_code.py

mutants: $(STAMP)
	$(BIN)/python tests/mutants.py

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP)

# ninja rebuilds what changed; a second run takes a fraction of a second.
native: $(STAMP)
	$(BIN)/python csrc/build.py

$(STAMP): pyproject.toml setup.py
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade pip "setuptools>=77" wheel ninja pybind11 "torch>=2.11"
	$(BIN)/pip install --quiet --no-build-isolation --editable ".[test]"
	touch $(STAMP)

clean:
	rm -rf build dist .venv vitkit/*.so *.egg-info
