# What one does with a clone of tunerkit. `make help` lists it; only python, git and make are needed.

PYTHON ?= python3
# Two workers with one thread each finish sooner than one worker with two threads: the tests' models are tiny.
WORKERS ?= 2
PYTEST_ARGS ?=
BENCHMARK_ARGS ?=
DEMO_OUT ?= out/demo

BIN := .venv/bin
CORE_BIN := .venv-core/bin
PROJECTS := pyproject.toml plugins/lora/pyproject.toml plugins/adalora/pyproject.toml
PLUGINS := -e plugins/lora -e plugins/adalora
PYTEST := -m pytest -n $(WORKERS) $(PYTEST_ARGS)
ONE_THREAD := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false
DEMO_READY := .venv/.demo-ready
DEV_READY := .venv/.dev-ready
CORE_READY := .venv-core/.ready

.DEFAULT_GOAL := help
.PHONY: help demo test test-core test-all check format docs benchmark clean

help: ## list the targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 12

# PASSIVE: threads that wait for each other by spinning take the cores away from whatever else the machine does.
demo: $(DEMO_READY) ## fine-tune MiniLM on movie sentences with AdaLoRA
	OMP_WAIT_POLICY=PASSIVE $(BIN)/tunerkit train --out $(DEMO_OUT)

test: test-core test-all ## run the whole test suite

test-core: $(CORE_READY) ## core's tests, with no plugin installed
	$(ONE_THREAD) $(CORE_BIN)/python $(PYTEST) tests

test-all: $(DEV_READY) ## core's and the plugins' tests, with everything installed
	$(ONE_THREAD) $(BIN)/python $(PYTEST) tests $(wildcard plugins/*/tests)

check: $(DEV_READY) ## lint, formatting and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mypy -p tunerkit_lora -p tunerkit_adalora

format: $(DEV_READY) ## format the code, and mend what ruff can mend
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: $(DEV_READY) ## build the documentation into site/
	$(BIN)/mkdocs build --strict

benchmark: $(DEV_READY) ## measure speed and memory beside PEFT's, into out/speed
	$(BIN)/python -m benchmarks.speed $(BENCHMARK_ARGS)

clean: ## remove what the other targets made
	rm -rf .venv .venv-core site dist build .cache .mypy_cache .ruff_cache .pytest_cache .hypothesis

# A venv made by hand is kept; what is missing from it gets installed.
$(BIN)/python:
	$(PYTHON) -m venv .venv

$(CORE_BIN)/python:
	$(PYTHON) -m venv .venv-core

$(DEMO_READY): $(PROJECTS) | $(BIN)/python
	$(BIN)/python -m pip install -e ".[demo]" $(PLUGINS)
	touch $@

$(DEV_READY): $(PROJECTS) | $(BIN)/python
	$(BIN)/python -m pip install -e ".[dev]" $(PLUGINS)
	touch $@ $(DEMO_READY)

# Everything but the plugins: what passes here does not lean on a method.
$(CORE_READY): pyproject.toml | $(CORE_BIN)/python
	$(CORE_BIN)/python -m pip install -e ".[cli,hf,plot,test]"
	touch $@
