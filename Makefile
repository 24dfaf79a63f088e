# Two targets do all the set-up: `make quickstart` and `make test`. Both leave their environment in
# .venv and install again only when what they install from has changed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Without compiling: pip would compile the whole of torch and ray, most of which is never imported.
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile

# What is imported first is compiled then, and for all processes after: tests start hundreds.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: quickstart test test-slow test-formats test-trackers types pytest docs dist clean

quickstart: $(VENV)/installed
	$(BIN)/telescope run quickstart

test: $(VENV)/installed-test
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(MAKE) --no-print-directory --jobs 2 --output-sync types pytest

# Beside each other: the tests wait for Ray half of the time.
types:
	$(BIN)/mypy

# Three, on two cores: the one with the tests of Ray waits for processes most of the time.
pytest:
	$(BIN)/python -m pytest --numprocesses 3 --dist loadgroup

# Faults by the hundred: about half an hour. Prints how many trials were lost or run twice.
test-slow: $(VENV)/installed-test
	$(BIN)/python -m pytest -m slow --numprocesses 2 --dist loadgroup

# Exports built with the trainers' own packages. Those that are not installed are skipped, with the
# reason: pip install optax jax transformers accelerate deepspeed torchtitan megatron-core "lm-eval[hf]" kubernetes-validate
test-formats: $(VENV)/installed-test
	$(BIN)/python -m pytest -m formats tests/test_formats.py tests/test_containers.py

# Trackers' own libraries, offline. Those that are not installed are skipped, with the reason:
# pip install wandb mlflow-skinny trackio
test-trackers: $(VENV)/installed-test
	$(BIN)/python -m pytest -m trackers tests/test_trackers.py

# The site, in build/site/index.html. A link or a name that leads nowhere is an error.
docs: $(VENV)/installed-docs
	$(BIN)/mkdocs build --strict --quiet

# What is published, in dist/: the wheel is built from the sdist.
dist: $(VENV)/installed-test
	rm -rf dist
	$(BIN)/python -m build --no-isolation

$(VENV)/installed: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP_INSTALL) --constraint constraints.txt --editable .
	touch $@

$(VENV)/installed-test: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP_INSTALL) --constraint constraints.txt --editable ".[test]"
	touch $(VENV)/installed $(VENV)/installed-docs $@

$(VENV)/installed-docs: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP_INSTALL) --constraint constraints.txt --editable ".[docs]"
	touch $(VENV)/installed $@

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

clean:
	rm -rf $(VENV)
