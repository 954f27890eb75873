# make demo   a trained FLUX, dense and sparse, side by side in demo/compare.png
# make test   ruff and all tests

PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test clean

demo: .venv/installed
	@rm -rf demo && mkdir demo
	$(BIN)/chipmunk convert examples/mini-flux demo/mini-flux
	$(BIN)/chipmunk verify demo/mini-flux --sparsity mini-flux -o demo/compare.png --json demo/compare.json

test: .venv/tested
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m pytest -q

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit("%s is Python %d.%d: expected 3.11 or newer; try make PYTHON=python3.12 $(MAKECMDGOALS)" % (sys.executable, *sys.version_info[:2]) if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv .venv

.venv/installed: pyproject.toml | .venv/bin/python
	$(BIN)/python -m pip install --quiet --editable .
	@touch $@

.venv/tested: .venv/installed
	$(BIN)/python -m pip install --quiet --editable '.[test]'
	@touch $@

clean:
	rm -rf .venv demo
