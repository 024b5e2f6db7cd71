# `make install` makes .venv; every other target uses it. PYTHON chooses the interpreter (3.11 or newer).
PYTHON ?= python3
RUN ?= runs/quickstart
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PYTEST := $(BIN)/python -m pytest -n auto --dist worksteal

# The newest Python here that is newer than the oldest one that is supported. Names on the path may be pyenv's, of what is not active.
NEWEST_PYTHON ?= $(shell for minor in 14 13 12; do for python in python3.$$minor "$$(pyenv root 2>/dev/null)"/versions/3.$$minor.*/bin/python; do \
	"$$python" -c 'import ensurepip, venv' >/dev/null 2>&1 && echo "$$python" && exit; done; done)
NEWEST := .venv-newest
NEWEST_TESTS := $(addprefix tests/,tracing/test_trace.py tracing/test_picks.py tracing/test_sharded.py ir/test_high_level.py pruning/test_compact.py contracts/test_networks.py \
	scoring/test_evaluate.py agents/test_chain.py training/test_hold_zeros.py export/test_onnx.py export/test_stablehlo.py \
	agents/test_search.py::test_same_key_same_bits_other_key_other_search training/test_finetune.py::test_correctness_01_masked_weights_stay_zero)

.PHONY: install quickstart test test-slow test-all newest test-newest mutations lint package bench clean

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

# A part of the tests on the newest Python, JAX and everything else, in an environment of its own.
newest:
	@if [ -z "$(NEWEST_PYTHON)" ]; then echo "no Python 3.12 or newer here: name one with NEWEST_PYTHON=..."; \
	elif [ ! -e $(NEWEST)/.installed ] || [ pyproject.toml -nt $(NEWEST)/.installed ]; then \
		test -x $(NEWEST)/bin/python || "$(NEWEST_PYTHON)" -m venv $(NEWEST); \
		$(NEWEST)/bin/python -m pip install --quiet --disable-pip-version-check --upgrade -e '.[dev]' && touch $(NEWEST)/.installed; fi

test-newest: newest
	@if [ ! -e $(NEWEST)/.installed ]; then echo "test-newest is skipped"; exit 0; fi; \
	$(NEWEST)/bin/python -c "import sys, jax; print('Python', sys.version.split()[0], 'JAX', jax.__version__)" && \
	$(NEWEST)/bin/python -m pytest -n auto --dist worksteal $(NEWEST_TESTS) $(PYTEST_ARGS)

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
	rm -rf $(VENV) $(NEWEST) runs build dist .cache .pytest_cache .ruff_cache .hypothesis *.egg-info
