# Three words for a newcomer: `make demo`, `make test`, `make check`. Each sets up what it needs.

.DEFAULT_GOAL := help
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
# The native build and the package installation do not need each other: together they take a minute less.
MAKEFLAGS += --no-print-directory --jobs=2

PYTHON ?= python3
BIN := .venv/bin
# -qq drops pip's remarks about package locations that do not exist; what fails is still said.
PIP := $(BIN)/python -m pip -qq --disable-pip-version-check --no-input
MARKED := $(BIN)/python -m pytest --durations=10 -m

# Nothing this project starts reports home.
export DO_NOT_TRACK := true
export MLFLOW_DISABLE_TELEMETRY := true
export PREFECT_SERVER_ANALYTICS_ENABLED := false
export HF_HUB_DISABLE_TELEMETRY := 1

.PHONY: help install demo test test-pure test-tools test-flows test-services test-real check fix docs ui lock clean
.PHONY: llama-wheel

help:  ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-15s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: .venv/.project  ## Set up .venv: locked packages, llama.cpp from source, this project
	@$(BIN)/python infra/llama_cpp.py

.venv/.python:
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' \
		|| { echo "error: $(PYTHON) is not Python 3.11 or 3.12; say make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@echo "creating .venv"
	@$(PYTHON) -m venv --clear .venv
	@$(PIP) install pip==26.3 setuptools==84.2.1
	@touch $@

.venv/.requirements: requirements.lock .venv/.python
	@echo "installing the packages of requirements.lock (about 2 minutes)"
	@$(PIP) install -r requirements.lock
	@touch $@

llama-wheel: .venv/.python
	@$(BIN)/python infra/llama_cpp.py --wheel >/dev/null

.venv/.project: pyproject.toml .venv/.requirements | llama-wheel
	@$(PIP) install --no-deps --no-build-isolation -e .
	@touch $@

demo: install  ## Rebuild SmolLM2-135M, release its GGUF variants, print the result and where to look
	@$(BIN)/python examples/smollm2.py
	@$(BIN)/modelmint release deployments/recipes/smollm2-135m.yaml
	@echo "Look around: make ui, $(BIN)/modelmint show, $(BIN)/modelmint store ls"

test: install  ## Run all tests
	@$(BIN)/python -m pytest --durations=10

test-pure: install  ## Values, laws and the store: seconds
	@$(MARKED) pure

test-tools: install  ## Real converters on tiny models
	@$(MARKED) tools

test-flows: install  ## Whole releases under Prefect and MLflow
	@$(MARKED) flows

test-services: install  ## A real S3 server on loopback
	@$(MARKED) services

test-real: install  ## SmolLM2 from end to end
	@$(MARKED) real

check: install  ## Format, lint, types, layers: what must hold before a commit
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy --strict modelmint
	@$(BIN)/python -m pytest -q tests/test_layers.py

fix: install  ## Format and repair what ruff can
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

docs: install  ## Write docs/commands.md anew from the help of every command
	@$(BIN)/python infra/command_docs.py

ui: install  ## Start Prefect's and MLflow's servers on loopback, print their addresses
	@$(BIN)/modelmint ui

lock: .venv/.python llama-wheel  ## Resolve pyproject.toml's ranges anew into requirements.lock
	@infra/lock

clean:  ## Remove .venv and tool caches; store, mlruns and the built wheel stay
	@rm -rf .venv build *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
