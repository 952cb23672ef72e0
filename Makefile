# Every target creates .venv from constraints.txt when it is not there, with plain pip.
PYTHON ?= python3
BIN := .venv/bin
DEMO ?= demo
READY := .venv/.installed

.PHONY: demo test lint bench server clean

demo: $(READY)
	$(BIN)/onboard sample --workspace $(DEMO)
	$(BIN)/python -m tests.demo $(DEMO)

test: $(READY)
	$(BIN)/pytest

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(READY)
	$(BIN)/python -m tests.bench

server: $(READY)
	$(BIN)/onboard server

clean:
	rm -rf .venv build demo *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[bench,test]'
	touch $@
