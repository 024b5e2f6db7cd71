# `make install` makes .venv; every other target uses it. PYTHON chooses the interpreter (3.11 or newer).
PYTHON ?= python3
RUN ?= runs/quickstart
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PYTEST := $(BIN)/python -m pytest -n auto --dist worksteal

.PHONY: install quickstart test test-slow test-all mutations lint package bench clean

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $(STAMP)

quickstart: $(STAMP)
	$(BIN)/sculpt prune --model resnet8 --dataset digits --budget 0.5 --run $(RUN)

# The fast tier: minutes. Tests marked slow are the long products of cases; both tiers together are everything.
test: $(STAMP)
	$(PYTEST) $(PYTEST_ARGS)

test-slow: $(STAMP)
	$(PYTEST) -m slow $(PYTEST_ARGS)

test-all: $(STAMP)
	$(PYTEST) -m '' $(PYTEST_ARGS)

# How many deliberate faults the fast tier notices.
mutations: $(STAMP)
	$(BIN)/python -m tests.mutations

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

# Builds the sdist and the wheel, and runs the quickstart of the wheel in an environment of its own outside the tree.
package: $(STAMP)
	rm -rf dist && $(BIN)/python -m build
	folder=$$(mktemp -d) && $(PYTHON) -m venv $$folder/venv \
	&& $$folder/venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt dist/*.whl \
	&& cd $$folder && venv/bin/sculpt prune --model resnet8 --dataset digits --budget 0.5 --run quickstart

bench: $(STAMP)
	$(BIN)/python -m benchmarks.run $(if $(DATA),--data $(DATA))

clean:
	rm -rf $(VENV) runs build dist .cache .pytest_cache .ruff_cache .hypothesis *.egg-info
