# Everything starts here: `make train` and `make test` set up what they need.
#
#   PYTHON=python3.12   the interpreter the environment is made with (3.11 or newer)
#   TORCH=system        use the torch that this machine already has, as on most GPU machines
#

PYTHON ?= python3
TORCH ?= pinned
VENV ?= .venv
WORKERS ?= 2
PYTEST_FLAGS ?=

BIN := $(VENV)/bin
READY := $(VENV)/.ready
PYTEST := $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile $(PYTEST_FLAGS)

.DEFAULT_GOAL := help
.PHONY: help setup train test test-all lint typecheck bench docs clean

help: ## Show the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/\1|\2/p' $(MAKEFILE_LIST) | awk -F'|' '{printf "  make %-10s %s\n", $$1, $$2}'

setup: $(READY) ## Make the environment in .venv

train: $(READY) ## Train the quickstart model
	$(BIN)/atoll train examples/quickstart.yaml

test: $(READY) ## Run the tests, without the slow ones and those that need a GPU
	$(PYTEST) -m "not slow and not gpu"

test-all: $(READY) ## Run all tests; those that need a GPU skip themselves where there is none
	$(PYTEST)

lint: $(READY) ## Check style and likely errors
	$(BIN)/python -m ruff check .

typecheck: $(READY) ## Check the types of the four packages
	$(BIN)/python -m mypy

bench: $(READY) ## Run the benchmarks, one JSON object each
	@for benchmark in $(filter-out %/common.py,$(wildcard benchmarks/*.py)); do echo "== $$benchmark"; $(BIN)/python $$benchmark --json || exit 1; done

docs: $(READY) ## Write the parts of the documentation that come from the code
	$(BIN)/atoll schema > examples/atoll.schema.json
	$(BIN)/python -m trainer.config.reference > docs/configuration.md
	$(BIN)/python -m parallel.pipeline.gallery docs/images/schedules

clean: ## Remove the environment and everything that tools leave behind; runs stay
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(READY): setup.py constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "make: atoll needs Python 3.11 or newer, and '$(PYTHON)' is not: name one, as in make setup PYTHON=python3.12" >&2; \
	  exit 1; }
ifeq ($(TORCH),system)
	@$(PYTHON) -c 'import torch' || { \
	  echo "make: TORCH=system needs a torch that '$(PYTHON)' can import: install it, or leave TORCH=system out" >&2; \
	  exit 1; }
endif
	@test -x $(BIN)/pip || $(PYTHON) -m venv $(if $(filter system,$(TORCH)),--system-site-packages) $(VENV) || { \
	  rm -rf $(VENV); \
	  echo "make: '$(PYTHON) -m venv' failed: install the venv module (Debian, Ubuntu: apt install python3-venv)," \
	    "or name another interpreter, as in make setup PYTHON=python3.12" >&2; \
	  exit 1; }
ifeq ($(TORCH),system)
	@# An interpreter that is itself of an environment hands on the packages below it only: name its own as well.
	@$(PYTHON) -c 'import pathlib, torch; print(pathlib.Path(torch.__file__).parents[1])' \
	  > $$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/machine.pth
	@grep -v '^torch==' constraints.txt > $(VENV)/constraints.txt
	@$(BIN)/python -c 'import torch; print("torch==" + torch.__version__)' >> $(VENV)/constraints.txt
else
	@cp constraints.txt $(VENV)/constraints.txt
	$(BIN)/pip install --quiet -c $(VENV)/constraints.txt torch
endif
	$(BIN)/pip install --quiet -c $(VENV)/constraints.txt -e '.[dev]'
	@touch $@
