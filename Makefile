# `make demo` and `make test` need Python 3.11 or newer with pip, and nothing else.
# Another interpreter: make PYTHON=python3.12 demo. pip reads its own environment variables and settings.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check --quiet
WORKERS ?= $(shell nproc)

.PHONY: demo test lint clean

# A million tokens of real text, needles hidden in it, and the answers.
demo: $(VENV)/.run-installed
	mkdir -p demo
	$(BIN)/drt needle --length 1M --task single,multikey --samples 1 --json demo/needle.jsonl --plot demo/needle.png

# One thread a process: two processes with two threads each on two cores slow each other tenfold.
test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS)

lint: $(VENV)/.test-installed
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

clean:
	rm -rf $(VENV) demo build dist

# Without a GPU torch comes first, alone and pinned: resolved together with the rest it brings gigabytes for CUDA.
$(VENV)/.torch-installed: constraints.txt
	$(PYTHON) -m venv $(VENV)
	command -v nvidia-smi > /dev/null || $(PIP) "$$(grep '^torch==' constraints.txt)"
	touch $@

$(VENV)/.run-installed: $(VENV)/.torch-installed pyproject.toml
	$(PIP) -c constraints.txt -e .
	touch $@

$(VENV)/.test-installed: $(VENV)/.torch-installed pyproject.toml
	$(PIP) -c constraints.txt -e '.[test]'
	touch $(VENV)/.run-installed $@
