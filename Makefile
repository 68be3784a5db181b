# Every target does its own set-up: a virtual environment in .venv with pinned dependencies.
# Needs Python 3.11 or later, make and the package index. Another interpreter: make test PYTHON=python3.12

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
VERSION := $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])')
CONSTRAINTS := $(wildcard constraints/python$(VERSION).txt)
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check $(if $(CONSTRAINTS),--constraint $(CONSTRAINTS))
WORKDIR ?= runs/quickstart
CHAT_WORKDIR ?= runs/chat
WORKERS ?= 2
ORACLES := tests/test_finetune.py tests/test_evaluate.py tests/model tests/data/tokenization/test_tokenizer.py tests/data/tokenization/test_huggingface.py \
  tests/data/sources/test_hub.py tests/evaluation/test_harness.py tests/objectives/test_preference.py tests/generation/test_beam.py \
  tests/artifacts/test_models.py tests/server/test_clients.py tests/training/test_sinks.py

# The oldest instruction set that JAX runs on, where there is a choice
ISA := $(if $(filter x86_64 amd64,$(shell uname -m)),--xla_cpu_max_isa=SSE4_2)

.PHONY: help quickstart chat-quickstart setup test test-elsewhere test-slow test-oracles lint golden torture bench bench-scale clean
.DEFAULT_GOAL := help

help:  ## what can be done
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-16s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "gptjax needs Python 3.11 or later; this is $(VERSION). Try: make PYTHON=python3.12 ..."; exit 2; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.base: pyproject.toml $(CONSTRAINTS) | $(BIN)/python
	$(INSTALL) --editable .
	@touch $@

$(VENV)/.dev: pyproject.toml $(CONSTRAINTS) | $(BIN)/python
	$(INSTALL) --editable '.[dev]'
	@touch $@ $(VENV)/.base

$(VENV)/.oracles: $(VENV)/.dev
	$(INSTALL) --editable '.[dev,oracles]'
	@touch $@

setup: $(VENV)/.dev  ## the virtual environment with everything the tests need

quickstart: $(VENV)/.base  ## train, evaluate and sample a small GPT on the documentation of Python (5 minutes)
	$(BIN)/python -m gptjax.train --config=configs/quickstart.py --workdir=$(WORKDIR)
	$(BIN)/python -m gptjax.evaluate --workdir=$(WORKDIR)
	$(BIN)/python -m gptjax.generate --workdir=$(WORKDIR) --prompt='' --num_samples=3 --temperature=0.8 --max_new_tokens=80
	@echo
	@echo 'Next:'
	@echo "  $(BIN)/gptjax generate --workdir=$(WORKDIR) --prompt='Question: What does json.dumps do?'"
	@echo "  $(BIN)/gptjax train --config=configs/quickstart.py --workdir=runs/mine --config.data.source='text:my/*.txt'"
	@echo '  open $(WORKDIR)/report.html'

chat-quickstart: $(VENV)/.base  ## a chat model from nothing: text, dialogues, preferences, rewards (7 minutes)
	$(BIN)/python tools/chat_quickstart.py --workdir=$(CHAT_WORKDIR)

test: $(VENV)/.dev lint  ## the test suite (without the slow tests)
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m 'not slow'

test-elsewhere: $(VENV)/.dev  ## the test suite as on another machine: an older processor, no locale, a narrow terminal, long paths
	@top=$$(mktemp -d) && trap 'rm -rf "$$top"' EXIT && long=$$top/$$(printf 'a-long-path-%.0s' 1 2 3 4 5 6 7 8 9 10) && mkdir "$$long" && \
		XLA_FLAGS="$(ISA) $$XLA_FLAGS" LC_ALL=C COLUMNS=40 TMPDIR="$$long" \
		$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m 'not slow'

test-slow: $(VENV)/.dev  ## the tests that take minutes
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m slow

test-oracles: $(VENV)/.oracles  ## what is checked against torch, transformers, PEFT and lm-eval (installs them)
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m 'not slow' $(ORACLES)

lint: $(VENV)/.dev  ## ruff and the import contract
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-cache

golden: $(VENV)/.dev  ## write the golden files of tests/golden anew
	$(BIN)/python -m pytest tests/test_golden.py --update-golden -q

torture: $(VENV)/.dev  ## kills, signals, full disks, damaged files and bad values at every stage (a quarter of an hour)
	mkdir -p runs
	$(BIN)/python -m tools.torture --seed=0 --kills=100 --signals=50 --disks=50 --flips=50 --workers=$(WORKERS) \
		--output=runs/torture.json
	$(BIN)/python tools/bad_inputs.py --number=20000 --seed=0

bench: $(VENV)/.dev  ## the speed of this machine: training step, start-up, decoding, preparing data
	$(BIN)/python tools/bench_cpu.py
	$(BIN)/python tools/bench_decode.py
	$(BIN)/python tools/bench_prepare.py
	$(BIN)/python tools/bench_stream.py

bench-scale: $(VENV)/.dev  ## how cost grows with depth, batch, context, mesh and data
	$(BIN)/python tools/bench_scale.py

clean:  ## remove the virtual environment and the runs
	rm -rf $(VENV) runs
