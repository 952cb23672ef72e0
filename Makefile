# Every target creates .venv from constraints.txt when it is not there, with plain pip.
PYTHON ?= python3
BIN := .venv/bin
DEMO ?= demo
READY := .venv/.installed

.PHONY: demo test lint bench server images up deploy down clean

# Exit code 3 says that a kernel waits for something upstream: the first model's does.
demo: $(READY)
	$(BIN)/onboard sample --workspace $(DEMO)
	$(BIN)/onboard run --workspace $(DEMO) --model-name qwen3-30b-a3b --hf-repo-id Qwen/Qwen3-30B-A3B \
	    --config $(DEMO)/configs/qwen3-30b-a3b.json || test $$? -eq 3
	$(BIN)/onboard run --workspace $(DEMO) --model-name minimax-m1 --hf-repo-id MiniMaxAI/MiniMax-M1-80k \
	    --config $(DEMO)/configs/minimax-m1.json --skip-workload
	@echo
	@echo "What was published: git -C $(DEMO)/outbox log; once more: .venv/bin/onboard status --workspace $(DEMO)"

# Files of tests side by side, in their order, which has the slowest first: those wait for containers
# half of their time, so there is one more at a time than there are cores.
test: $(READY)
	$(BIN)/pytest --numprocesses $$(($$(nproc) + 1)) --dist loadfile --no-loadscope-reorder

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(READY)
	$(BIN)/python -m tests.bench

server: $(READY)
	$(BIN)/onboard server

images:
	docker build --file docker/control.Dockerfile --tag onboard-control:latest .
	docker build --file docker/worker.Dockerfile --tag onboard-worker:latest .

# PostgreSQL, Redis, server, services and workers on this machine; folders and secrets under
# ONBOARD_HOME (/srv/onboard), made the first time.
up:
	deployments/prepare.sh
	docker compose --file deployments/compose.yaml up --detach --wait server services
	docker compose --file deployments/compose.yaml run --rm control-worker python deployments/bootstrap.py
	docker compose --file deployments/compose.yaml up --detach --wait

down:
	docker compose --file deployments/compose.yaml down

# To the server of PREFECT_API_URL; again, only what differs changes.
deploy: $(READY)
	$(BIN)/python deployments/bootstrap.py $(DEPLOY)

clean:
	rm -rf .venv build demo *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[bench,server,test]'
	touch $@
