# `make install` makes .venv; every other target uses it. PYTHON chooses the interpreter (3.11 or newer).
PYTHON ?= python3
RUN ?= runs/quickstart
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: install quickstart test test-slow lint bench clean

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $(STAMP)

quickstart: $(STAMP)
	$(BIN)/sculpt prune --model resnet8 --dataset digits --budget 0.5 --run $(RUN)

test: $(STAMP)
	$(BIN)/python -m pytest -n auto --dist loadfile $(PYTEST_ARGS)

test-slow: $(STAMP)
	$(BIN)/python -m pytest -m slow $(PYTEST_ARGS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

bench: $(STAMP)
	$(BIN)/python -m benchmarks.run $(if $(DATA),--data $(DATA))

clean:
	rm -rf $(VENV) runs build dist .cache .pytest_cache .ruff_cache .hypothesis *.egg-info
