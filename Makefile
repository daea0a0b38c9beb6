# GaPO-Lite. `make help` lists what there is.

# The first Python 3.12 or 3.11 that runs (a name on the PATH may be an empty shim).
IS_FIT = import sys, ensurepip, venv; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))
PYTHON ?= $(shell for p in python3.12 python3.11 python3; do \
	$$p -c '$(IS_FIT)' >/dev/null 2>&1 && echo $$p && break; done)
BIN := .venv/bin

.DEFAULT_GOAL := help
.PHONY: help setup run demo test test-gpu check format bench browser clean

help: ## List the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10

setup: .venv/.ready ## Make .venv with everything that training needs

run: setup ## Open the page on http://127.0.0.1:7860 (ARGS="--port 7861 --data-dir my-data")
	$(BIN)/python -m app --open $(ARGS)

demo: setup ## Train the embedded model with GaPO in 4 bits (CPU or GPU) and show what changed
	$(BIN)/gapo-lite demo

test: check browser ## Set up, check and run all tests
	$(BIN)/python -m pytest -n 2 --dist loadfile
	$(MAKE) test-gpu

test-gpu: .venv/.ready-dev ## Run tests/gpu: on this machine's GPU, else on one emulated in host memory (needs g++)
	PYTHONPATH=tests/hostcuda/site $(BIN)/python -m pytest -n 2 --dist load tests/gpu

check: .venv/.ready-dev ## Lint, formatting and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: .venv/.ready-dev ## Format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: .venv/.ready-dev ## Print README's figures for scoring and the training step (CPU, about 20 minutes)
	$(BIN)/python benchmarks/ef_scoring.py
	$(BIN)/python benchmarks/training_step.py

browser: ## Debian's Chromium for the tests of the page, where it is missing and can be installed
	@command -v chromium >/dev/null || command -v chromium-browser >/dev/null || \
	{ test "$$(id -u)" = 0 && apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium; } || \
	echo "There is no Chromium: the tests of the page are skipped (apt-get install chromium)."

clean: ## Remove .venv and caches
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache .hypothesis

# torch comes first and alone: given a range, or as a dependency of others, pip may take another, larger build.
.venv/.ready: requirements.txt requirements-embedded.txt pyproject.toml
	@"$(PYTHON)" -c '$(IS_FIT)' || { echo "Python 3.11 or 3.12 is needed: make PYTHON=/path/to/python3.12"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "$$(grep '^torch==' requirements.txt)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -r requirements-embedded.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	touch $@

.venv/.ready-dev: .venv/.ready requirements-dev.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt -r requirements-dev.txt
	touch $@
