# Two commands: `make report` shows what the harness is for, `make test` proves that it works.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Two workers on two cores: more threads each would only take turns.
export OMP_NUM_THREADS ?= 1

.PHONY: report test lint install clean

report: install
	$(BIN)/moe-harness report

test: lint
	$(BIN)/pytest -n 2

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[transformers,dev]'
	# 89 published config.json files; read as data, so nothing that the package needs is installed.
	$(BIN)/pip install --quiet --constraint constraints.txt --no-deps aiconfigurator-core
	touch $@

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .runs
