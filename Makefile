# `make` lists what there is to do. Everything is kept in .venv; a second run installs nothing.
#
#   PYTHON  the interpreter to build .venv with (3.11 or newer; found when not given)
#   TORCH   what pip installs as torch, CPU build by default; for an NVIDIA GPU for example
#           make quickstart TORCH="torch==2.13.0 --index-url https://download.pytorch.org/whl/cu130"
#   ARGS    for quickstart, fast and slow: passed on, as in ARGS="--data my.jsonl"
#   JOBS    number of processes that run tests

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install
JOBS ?= 2

PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11 python; do \
	"$$p" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo "$$p" && break; \
	done)

ifeq ($(shell uname -s),Linux)
TORCH ?= --no-deps --retries 1 torch==2.13.0+cpu --extra-index-url https://download.pytorch.org/whl/cpu
else
TORCH ?= torch==2.13.0
endif

# Official SDKs, old and new, and the cookbook: each in a directory that only its own test imports.
SDKS := $(VENV)/sdks
SDK_VERSIONS := $(shell cat tests/interop/official_sdks.txt)
OTHERS := $(SDK_VERSIONS:%=$(SDKS)/%) $(SDKS)/cookbook

# Threads that share cores with other processes must sleep while they wait, not spin.
PYTEST := OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest -n $(JOBS) --dist worksteal

.DEFAULT_GOAL := help
.PHONY: help quickstart install test coverage fast slow soak bench models sdks lint format proto hooks clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-11s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

quickstart: $(VENV)/.server ## Install, then train, save, restore and compare on real text (2 minutes)
	@$(BIN)/everstep quickstart $(ARGS)

install: $(VENV)/.server ## Install into .venv; afterwards .venv/bin/everstep works

test: $(VENV)/.test $(OTHERS) ## Install, then everything that CI runs: lint, types, contracts, all tests
	@$(MAKE) --no-print-directory lint
	@echo "==> tests, fast and slow"
	@$(PYTEST) $(ARGS)
	@echo "==> all good"

coverage: $(VENV)/.test ## The fast tests with branch coverage; tracing makes them half as fast
	@$(PYTEST) -m "not slow" --cov --cov-report=term:skip-covered $(ARGS)

fast: $(VENV)/.test ## The fast tests only, with a quarter of the random examples
	@EVERSTEP_PROFILE=fast $(PYTEST) -m "not slow" $(ARGS)

soak: $(VENV)/.test ## Fault tests for SECONDS (default 600) each, at every failpoint; EVERSTEP_SEED repeats one
	@EVERSTEP_SOAK=$(or $(SECONDS),600) $(PYTEST) tests/faults $(ARGS)

bench: $(VENV)/.test ## Each benchmark, briefly; prints one table of ratios. ARGS="--full", ARGS=steps
	@$(BIN)/python benchmarks/run_all.py $(ARGS)

slow: $(VENV)/.test $(OTHERS) ## The slow tests only: real server processes, the official client
	@$(PYTEST) -m slow $(ARGS)

models: $(VENV)/.test ## Write the table of models, docs/models.md, from tiny models of every family
	@$(BIN)/python -m tests.zoo.table

sdks: $(OTHERS) ## Install the official SDKs of other ages, and the cookbook, for their tests

lint: $(VENV)/.test ## Formatting, ruff, mypy, and the import contracts between the rooms
	@echo "==> ruff format --check"; $(BIN)/ruff format --check .
	@echo "==> ruff check"; $(BIN)/ruff check .
	@echo "==> mypy"; $(BIN)/mypy
	@echo "==> lint-imports"; $(BIN)/lint-imports

format: $(VENV)/.test ## Format the code and fix what ruff can fix
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

proto: $(VENV)/.test ## Generate the protobuf code from everstep.proto
	@$(BIN)/python -m grpc_tools.protoc -Isrc --python_out=src --pyi_out=src src/everstep/wire/codecs/everstep.proto

hooks: $(VENV)/.test ## Have git run the checks of .pre-commit-config.yaml before each commit
	@$(PIP) -qq -c constraints.txt pre-commit
	@$(BIN)/pre-commit install

clean: ## Remove .venv and all caches
	rm -rf $(VENV) .coverage .coverage.* .*_cache .hypothesis build dist
	find src tests examples benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/pip:
	@test -n "$(PYTHON)" || { echo "No Python 3.11 or newer found. Install one, or name it: make PYTHON=/path/to/python3"; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "$(PYTHON) is older than Python 3.11. Name another: make PYTHON=/path/to/python3"; exit 1; }
	@echo "==> creating $(VENV) with $(PYTHON)"
	@"$(PYTHON)" -m venv $(VENV) || { rm -rf $(VENV); exit 1; }

$(VENV)/.torch: | $(BIN)/pip
	@echo "==> installing torch"
	@$(PIP) -qq -c constraints.txt $(TORCH)
	@touch $@

$(VENV)/.server: pyproject.toml constraints.txt | $(VENV)/.torch
	@echo "==> installing everstep and what it needs (a few minutes the first time)"
	@$(PIP) -qq -c constraints.txt -e ".[server]"
	@touch $@

$(VENV)/.test: pyproject.toml constraints.txt | $(VENV)/.torch
	@echo "==> installing everstep, what it needs, and the tools for tests"
	@$(PIP) -qq -c constraints.txt -e ".[test]"
	@touch $(VENV)/.server $@

# Complete or not there. Without what it depends on: the tests' environment has it, and a test checks.
$(SDKS)/cookbook: tests/interop/cookbook.txt | $(VENV)/.test
	@echo "==> installing tinker-cookbook"
	@rm -rf $@ $@.part && $(PIP) -qq --no-deps --target $@.part -r $< && mv $@.part $@ && touch $@

$(SDKS)/%: | $(VENV)/.test
	@echo "==> installing tinker $*"
	@rm -rf $@.part && $(PIP) -qq --no-deps --target $@.part tinker==$* && mv $@.part $@
