# People and CI run the same commands. `make` alone prints this list.
PYTHON ?= python3
BIN := .venv/bin
export RAY_USAGE_STATS_ENABLED := 0
export MLFLOW_DISABLE_TELEMETRY := true
# else each of the many processes that tests start would compile the project again
unexport PYTHONDONTWRITEBYTECODE
# Fast tests wait for a third of their time, so there is one process more than CPUs; of the slow ones the longest begin first.
WORKERS := $(shell n=$$(nproc); echo $$((n < 8 ? n + 1 : 8)))
LONGEST := $(foreach name,cluster servers slurm experiment tuner,tests/test_$(name).py)
OTHERS := $(filter-out $(LONGEST),$(wildcard tests/test_*.py))

.DEFAULT_GOAL := help
.PHONY: help setup run test test-all gpu-report compat check lint types imports format clean

help:  ## print this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-11s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: .venv/ready  ## make .venv and install everything into it (minutes, once; 7 GB)

.venv/ready: pyproject.toml
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'Python 3.11 or later is needed: make PYTHON=python3.11')"
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	touch $@

run: setup  ## run the quick grid offline: 32 trials, a ranked table in minutes
	$(BIN)/python -m grid.run --grid smoke

test: setup  ## run the fast tests, one real Ray run and one real kill among them (minutes)
	@# bits are compared, so these train on the CPU; those of a GPU see it, and skip where there is none
	CUDA_VISIBLE_DEVICES= $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile -m "not slow and not gpu"
	$(BIN)/python -m pytest -q -m gpu tests/test_gpu.py

test-all: test  ## run all tests: clusters, failures, browser, notebooks, wheel (half an hour)
	@# each starts processes of its own, so more at once would only wait for one another
	@$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m slow $(LONGEST) $(OTHERS)

gpu-report: setup  ## on a machine with a GPU: its tests and step times, on one page (minutes)
	$(BIN)/python -m benchmarks.gpu_report

compat: setup  ## prove the lower bounds of all dependencies, and the newest Ray (half an hour, 1 GB)
	$(BIN)/python -m tests.compat

check: lint types imports  ## lint, types, imports

lint: setup  ## ruff: rules and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup  ## mypy --strict
	$(BIN)/mypy

imports: setup  ## which module may import which
	$(BIN)/lint-imports

format: setup  ## format, and fix what ruff can fix
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:  ## remove the environment and caches, not your results
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache *.egg-info
