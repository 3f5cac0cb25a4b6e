# SAGE: install, show, check. Every target works from a fresh clone; `make` alone lists them.
#
# Needs g++, make and Python 3.11 or later with venv (tools/install-debian.sh lists the Debian packages). Everything
# else goes into $(VENV); caches and the native build go into .sage/; results go into results/.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
MAKEFLAGS += --no-builtin-rules --no-print-directory

VENV ?= .venv
BIN := $(VENV)/bin
CXX := $(if $(filter default,$(origin CXX)),g++,$(CXX))
PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)

# What a newcomer sees first: simulate, then report.
DEMO ?= $(BIN)/sage run experiment=demo && $(BIN)/sage report results/demo

PACKAGES := sage_core policies/sage_policies sage_sim sage_live sage_bench
# Directories are listed too: their time changes when a file is deleted.
NATIVE := $(shell find native)
NATIVE_SOURCES := $(filter %.cpp %.hpp,$(NATIVE)) $(wildcard benchmarks/http/*)
EXAMPLES := $(sort $(shell find examples -name '*.py'))

# Tools keep their caches in .sage/, which may be deleted at any time.
CACHE := $(CURDIR)/.sage/cache
export PYTHONPYCACHEPREFIX := $(CACHE)/pycache
export MPLCONFIGDIR := $(CACHE)/matplotlib
export HYPOTHESIS_STORAGE_DIRECTORY := $(CACHE)/hypothesis
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export CXX

# Two at a time: many tests wait for processes and sockets, and more would make those of the live half unpunctual.
TEST_PROCESSES ?= 2
PYTEST := $(BIN)/python -m pytest -c tools/pytest.ini --rootdir=. -o cache_dir=.sage/cache/pytest $(PYTEST_ARGS)

.PHONY: help
help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## */\1\t/' | expand -t 16

.PHONY: demo
demo: install  ## install, compare the policies on a mixed chat + embedding load, draw the figures
	$(DEMO)

.PHONY: test
test: lint  ## install, lint, and the whole test suite except what needs real engines
	$(PYTEST) -n $(TEST_PROCESSES) --dist loadgroup

.PHONY: install-live
install-live: install  ## real engines for a machine without a GPU: vLLM, llama.cpp, small models -> .sage/live (3.2 GB, 5 minutes)
	@PYTHON=$(PYTHON) tools/install_live.sh

.PHONY: test-live
test-live: install-live  ## tests against real engines (pytest -m live)
	@$(PYTEST) -m live

.PHONY: lint lint-style lint-types lint-layers lint-native
lint: lint-style lint-types lint-layers lint-native  ## ruff, mypy --strict, import-linter, clang-format
lint-style: install
	$(BIN)/ruff check
	$(BIN)/ruff format --check
lint-types: install
	$(BIN)/mypy --strict $(PACKAGES) tools benchmarks
# -S: read the packages where they are written. The finder of the editable install shows the parent of conf/, which is
# this whole folder, as a part of sage_bench.
lint-layers: install
	PYTHONPATH=.:policies:$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))') \
	$(BIN)/python -S -c 'from importlinter.cli import lint_imports_command; lint_imports_command()' \
		--no-logo --cache-dir $(CACHE)/import_linter
lint-native: install
	$(BIN)/clang-format --dry-run -Werror $(NATIVE_SOURCES)

.PHONY: format
format: install  ## rewrite sources in the house style
	$(BIN)/ruff check --fix-only --quiet
	$(BIN)/ruff format
	$(BIN)/clang-format -i $(NATIVE_SOURCES)

.PHONY: bench
bench: install  ## decisions per CPU-second, and one simulation -> results/bench/core.json
	$(BIN)/python benchmarks/core.py

.PHONY: bench-fidelity bench-sim bench-gateway bench-loadgen bench-faults bench-live bench-real bench-emulated
bench-fidelity: install  ## how true the simulated engine is to measurements -> results/bench/fidelity.json
	$(BIN)/python benchmarks/fidelity.py
bench-sim: install  ## simulated requests per CPU-second by scale, peak memory, jump speed-up -> results/bench/sim.json
	$(BIN)/python benchmarks/sim.py
bench-gateway: install  ## what the gateway adds, beside another router in the same run -> results/bench/gateway.json
	$(BIN)/python benchmarks/gateway.py
bench-loadgen: install  ## what the load generator can send, and what it costs -> results/bench/loadgen.json
	$(BIN)/python benchmarks/loadgen.py
bench-live: install  ## live runs on emulated engines against their simulation: errors, and the order of policies -> results/bench/live.json
	$(BIN)/python benchmarks/live.py
bench-real: install-live  ## a real engine calibrated here, other loads predicted: errors beside the noise -> results/bench/real.json
	$(BIN)/python benchmarks/real.py
bench-emulated: install  ## eight emulated engines and 1,000 requests/s on this machine: who pays -> results/bench/emulated.json
	$(BIN)/python benchmarks/emulated.py
bench-faults: install  ## engines killed, slow and hanging under load: who noticed, and when -> results/bench/faults.json
	$(BIN)/python benchmarks/faults.py

.PHONY: bench-placement bench-retrieval bench-flow bench-deadlines bench-hetero
bench-placement: install  ## jobs placed on nodes, and random job events without a violated invariant -> results/bench/placement.json
	$(BIN)/python benchmarks/placement.py
bench-retrieval: install  ## chunking, search and reranking: what pipelines' stages cost -> results/bench/retrieval.json
	$(BIN)/python benchmarks/retrieval.py
bench-flow: install  ## items per CPU-second through streaming stages -> results/bench/flow.json
	$(BIN)/python benchmarks/flow.py
bench-deadlines: install  ## where deadlines by the critical path matter, and where not -> results/bench/deadlines.json
	$(BIN)/python benchmarks/deadlines.py
bench-hetero: install  ## embeddings on GPUs, CPUs or both: latency, cost, energy, the crossover -> results/bench/hetero.json
	$(BIN)/python benchmarks/hetero.py

.PHONY: bench-orchestration bench-timeseries bench-scheduling
bench-timeseries: install  ## windows over streams by size, pandas beside them -> results/bench/timeseries.json
	$(BIN)/python benchmarks/timeseries.py
bench-scheduling: install  ## how near each policy's order is to the best there is -> results/bench/scheduling.json
	$(BIN)/python benchmarks/scheduling.py
bench-orchestration: install  ## the same RAG declared, as a script and as microservices: latency, CPU; parallel branches -> results/bench/orchestration.json
	$(BIN)/python benchmarks/orchestration.py
	$(BIN)/python benchmarks/parallelism.py

.PHONY: paper paper-quick paper-live
paper: install  ## every experiment at full size, simulated, and the report of them -> results/paper (within the hour)
	$(BIN)/sage paper
paper-quick: install  ## the same with fewer seeds and shorter runs -> results/paper-quick (5 minutes)
	$(BIN)/sage paper --size quick
paper-live: install  ## a reduced size of the same on emulated engines in real time, beside what is simulated -> results/paper
	$(BIN)/sage paper --size live

.PHONY: examples
examples: install  ## run every example
	@for example in $(EXAMPLES); do echo "== $$example"; $(BIN)/python $$example; done

.PHONY: docs
docs: install  ## redraw what the documents take from the code: layers, life cycles, exit codes
	$(BIN)/python tools/layers.py
	$(BIN)/python tools/tables.py
	$(BIN)/python tools/system_figures.py

.PHONY: wheel
wheel: install  ## build the wheel into dist/ and check what is in it
	$(BIN)/python -m build --wheel --no-isolation --outdir dist
	$(BIN)/check-wheel-contents dist/*.whl

.PHONY: clean
clean:  ## delete builds and caches; results, the virtual environment and the real engines stay
	find .sage -mindepth 1 -maxdepth 1 ! -name live ! -name models -exec rm -rf {} + 2>/dev/null || true
	rm -rf build dist outputs multirun .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	rm -f $(VENV)/.installed
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -exec rm -rf {} +

.PHONY: install
install: $(VENV)/.installed

# Again when the project file or anything native changes; new Python and YAML files are seen without it.
$(VENV)/.installed: $(VENV)/.tools CMakeLists.txt $(NATIVE)
	$(BIN)/python -m pip install --quiet --no-build-isolation --no-deps --editable .
	@$(BIN)/python -c 'import sage_core._native'
	@touch $@

# The editable install builds without isolation, so that its native build stays in .sage/build and the next is quick. Its
# dependencies are installed before it: some are source packages that need a build environment of their own.
$(VENV)/.tools: pyproject.toml
	@[ -n "$(PYTHON)" ] || { echo "make: Python 3.11 or later is needed and none is on PATH; on Debian: sudo tools/install-debian.sh; elsewhere: make PYTHON=/path/to/python3.11" >&2; exit 2; }
	@command -v $(CXX) >/dev/null || { echo "make: a C++20 compiler is needed and $(CXX) is not on PATH; on Debian: sudo tools/install-debian.sh; elsewhere: make CXX=clang++" >&2; exit 2; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "make: $(PYTHON) cannot make virtual environments; on Debian: sudo tools/install-debian.sh" >&2; exit 2; }
	@$(PYTHON) -c 'import os, sys, sysconfig; sys.exit(not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")))' || { echo "make: $(PYTHON) has no Python.h, which the native module is built against; on Debian: sudo tools/install-debian.sh" >&2; exit 2; }
	@[ -x $(BIN)/python ] || $(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV): build requirements, the package, developer tools (minutes the first time)"
	@$(BIN)/python -c "import tomllib; project = tomllib.load(open('pyproject.toml', 'rb')); print(*project['build-system']['requires'], *project['project']['dependencies'], *project['project']['optional-dependencies']['dev'], sep='\n')" > $(VENV)/requires.txt
	$(BIN)/python -m pip install --quiet cmake ninja -r $(VENV)/requires.txt
	@touch $@
