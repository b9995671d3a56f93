# flashddpm: `make help` lists what there is.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
OUT    ?= samples.png
ARGS   ?=
WORKERS ?= 2
# Nothing may put the checkout on sys.path (see CONTRIBUTING.md, "Names").
export PYTHONSAFEPATH := 1

PACKAGE_DIRS := $(shell find engine kernels benchmarks -type d -not -name __pycache__)
NEEDS_GPU = $(BIN)/python -c "import sys, torch; \
	sys.exit(None if torch.cuda.is_available() else '$@ needs an NVIDIA GPU: torch sees none')"

.DEFAULT_GOAL := help
.PHONY: help sample test test-slow test-gpu lint bench bench-gpu clean

help: ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 12

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# One stamp per set of extras. A strict editable install is a tree of links to files, so it is
# renewed when the packaging files change and when a file comes or goes in a package's folder.
$(VENV)/installed-%: setup.py pyproject.toml $(PACKAGE_DIRS) | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check \
		--config-settings editable_mode=strict -e "$(if $(filter base,$*),.,.[$*])"
	@touch $@

sample: $(VENV)/installed-base ## draw samples.png with the bundled model
	$(BIN)/flashddpm sample --out $(OUT) $(ARGS)

# Small tensors gain nothing from a second thread; a second process of tests does.
PYTEST = OMP_NUM_THREADS=1 $(BIN)/pytest -n $(WORKERS) --dist worksteal

test: $(VENV)/installed-test ## install and run the suite (no GPU needed)
	$(PYTEST) -m "not gpu and not slow" $(ARGS)

test-slow: $(VENV)/installed-test ## what takes minutes (no GPU needed)
	$(PYTEST) -m "slow and not gpu" $(ARGS)

test-gpu: $(VENV)/installed-test ## the suite on an NVIDIA GPU, gpu-marked tests included
	@$(NEEDS_GPU)
	$(BIN)/pytest $(ARGS)

lint: $(VENV)/installed-dev ## ruff, mypy, and what the rooms may import
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(VENV)/installed-bench ## benchmarks on the CPU, against diffusers
	$(BIN)/python -m flashddpm.benchmarks --device cpu $(ARGS)

bench-gpu: $(VENV)/installed-bench ## the same on an NVIDIA GPU; ARGS="--budget 480" for the headline
	@$(NEEDS_GPU)
	$(BIN)/python -m flashddpm.benchmarks --device cuda $(ARGS)

clean: ## remove the venv, builds and caches
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .hypothesis .ruff_cache .mypy_cache
	find . -name __pycache__ -prune -exec rm -rf {} +
