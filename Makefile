# Everything a person or CI does here, one target each. `make help` lists them.
# Every target does its own set-up: the first run makes .venv (minutes), later runs reuse it (milliseconds).

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.NOTPARALLEL:
MAKEFLAGS += --no-print-directory

# The interpreter that .venv is made from: the first of these that fits. Choose another with `make setup PYTHON=...`.
FITS := import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	"$$p" -c '$(FITS)' 2>/dev/null && { echo "$$p"; exit; }; done; echo python3)
# Optional: the folder of published tables that `make foresight` reads; they are not part of this repository.
ANCHORS ?=
# Optional: anything, for `make foresight` to calibrate and to train a ladder on this machine.
MACHINE ?=
# Optional: an index that serves CPU builds of torch. Without it pip takes what its own settings offer.
TORCH_INDEX ?=
# Optional: ON builds the kernels for CUDA or fails, OFF those for the CPU alone; by default nvcc is used if it is here.
DLLM_CUDA ?= AUTO

BIN := .venv/bin
# .venv is made anew when the clone moves, and brought up to date when what it is made from changes; kernels are built in
# it, and again when their sources change.
PLACE := $(shell printf '%s' '$(CURDIR)' | cksum | cut -d' ' -f1)
CONTENT := $(shell cat pyproject.toml constraints.txt | cksum | cut -d' ' -f1)
MADE := .venv/.made-$(PLACE)
READY := .venv/.ready-$(PLACE)-$(CONTENT)
KERNELS := $(shell { find kernels -type f ! -name '*.md' | sort | xargs cat; echo '$(DLLM_CUDA)'; } | cksum | cut -d' ' -f1)
BUILT := .venv/.built-$(PLACE)-$(CONTENT)-$(KERNELS)
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt
BUILDS := --no-build-isolation --config-settings=build-dir=.venv/kernels --editable
TOOLS := pip setuptools scikit-build-core cmake ninja

##@ Use
.PHONY: help setup quickstart
help: ## list the targets
	@awk 'BEGIN { FS = ":.*## " } /^##@/ { printf "\n%s\n", substr($$0, 5) } \
		/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' Makefile

setup: $(BUILT) ## make .venv with everything that the tests need (TORCH_INDEX=<index of CPU wheels of torch>)
	@echo "setup: .venv is ready"

quickstart: setup ## train a small GPT on 8 CPU ranks: tensor x pipeline x data parallel with ZeRO-1
	@echo "quickstart: 8 ranks (pp 2 x dp 2 x tp 2, sequence parallel, ZeRO-1) on the Python standard library's source"
	@echo "quickstart: $(BIN)/dist-llm launch experiment=quickstart"
	@$(BIN)/dist-llm launch experiment=quickstart
	@echo "quickstart: see runs/quickstart/ (report.html, loss.png, metrics.jsonl, checkpoints/)"

##@ Check
.PHONY: test lint types imports ci full
test: setup ## run the tests (not those marked slow); only gpu tests may be skipped
	@$(BIN)/python -m pytest -m "not slow"

lint: setup ## ruff: rules and format
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

types: setup ## mypy --strict on the package
	@$(BIN)/mypy --strict

imports: setup ## import-linter: the layers
	@$(BIN)/lint-imports

ci: setup lint types imports test ## what CI runs

full: setup lint types imports ## everything: ci and the tests marked slow
	@$(BIN)/python -m pytest

##@ Make
.PHONY: docs bench foresight golden
docs: setup ## build docs/_build, check its links and run the code that it shows
	@$(BIN)/python docs/build.py

bench: setup ## time answers that train nothing and training steps over layouts, and measure how long pipelines idle
	@$(BIN)/python benchmarks/start.py
	@$(BIN)/python benchmarks/step.py
	@$(BIN)/python benchmarks/bubble.py

foresight: setup ## how good predictions are: against papers, tables (ANCHORS=<folder>), runs here (MACHINE=1: an hour)
	@$(BIN)/python -m benchmarks.foresight $(if $(ANCHORS),'$(ANCHORS)') $(if $(MACHINE),--machine)

golden: setup ## regenerate the golden curves and collectives of tests (review the diff)
	@$(BIN)/python tests/golden/regenerate.py
	@$(BIN)/python tests/collectives/regenerate.py

$(MADE):
	@"$(PYTHON)" -c '$(FITS)' 2>/dev/null || { \
		echo "setup: needs Python 3.11, 3.12 or 3.13; $(PYTHON) is $$("$(PYTHON)" --version 2>&1 || echo missing)" >&2; \
		echo "setup: name another with 'make setup PYTHON=/path/to/python3.11'" >&2; exit 1; }
	@echo "setup: making .venv with $$("$(PYTHON)" --version 2>&1)"
	@"$(PYTHON)" -m venv --clear .venv || { \
		echo "setup: $(PYTHON) cannot make virtual environments; install its venv module (Debian: python3-venv)" >&2; \
		exit 1; }
	@touch $@

# Build isolation is off so that the build tools too are those of constraints.txt; DeepSpeed's build asks for torch, too.
$(READY): | $(MADE)
	@echo "setup: installing torch"
	@$(PIP) $(TOOLS)
	@$(PIP) $(if $(TORCH_INDEX),--extra-index-url '$(TORCH_INDEX)') torch
	@echo "setup: installing dist_llm, the other engines and the tools that check it"
	@DLLM_CUDA='$(DLLM_CUDA)' $(PIP) $(BUILDS) '.[dev,deepspeed,megatron]'
	@rm -f .venv/.ready-*
	@touch $@ $(BUILT)

# The build folder stays, so that only what changed is compiled.
$(BUILT): | $(READY)
	@test -f $@ || { echo "setup: building the kernels"; DLLM_CUDA='$(DLLM_CUDA)' $(PIP) --no-deps $(BUILDS) .; }
	@rm -f .venv/.built-*
	@touch $@
