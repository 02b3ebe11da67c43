# `make demo` and `make test` do everything on a fresh machine: they build .venv, install into it, and run.

PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= constraints.txt
PYTEST_ARGS ?=

PY := $(VENV)/bin/python
INSTALLING := $(VENV)/.installing
INSTALLED := $(VENV)/.installed
# timm and open_clip bring torchvision, which must not stand beside a CPU build of torch: a folder of their own.
EXTERNAL := $(VENV)-external
# lmms-eval, without the hundred packages that the 13 tasks do not need, torchvision among them.
EVALUATION := $(VENV)-evaluation
# The model tests that transformers and PEFT ship, and what only they need.
UPSTREAM := .venv-upstream
# One thread per worker: more of them wait for each other, and the suite takes ten times as long.
PYTEST := OMP_NUM_THREADS=1 $(PY) -m pytest -q -n auto --maxprocesses 4 --dist worksteal

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.PHONY: help venv lint format test test-all test-upstream test-versions docs demo clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-14s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

venv: $(INSTALLED) ## build .venv and install the project into it, editable, with all tools

# `.installing` stays behind only when an install was cut short; such a .venv cannot be trusted and is built anew.
$(INSTALLED): pyproject.toml $(CONSTRAINTS)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "'$(PYTHON)' is not Python 3.10 or newer; name one that is: make PYTHON=python3.12 ..."; exit 1; }
	@if [[ -e $(INSTALLING) ]] || ! $(PY) -m pip --version >/dev/null 2>&1; then \
		echo "creating $(VENV)"; \
		$(PYTHON) -m venv --clear $(VENV); \
	fi
	@echo "installing vision-remember and its tools into $(VENV); the first time takes some minutes"
	@trap 'exit 130' INT TERM; \
	touch $(INSTALLING); \
	$(PY) -m pip install -qq --constraint $(CONSTRAINTS) --editable '.[dev]' || { rm -f $(INSTALLING); exit 1; }; \
	touch $(INSTALLED); \
	rm -f $(INSTALLING)

lint: venv ## ruff (rules and format) and strict mypy
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

format: venv ## sort imports, mend what ruff can mend, format
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

$(VENV)-%/.installed: $(INSTALLED) tests/%/requirements.txt
	@rm -rf $(@D)
	@$(PY) -m pip install -qq --no-deps --target $(@D) --requirement tests/$*/requirements.txt
	@touch $@

test: venv $(EXTERNAL)/.installed $(EVALUATION)/.installed ## the tests, without those marked slow
	$(PYTEST) $(PYTEST_ARGS)
	PYTHONPATH=$(abspath $(EXTERNAL)) $(PYTEST) tests/external
	PYTHONPATH=$(abspath $(EVALUATION)) $(PYTEST) tests/evaluation

test-all: venv $(EXTERNAL)/.installed $(EVALUATION)/.installed ## all tests
	$(PYTEST) -m "" $(PYTEST_ARGS)
	PYTHONPATH=$(abspath $(EXTERNAL)) $(PYTEST) -m "" tests/external
	PYTHONPATH=$(abspath $(EVALUATION)) $(PYTEST) -m "" tests/evaluation

$(UPSTREAM)/.installed: $(INSTALLED)
	@$(PY) -m pip install -qq --no-deps --upgrade --target $(UPSTREAM)/lib parameterized==0.9.0
	@touch $@

test-upstream: venv $(UPSTREAM)/.installed ## the model tests of transformers and PEFT, plain and attached
	OMP_NUM_THREADS=1 PYTHONPATH=$(UPSTREAM)/lib $(PY) -m tests.upstream.run

test-versions: venv ## the tests with the oldest and the newest supported transformers
	$(PY) -m tests.run_versions

docs: venv ## the documentation site, in build/docs; every warning is an error
	$(PY) -m sphinx -q -W --keep-going -b html docs build/docs

demo: venv ## train and compare on rendered pages
	$(PY) -m examples.demo

clean: ## remove .venv, caches and build outputs
	rm -rf $(VENV) $(EXTERNAL) $(EVALUATION) $(UPSTREAM) .venv-versions build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
