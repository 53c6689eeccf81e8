# Every target does its own set-up: a fresh clone needs Python 3.10+ and nothing else.
PYTHON ?= python3
JOBS ?= 2
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check -q
QUIET_ENV := HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
SINGLE_THREADED := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1
PYTEST := $(QUIET_ENV) $(SINGLE_THREADED) $(BIN)/python -m pytest
TINY := fixtures/tinyllama

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-full test-times test-oracles lint format gpu-check bench clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

setup: $(VENV)/.installed ## create .venv with everything the other targets need

$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install -c constraints.txt torch
	$(PIP) install -c constraints.txt -e '.[dev]'
	touch $@

$(VENV)/.oracles: $(VENV)/.installed
	$(PIP) install -c constraints.txt -e '.[oracles]'
	touch $@

demo: $(VENV)/.installed ## combine two adapters and verify the result in a real model
	rm -rf build/demo
	mkdir -p build/demo
	$(QUIET_ENV) $(BIN)/adaptmerge combine $(TINY)/lora-r8-shakespeare $(TINY)/lora-r8-cheaders \
	  --base $(TINY)/base -o build/demo/merged
	$(QUIET_ENV) $(BIN)/adaptmerge verify build/demo/merged --base $(TINY)/base

test: $(VENV)/.installed ## run the tests that every change must pass
	$(PYTEST) -q -n $(JOBS) $(ARGS)

test-full: $(VENV)/.installed ## run them with all variants and examples
	$(PYTEST) -q -n $(JOBS) -m 'not oracle' --hypothesis-profile=thorough $(ARGS)

test-times: $(VENV)/.installed ## run them and fail where one takes too long
	CHECK_TIMES=1 $(PYTEST) -q -n $(JOBS) $(ARGS)

test-oracles: $(VENV)/.oracles ## compare with other frameworks' own runtimes
	$(QUIET_ENV) $(BIN)/python -m pytest -q -m oracle $(ARGS)

lint: $(VENV)/.installed ## ruff check, ruff format --check, mypy --strict
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.installed ## let ruff sort imports and format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

gpu-check: $(VENV)/.installed ## verify on an accelerator what is verified on the CPU, and time both
	$(PYTEST) -q tests/gpu
	$(QUIET_ENV) $(BIN)/python -m bench.gpu $(ARGS)

bench: $(VENV)/.installed ## measure speed and memory (docs/performance.md)
	$(QUIET_ENV) $(BIN)/python -m bench $(ARGS)

clean: ## remove the virtual environment, build outputs and caches
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find adaptmerge tests fixtures -name __pycache__ -prune -exec rm -rf {} +
