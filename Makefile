# The project's commands; `make help` lists them. All of them work in .venv, which they create and fill where needed.

# Python to create .venv with; any from 3.11 on. Choose another with `make PYTHON=/path/to/python ...`.
PYTHON ?= $(shell for name in python3.11 python3; do $$name -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	2>/dev/null && echo $$name && break; done)
BIN := .venv/bin

.PHONY: help train train-video test lint format clean

help:  ## list the commands
	@awk -F ':.*##' '/^[a-z-]+:.*##/ { printf "%-13s%s\n", $$1, $$2 }' Makefile

train: .venv/installed-train  ## train the default experiment, or another: make train ARGS="experiment=imagenet/nat_mini"
	$(BIN)/python train.py $(ARGS)

train-video: .venv/installed-train .venv/installed-video  ## train a small video model on moving digits
	$(BIN)/python train.py experiment=moving_digits $(ARGS)

# On tensors as small as those of tests, threads wait for each other longer than they work; processes do not.
test: lint  ## check style and types, then run all tests that need neither a GPU nor the internet
	OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses 2 -m "not gpu and not network" --durations=10

lint: .venv/installed-dev  ## check style and types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

format: .venv/installed-dev  ## put the source into the project's style
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

clean:  ## remove caches and built packages; keep .venv and runs
	rm -rf build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './.venv/*' -exec rm -rf {} +

# The package, editable, with one group of its optional dependencies; again whenever they change.
.venv/installed-%: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --constraint constraints.txt --editable '.[$*]'
	@touch $@

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "error: found no Python 3.11 or newer; install one, or name it: make PYTHON=..." >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: PYTHON=$(PYTHON) must be Python 3.11 or newer" >&2; exit 1; }
	$(PYTHON) -m venv .venv
# From 25.2 on pip resumes a download that breaks off; Python 3.11 ships 23, which gives up on it.
	$(BIN)/python -m pip install --constraint constraints.txt --upgrade pip
