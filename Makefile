# Needs python3 >= 3.10 and make; everything else goes into $(VENV).

PYTHON ?= python3
VENV ?= .venv
OUT ?= out/demo

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --no-input -q

.DEFAULT_GOAL := help
.PHONY: help demo test lint docs clean

help: ## list the targets
	@echo "make demo    draw ten flowers into $(OUT), say where the contact sheet is, and race"
	@echo "make test    ruff, mypy and pytest"
	@echo "make lint    ruff and mypy only"
	@echo "make docs    the pages of docs/ as a site, in build/site"
	@echo "make clean   remove caches and $(OUT) (not $(VENV))"

demo: $(VENV)/.installed
	@$(BIN)/bozzetto generate --model flowers --count 10 --seed 7 --out "$(OUT)"
	@echo "Contact sheet: $(abspath $(OUT))/sheet.png"
	@$(BIN)/python benchmarks/race.py

test: lint
	$(BIN)/python -m pytest -q -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(VENV)/.installed-dev
	$(BIN)/mkdocs build

clean:
	rm -rf "$(OUT)" .pytest_cache .mypy_cache .ruff_cache build dist
	find . -path "./$(VENV)" -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

# A virtual environment that was only half made would look finished to the next call.
$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "bozzetto needs Python 3.10 or newer (PYTHON=... picks another one)" >&2; exit 1; }
	@echo "Creating $(VENV) ..."
	@$(PYTHON) -m venv "$(VENV)" || { rm -rf "$(VENV)"; exit 1; }

$(VENV)/.installed: pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing bozzetto (PyTorch is the large part) ..."
	@$(PIP) install -c constraints.txt -e .
	@touch $@

$(VENV)/.installed-dev: pyproject.toml constraints.txt $(VENV)/.installed
	@echo "Installing the development tools ..."
	@$(PIP) install -c constraints.txt -e '.[dev]'
	@touch $@
