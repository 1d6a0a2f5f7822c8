# Needs git, make and Python 3.11 or newer; everything else is installed into .venv.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-builtin-rules --no-print-directory

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --no-input install -q -c constraints.txt
# the newest Python that torch has wheels for; set PYTHON to choose another
PYTHON ?= $(shell for v in 3.14 3.13 3.12 3.11 3 ""; do \
  command -v python$$v >/dev/null 2>&1 && \
  python$$v -c 'import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 14))' 2>/dev/null && \
  { echo python$$v; break; }; done)
CODE := src tests benchmarks examples scripts
FOUND = $(wildcard $(CODE))

.PHONY: help test pytest lint style floors types pages format docs bench demo clean

help: ## list the targets
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /\1\t/' | expand -t 12

test: lint pytest ## install what is needed, check the code, run all tests

pytest: $(VENV)/.dev
	$(BIN)/python -m pytest -n auto

# one target each, so that `make -k` reports the faults of all of them
lint: style floors types pages ## check style, floors, types and generated pages

style: $(VENV)/.dev
	$(BIN)/ruff check $(FOUND)
	$(BIN)/ruff format --check $(FOUND)

floors: $(VENV)/.dev
	$(BIN)/lint-imports

types: $(VENV)/.dev
	$(BIN)/basedpyright --pythonpath $(BIN)/python

pages: $(VENV)/.dev
	$(BIN)/python scripts/generate_docs.py --check

format: $(VENV)/.dev ## put the code into the house format and the generated pages up to date
	$(BIN)/ruff check --fix $(FOUND)
	$(BIN)/ruff format $(FOUND)
	$(BIN)/python scripts/generate_docs.py

docs: $(VENV)/.dev ## build the site into site/
	$(BIN)/python scripts/generate_docs.py
	$(BIN)/mkdocs build --strict --quiet

bench: $(VENV)/.dev ## measure the micro benchmarks (ratios within one run)
	@for file in benchmarks/micro/[!_]*.py; do echo "$$file"; $(BIN)/python "$$file"; done

demo: $(VENV)/.runtime ## fine-tune, compare, merge, export and serve on a small bundled model
	$(BIN)/modicum demo

clean: ## remove everything that was built or installed here
	rm -rf $(VENV) site dist demo-output .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "modicum needs Python 3.11 to 3.14 with the venv module (on Debian and Ubuntu:" \
	  "the package python3-venv); none was found. Install one, or say which: make PYTHON=/path/to/python" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

# torch first and by itself: it is by far the largest part, and a failure names it
$(VENV)/.runtime: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) torch
	$(PIP) -e '.[serve]'
	@touch $@

$(VENV)/.dev: $(VENV)/.runtime
	$(PIP) -e '.[dev]'
	@touch $@
