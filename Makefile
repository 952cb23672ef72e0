# Every target creates .venv from constraints.txt when it is not there, with plain pip.
PYTHON ?= python3
BIN := .venv/bin
DEMO ?= demo
READY := .venv/.installed

.PHONY: demo test lint bench server clean

# Exit code 3 says that a kernel waits for something upstream: the first model's does.
demo: $(READY)
	$(BIN)/onboard sample --workspace $(DEMO)
	$(BIN)/onboard run --workspace $(DEMO) --model-name qwen3-30b-a3b --hf-repo-id Qwen/Qwen3-30B-A3B \
	    --config $(DEMO)/configs/qwen3-30b-a3b.json || test $$? -eq 3
	$(BIN)/onboard run --workspace $(DEMO) --model-name minimax-m1 --hf-repo-id MiniMaxAI/MiniMax-M1-80k \
	    --config $(DEMO)/configs/minimax-m1.json --skip-workload
	@echo
	@echo "What was published: git -C $(DEMO)/outbox log; once more: .venv/bin/onboard status --workspace $(DEMO)"

# Files of tests side by side, one per core.
test: $(READY)
	$(BIN)/pytest --numprocesses auto --dist loadfile

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
