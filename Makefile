# make help prints the targets. Variables, all optional:
#   PYTHON=python3.12    the interpreter that makes the environment (3.11 and 3.12 have pinned versions)
#   VENV=.venv-3.12      where the environment lives
#   PYTEST_ARGS='-k scan'   what else pytest is given by `make test` and `make test-quick`
#   DEMO_ARGS='train.steps=50'   what else the demo's training is given

PYTHON ?= python3
VENV ?= .venv
PYTEST_ARGS ?=
DEMO_ARGS ?=
DEMO_DIR := outputs/demo
# Every layout on real ranks: what another line of Megatron-core could break.
QUICK_DISTRIBUTED ?= tests/distributed/test_layout_parity.py

BIN := $(VENV)/bin
PYTHON_VERSION := $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)
CONSTRAINTS := constraints/$(PYTHON_VERSION).txt
STAMP := $(VENV)/.installed-$(PYTHON_VERSION)

# Ranks share the machine's cores: one thread each unless the caller says otherwise.
export OMP_NUM_THREADS ?= 1
export PYTHONUNBUFFERED := 1

.DEFAULT_GOAL := help
.PHONY: help setup setup-gpu demo test test-quick lint format bench gpu-trial clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

setup: $(STAMP) ## .venv with everything pinned (does nothing when up to date)
	@:

$(STAMP): pyproject.toml $(wildcard constraints/*.txt)
	@test -n "$(PYTHON_VERSION)" || { echo "setup: '$(PYTHON)' does not run; choose another with PYTHON=..." >&2; exit 2; }
	@test -f $(CONSTRAINTS) || { echo "setup: '$(PYTHON)' is Python $(PYTHON_VERSION); versions are pinned for $(patsubst constraints/%.txt,%,$(wildcard constraints/*.txt)): choose one with PYTHON=..." >&2; exit 2; }
	@if test -x $(BIN)/python; then \
	  has=$$($(BIN)/python -c 'import sys; print("%d.%d" % sys.version_info[:2])'); \
	  test "$$has" = "$(PYTHON_VERSION)" || { echo "setup: $(VENV) holds Python $$has, '$(PYTHON)' is $(PYTHON_VERSION): choose another folder with VENV=..." >&2; exit 2; }; \
	fi
	@echo "== environment: $(VENV), Python $(PYTHON_VERSION), versions of $(CONSTRAINTS) (a minute; longer where torch comes with CUDA)"
	@start=$$(date +%s); set -e; \
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV); \
	$(BIN)/python -m pip install -qq --disable-pip-version-check -c $(CONSTRAINTS) -e '.[dev,eval,hf]'; \
	touch $@; echo "   $$(( $$(date +%s) - start )) s"

setup-gpu: setup ## Transformer Engine as well, built against this environment's torch
	$(BIN)/python -m pip install --disable-pip-version-check -c $(CONSTRAINTS) -e '.[gpu-build]'
	$(BIN)/python -m pip install --disable-pip-version-check -c $(CONSTRAINTS) --no-build-isolation -e '.[gpu]'

# Each step prints its name and its seconds.
comma := ,
define step
	@echo "== $(1)"; start=$$(date +%s); $(2); status=$$?; echo "   $$(( $$(date +%s) - start )) s"; exit $$status
endef

demo: setup ## three minutes from a fresh clone to loss by position, fast weights on and off; 2 ranks
	@rm -rf $(DEMO_DIR)
	$(call step,training: +experiment=demo on the standard library$(comma) 2 ranks share every sequence,$(BIN)/torchrun --standalone --nproc-per-node 2 launch/pretrain.py +experiment=demo parallel.cp=2 $(DEMO_ARGS))
	$(call step,evaluation: held-out files$(comma) the same weights with fast weights on and off,$(BIN)/python tools/evaluate.py task=perplexity checkpoint=$(DEMO_DIR) perplexity.rows=48 perplexity.bins=8)
	@echo "== done. Everything is in $(DEMO_DIR)/: evaluation/perplexity.png (loss by position), loss.png (loss by step), metrics.jsonl (one line a step), config.yaml (the whole configuration), checkpoints/latest (the model)"
	@echo "   next: $(BIN)/python tools/generate.py checkpoint=$(DEMO_DIR) prompt='def main(' temperature=0.7"

test: lint ## the whole CPU suite: linter, types, import directions, every test
	$(call step,tests,$(BIN)/python -m pytest $(PYTEST_ARGS))

test-quick: setup ## unit tests and one distributed file (QUICK_DISTRIBUTED=...)
	$(call step,unit tests and $(QUICK_DISTRIBUTED),$(BIN)/python -m pytest -m 'not slow' tests/unit $(QUICK_DISTRIBUTED) $(PYTEST_ARGS))

lint: setup ## style, types and import directions, without the tests
	$(call step,ruff check,$(BIN)/ruff check .)
	$(call step,ruff format,$(BIN)/ruff format --check .)
	$(call step,mypy,$(BIN)/mypy)
	$(call step,import directions,$(BIN)/lint-imports --no-cache)

format: setup ## rewrite the code in the project's format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

gpu-trial: setup ## everything that only a GPU can say, in stages (docs/gpu-trial.md)
	$(BIN)/python tools/gpu_trial.py

bench: setup ## the fast-weight layer against the materialising formulation and the plain MLP
	$(BIN)/python tools/benchmark.py fast-weight-layer

clean: ## caches and the demo's outputs; environments and other runs stay
	rm -rf $(DEMO_DIR) .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache build *.egg-info
	find megatron_ttt launch tools tests -name __pycache__ -type d -prune -exec rm -rf {} +
