# make setup        .venv with the locked CPU set and the project
# make quickstart   SmolLM2-135M through SFT, preferences, reward model, PPO and DPO; report in runs/quickstart
# make test         the whole CPU test suite, after lint
# TORCH_INDEX=URL   where pip finds CPU builds of torch, if the default index has none (see README)

PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip --disable-pip-version-check
INDEX := $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))
RUN ?= recipes/quickstart.yaml

.PHONY: setup quickstart test lint bench clean

setup: $(VENV)/.cpu

$(VENV)/.cpu: cluster/requirements-cpu.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --no-deps $(INDEX) -r cluster/requirements-cpu.txt
	$(PIP) install --quiet --no-deps --no-build-isolation --editable .
	touch $@

$(VENV)/.dev: $(VENV)/.cpu cluster/requirements-dev.txt
	$(PIP) install --quiet --no-deps -r cluster/requirements-dev.txt
	touch $@

quickstart: setup
	$(BIN)/rlhf run $(RUN)

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint
	$(BIN)/python -m pytest

bench: $(VENV)/.dev
	$(BIN)/python -m tests.benchmarks.run

clean:
	rm -rf $(VENV) build *.egg-info
