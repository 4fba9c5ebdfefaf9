PYTHON ?= python3
# Threads that spin at every barrier make a shared machine several times slower.
export OMP_WAIT_POLICY ?= PASSIVE
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test endurance types clean

## demo: install and run the main job
demo: $(VENV)/.installed
	$(BIN)/clfed

## test: install with test extras, then lint, types and all tests
test: $(VENV)/.tested
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(MAKE) types
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

## endurance: kill real servers and nodes; some 20 minutes
endurance: $(VENV)/.tested
	$(BIN)/python -m pytest -m endurance -rP

# Type checkers cannot follow the mapping of strategies/ to clfed.strategies, so they get a copy
# that is laid out as the wheel is.
types:
	rm -rf build/types && mkdir -p build/types
	cp -r clfed build/types/clfed && cp -r strategies build/types/clfed/strategies
	cd build/types && $(abspath $(BIN))/mypy --config-file ../../pyproject.toml --cache-dir ../../.mypy_cache -p clfed

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: $(VENV)/bin/python pyproject.toml
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

$(VENV)/.tested: $(VENV)/bin/python pyproject.toml
	$(BIN)/python -m pip install --quiet --editable ".[test]"
	touch $@ $(VENV)/.installed

clean:
	rm -rf $(VENV) build dist *.egg-info
