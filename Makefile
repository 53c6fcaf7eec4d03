# Every target sets up what it needs in .venv first; the stamp makes the second call instant.
VENV   := .venv
PYTHON ?= python3
STAMP  := $(VENV)/.installed

# CI installs what was tested, file by file; everybody else what the ranges in pyproject.toml admit.
PINS   := $(if $(CONSTRAINTS),-c $(CONSTRAINTS))

.PHONY: dry-run check test test-slow test-cluster test-browser test-storage test-track test-deploy test-gpu lint setup clean

dry-run: setup          ## the main job: sweep the embedded digits, end in an ensemble
	$(VENV)/bin/python -m search.run

check: lint             ## lint and the fast tests, without Ray: two minutes
	$(VENV)/bin/python -m pytest -q -n 2 --dist loadfile -m fast

test: lint              ## everything that takes seconds, with real Ray
	$(VENV)/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test-deploy: setup      ## serving and exports: real servers, and clean processes that load what was written
	$(VENV)/bin/python -m pytest -m deploy -n 2 --dist loadfile

test-gpu: setup         ## what a CUDA GPU changes; skipped with a word where there is none
	$(VENV)/bin/python -m pytest -m gpu tests/gpu/test_training.py tests/gpu/test_sweep.py

test-slow: setup        ## fault tests that take minutes
	$(VENV)/bin/python -m pytest -m slow

test-cluster: setup     ## several Ray nodes on this machine: jobs, lost nodes, shared storage, launcher files
	command -v slurmd >/dev/null || (apt-get update && apt-get install -y slurm-wlm munge)
	$(VENV)/bin/python -m pytest -m cluster

test-browser: setup     ## the pages in a real, headless Chromium; installs Debian's if there is none
	command -v chromedriver >/dev/null || (apt-get update && apt-get install -y chromium chromium-driver)
	$(VENV)/bin/python -m pytest -m browser

test-storage: setup     ## a real PostgreSQL, started by the tests, and optuna-dashboard; installs what is missing
	ls /usr/lib/postgresql/*/bin/initdb >/dev/null 2>&1 || (apt-get update && apt-get install -y postgresql)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -e '.[storage]'
	$(VENV)/bin/python -m pytest -m storage

test-track: setup       ## a real MLflow server, TensorBoard's event files, wandb offline; installs what is missing
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -e '.[mlflow,tensorboard,wandb]'
	$(VENV)/bin/python -m pytest -m track

lint: setup
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

setup: $(STAMP)

$(STAMP): pyproject.toml
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check $(PINS) -e '.[offline,explore,export,serve,hf,heif,dev]'
	touch $(STAMP)

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache
