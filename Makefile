SHELL := /bin/bash
.SHELLFLAGS := -eo pipefail -c

PYTHON ?= $(shell python3.11 -c 'print("python3.11")' 2>/dev/null || echo python3)
BIN := .venv/bin

.PHONY: .venv test lint demo clean

.venv: .venv/.done

.venv/.done: pyproject.toml constraints.txt
	@echo "Making .venv with $(PYTHON): a few minutes and some gigabytes"
	@$(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --no-input --progress-bar off -c constraints.txt -e '.[dev]' \
		| sed -unE '/[MG]B\)$$|^Installing|^Successfully/s/^(.{1,120}).*/\1/p'
	@touch $@

test: .venv
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 8 --dist worksteal

lint: .venv
	$(BIN)/python -m ruff check
	$(BIN)/python -m ruff format --check
	$(BIN)/python -m mypy

demo: .venv
	$(BIN)/rtb-inverse fit --config tasks/inpainting_box.yaml
	$(BIN)/rtb-inverse test --config tasks/inpainting_box.yaml

clean:
	rm -rf build *.egg-info .pytest_cache .mypy_cache .ruff_cache
	find . -path ./.venv -prune -o -name __pycache__ -prune -exec rm -rf {} +
