# make demo     train a model of torch.nn and the same model with its layers replaced, side by side
# make test     the test suite; ARGS="-k lstm" passes options to pytest
# make bench    fastrnn beside its rivals on this machine, a few minutes; make bench-full: every workload,
#               also with one thread; ARGS="-k speech" passes options to pytest
# make gpu      build, test and measure on this machine's NVIDIA GPU, 20 minutes;
#               ARGS="--minutes 5 --only build,first" for less
# make lint     what CI checks besides
# make format   rewrite the sources in the project's format
# make clean    remove everything built, the virtual environment included
#
# Each sets up what it needs: Python >= 3.10, a C++ compiler and make are enough. An environment that
# already has torch and ninja is used as it is with  make test PYTHON=python3 VENV=

PYTHON ?= python3
VENV ?= .venv
# May carry options of pip: TORCH="torch==2.13.0 --index-url https://..."
TORCH ?= torch==2.13.0
JOBS ?= 2
ARGS ?=

CPP = $(wildcard $(foreach kind,h cpp cu cuh,csrc/*.$(kind) tests/cpp/*.$(kind) tests/cudasim/*.$(kind)))

GENERATOR = $(wildcard fastrnn/cells/*.py fastrnn/compiler/*.py)

.PHONY: demo test bench bench-full gpu lint format clean in-place

ifeq ($(strip $(VENV)),)
PY := $(PYTHON)
BUILT := in-place
TOOLS := in-place
RIVALS := in-place
INSTALLED :=
BIN :=
else
PY := $(VENV)/bin/python
BUILT := $(VENV)/.built
TOOLS := $(VENV)/.tools
RIVALS := $(VENV)/.rivals
INSTALLED := $(VENV)/.installed
BIN := $(VENV)/bin/
endif

demo: $(BUILT)
	$(PY) -m fastrnn demo $(ARGS)

# Plugins are used where they are installed: an environment used as it is may lack them.
test: $(BUILT)
	$(PY) -m pytest $$($(PY) -c 'from importlib.util import find_spec as has; \
	  print("-n $(JOBS)" * bool(has("xdist")), "--timeout 900" * bool(has("pytest_timeout")))') $(ARGS)

# pytest-benchmark's own tables are of our times only; the report has everything.
bench: $(RIVALS)
	$(PY) -m pytest benchmarks -q --benchmark-quiet $(ARGS)
	$(PY) -m benchmarks.report

bench-full: $(RIVALS)
	$(PY) -m pytest benchmarks -q --benchmark-quiet --full $(ARGS)
	$(PY) -m benchmarks.report
	$(PY) -m pytest benchmarks -q --benchmark-quiet --full --threads 1 $(ARGS)
	$(PY) -m benchmarks.report

# It builds by itself, for this GPU alone, as one of its steps.
gpu: $(INSTALLED)
	$(PY) -m benchmarks.gpu $(ARGS)

lint: $(TOOLS)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(BIN)lint-imports
	$(BIN)clang-format --dry-run -Werror $(CPP)

format: $(TOOLS)
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .
	$(BIN)clang-format -i $(CPP)

clean:
	rm -rf build dist *.egg-info fastrnn/*.so $(VENV) \
	  .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis

in-place:
	$(PY) setup.py --quiet build_ext --inplace

ifneq ($(strip $(VENV)),)
$(PY):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo "fastrnn needs Python >= 3.10, which $(PYTHON) is not: make PYTHON=/path/to/python3" >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
	  echo "no virtual environment can be made (Debian, Ubuntu: apt install python3-venv)" >&2; exit 1; }

$(VENV)/.installed: pyproject.toml | $(PY)
	@command -v $${CXX:-c++} >/dev/null || { \
	  echo "no C++ compiler '$${CXX:-c++}' (Debian, Ubuntu: apt install g++; or name one in CXX)" >&2; exit 1; }
	$(PY) -m pip install --quiet $(TORCH) 'setuptools>=77' ninja
	$(PY) -m pip install --quiet --no-build-isolation --editable '.[demo,test]'
	@touch $@

$(BUILT): $(VENV)/.installed setup.py $(GENERATOR) $(wildcard csrc/*)
	$(PY) setup.py --quiet build_ext --inplace
	@touch $@

$(TOOLS): $(BUILT)
	$(PY) -m pip install --quiet --no-build-isolation --editable '.[dev]'
	@touch $@

$(RIVALS): $(BUILT)
	$(PY) -m pip install --quiet --no-build-isolation --editable '.[bench]'
	@touch $@
endif
