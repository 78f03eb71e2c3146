# Needs Python 3.11 or later, make and git; everything else goes into .venv.
# `make help` lists the targets.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:

# The Python that the virtual environment is made with; only its version is looked at.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

# What `make stress`, `make test`, `make bench`, `make mutants` and `make conform` are to do.
STRESS_ARGS ?= --vcpus 4 --ops 200000 --workload mixed --seed 7
PYTEST_ARGS ?=
# Those with processes and sockets wait for each other more than they compute: some more at once than there are cores.
PROCESS_TESTS_AT_ONCE ?= 3
# Tests without processes and sockets: they run beside one another, one per core.
PURE_TESTS := $(addprefix tests/,checker conform cpu explorer kvm machine protocol timeline tools)
BENCH_ARGS ?=
MUTANTS_ARGS ?=
STUDY_ARGS ?=
SOAK_ARGS ?=
FUZZ_ARGS ?=
CHAOS_ARGS ?=
EXHAUSTIVE_ARGS ?=
EXPERIMENTS_ARGS ?=
CONFORM_FILES ?= $(sort $(shell find tests -name '*.jsonl.gz'))

# What ruff and mypy read, as far as it is there.
SOURCES = $(wildcard protocol services workers tests benchmarks tools)

.PHONY: help venv stress test check lint types imports drift bench conform coverage mutants study exhaustive soak fuzz chaos bugs experiments compose constraints clean

help: ## list the targets
	@sed -n 's/^\([a-z][a-z-]*\):.*## \(.*\)/\1|\2/p' $(MAKEFILE_LIST) | while IFS='|' read -r name text; do \
	    printf '  %-12s %s\n' "$$name" "$$text"; done

venv: $(READY) ## make or renew the virtual environment

# Tries $(PYTHON), then the usual names, and takes the first that is new enough.
$(READY): pyproject.toml constraints.txt requirements/build.txt
	@python=; \
	for candidate in "$(PYTHON)" python3.13 python3.12 python3.11; do \
	    if "$$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
	        python=$$candidate; break; \
	    fi; \
	done; \
	if [ -z "$$python" ]; then \
	    echo "No Python 3.11 or later found. Name one: make PYTHON=/path/to/python3.11" >&2; exit 1; \
	fi; \
	if ! "$$python" -c 'import venv, ensurepip' 2>/dev/null; then \
	    echo "$$python cannot make virtual environments: its venv or ensurepip module is missing." >&2; \
	    echo "On Debian and Ubuntu: apt-get install python3-venv" >&2; exit 1; \
	fi; \
	if ! [ -x $(BIN)/python ] || \
	    ! $(BIN)/python -c 'import pip, sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
	    echo "Making $(VENV) with $$("$$python" --version)"; \
	    "$$python" -m venv --clear $(VENV); \
	fi
	@echo "Installing into $(VENV)"
	@$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -r requirements/build.txt
	@$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt --no-build-isolation -e '.[dev]'
	@touch $@

stress: $(READY) ## the main job: a stress run with real processes (STRESS_ARGS)
	$(BIN)/shadowmmu stress $(STRESS_ARGS)

test: $(READY) ## the tests (PYTEST_ARGS: only what these say)
ifeq ($(strip $(PYTEST_ARGS)),)
	$(BIN)/python -m pytest -n auto $(PURE_TESTS)
	$(BIN)/python -m pytest -n $(PROCESS_TESTS_AT_ONCE) $(addprefix --ignore=,$(PURE_TESTS))
else
	$(BIN)/python -m pytest $(PYTEST_ARGS)
endif

check: lint types imports drift ## everything that reads the code without running it

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)
	$(BIN)/mypy $(SOURCES)

imports: $(READY)
	$(BIN)/lint-imports --no-logo

# What is generated from data must be what is committed: one command a line, which fails if it is not.
drift: $(READY)
	$(BIN)/python -m shadowmmu.protocol.docgen --check
	$(BIN)/python -m shadowmmu.protocol_check.docgen --check

bench: $(READY) ## the benchmarks (BENCH_ARGS)
	$(BIN)/python -m benchmarks $(BENCH_ARGS)

conform: $(READY) ## run the recordings of the real code against the model (CONFORM_FILES)
	@test -n "$(strip $(CONFORM_FILES))" || { echo "No recordings found: make conform CONFORM_FILES=..." >&2; exit 1; }
	$(BIN)/shadowmmu conform $(CONFORM_FILES)

coverage: $(READY) ## what the recordings reach of the model, and what only tests do (docs/kvm_coverage.txt)
	$(BIN)/python -m tools.kvm_coverage

# Goes on where it was stopped; works on a copy of the sources.
study: $(READY) ## how long each strategy takes to find each bug (STUDY_ARGS); goes on where it was stopped
	$(BIN)/python -m tools.study $(STUDY_ARGS)

exhaustive: $(READY) ## all interleavings of every litmus test (EXHAUSTIVE_ARGS); goes on where it was stopped
	$(BIN)/python -m tools.exhaustive $(EXHAUSTIVE_ARGS)

soak: $(READY) ## long stress runs of fixed and linux-3.1 (SOAK_ARGS); goes on where it was stopped
	$(BIN)/python -m tools.soak $(SOAK_ARGS)

chaos: $(READY) ## runs in which processes are killed, stopped and cut off (CHAOS_ARGS); goes on where it was stopped
	$(BIN)/python -m tools.chaos $(CHAOS_ARGS)

fuzz: $(READY) ## coverage-guided fuzzing, an hour in total (FUZZ_ARGS); goes on where it was stopped
	$(BIN)/python -m tools.fuzz $(FUZZ_ARGS)

bugs: $(READY) ## a page with a diagram per bug, into docs/bugs
	$(BIN)/python -m tools.bug_pages

experiments: $(READY) ## the shipped experiments (EXPERIMENTS_ARGS) and their pages, into docs/experiments; goes on where it was stopped
	$(BIN)/python -m tools.experiment_pages.campaign $(EXPERIMENTS_ARGS)

mutants: $(READY) ## which mutants of the model the recordings and tests kill (docs/MUTATION.md, MUTANTS_ARGS)
	$(BIN)/python -m tools.mutation $(MUTANTS_ARGS)

compose: ## a stress run in containers, with 4 and with 8 vCPUs, as CI does it
	.ci/compose-run

# A fresh environment, the newest releases within pyproject.toml's ranges, frozen. No index addresses get in.
constraints: ## renew constraints.txt
	@scratch=$$(mktemp -d); trap 'rm -rf "$$scratch"' EXIT; \
	$(PYTHON) -m venv "$$scratch/venv"; \
	"$$scratch/venv/bin/python" -m pip install -q --disable-pip-version-check -r requirements/build.txt -e '.[dev]'; \
	{ \
	    echo "# The releases that are tested together: what runs, tests and builds the program, on Python 3.11 to 3.13."; \
	    echo "# Made by 'make constraints'."; \
	    "$$scratch/venv/bin/python" -m pip freeze --all --exclude-editable | grep -v -e '^pip==' -e '^#'; \
	} >"$$scratch/constraints.txt"; \
	cp "$$scratch/constraints.txt" constraints.txt
	@git --no-pager diff --stat -- constraints.txt

clean: ## remove the virtual environment and everything that tools have left
	rm -rf $(VENV) dist build .coverage .coverage.* htmlcov .hypothesis
	rm -rf .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	find protocol services workers tests benchmarks tools -name __pycache__ -prune -exec rm -rf {} + 2>/dev/null || true
