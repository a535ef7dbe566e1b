# Every target does its own set-up: a virtual environment and the install, redone when pyproject.toml changes.
# To use an environment of your own: make test PYTHON=python
VENV := .venv
PYTHON := $(VENV)/bin/python
READY := $(if $(filter $(VENV)/%,$(PYTHON)),$(VENV)/.installed)
SOURCES := aligndet_hf benchmarks scripts tests

.PHONY: demo test bench style quality clean

demo: $(READY)  ## the whole journey on generated images, in minutes: writes demo_output/
	$(PYTHON) scripts/demo.py

test: $(READY)  ## the test suite; TESTS="tests/test_cli.py -k help" runs a part
	$(PYTHON) -m pytest -n auto --dist loadfile --no-loadscope-reorder $(TESTS)

bench: $(READY)  ## the claims about speed, in a quarter of an hour on a CPU: writes benchmarks/results/
	for name in contrastive criterion ema views step; do $(PYTHON) benchmarks/$$name.py || exit 1; done

style: $(READY)  ## format, and fix what ruff can fix
	$(PYTHON) -m ruff format $(SOURCES)
	$(PYTHON) -m ruff check --fix $(SOURCES)

quality: $(READY)  ## check what `make style` would change, and the types of the public face
	$(PYTHON) -m ruff format --check $(SOURCES)
	$(PYTHON) -m ruff check $(SOURCES)
	$(PYTHON) -m mypy

clean:
	rm -rf $(VENV) demo_output build dist *.egg-info

$(VENV)/.installed: pyproject.toml
	python3 -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --upgrade pip
	$(VENV)/bin/python -m pip install --quiet --editable ".[dev]"
	touch $@
