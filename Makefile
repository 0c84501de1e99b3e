# Every target does its own set-up: a machine with Python 3.11 and make needs nothing else.

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
TASKS_STAMP := $(VENV)/.installed-tasks

# The first of these that works, is new enough and can make virtual environments.
# Another one: make setup PYTHON=/path/to/python
PYTHON ?= $(shell for python in python3.11 python3; do \
	$$python -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' \
	>/dev/null 2>&1 && echo $$python && break; done)

# Tests run in this many processes of one thread each. Each starts with a half of the files, and
# whoever is done first takes from the end of the other's, so that neighbours share their fixtures.
TEST_PROCESSES ?= 2
PYTEST := $(BIN)/python -m pytest --numprocesses $(TEST_PROCESSES) --dist worksteal

# Models and texts come from packages, never from a model hub.
demo test test-all: export HF_HUB_OFFLINE := 1

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-all lint format clean

help:
	@echo "make setup     install blastnn and everything it needs into $(VENV)"
	@echo "make demo      compress SmolLM2-135M into runs/demo; continues where it was stopped"
	@echo "make test      lint, type check, and all tests but the slow ones"
	@echo "make test-all  the same with the slow tests; installs lm-eval for them"
	@echo "make lint      ruff (rules and layout) and mypy"
	@echo "make format    let ruff rewrite what it can"
	@echo "make clean     remove caches and build products; $(VENV) and runs/ stay"

setup: $(STAMP)

# torch goes first, at its pinned version: no later install can then choose another build of it.
# Without build isolation, the pinned setuptools builds blastnn and nothing else is fetched.
$(STAMP): pyproject.toml constraints.txt
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || test -n "$(PYTHON)" || { \
		echo "No Python 3.11 or newer with the venv module found." >&2; \
		echo "Install it (on Debian: python3.11 and python3.11-venv)," \
			"or name one: make setup PYTHON=/path/to/python" >&2; \
		exit 1; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --constraint constraints.txt torch setuptools
	$(BIN)/python -m pip install --constraint constraints.txt --no-build-isolation --editable '.[dev]'
	@touch $@

# lm-eval needs a minute and a half to install, which only the slow tests are worth.
$(TASKS_STAMP): $(STAMP)
	$(BIN)/python -m pip install --constraint constraints.txt --no-build-isolation --editable '.[tasks]'
	@touch $@

demo: setup
	$(BIN)/blastnn compress demo --output runs/demo --keep 0.8 --resume
	@echo "Open the report: $(CURDIR)/runs/demo/report.html"

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint
	$(PYTEST)

test-all: lint $(TASKS_STAMP)
	$(PYTEST) -m ""

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis .coverage htmlcov
	find . -path ./$(VENV) -prune -o -path ./runs -prune -o -name __pycache__ -type d \
		-exec rm -rf {} +
