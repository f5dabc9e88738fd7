# Two commands: `make demo` and `make test`. Each sets up all it needs in .venv first; so does `make docs`.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
CI_ARGS ?=

.PHONY: demo test test-slow check bench docs clean

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "treesurgeon needs Python >= 3.11; this is $$($(PYTHON) --version). Try: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 2; }
	$(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade 'pip>=25.1'
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable . --group dev
	@touch $@

demo: $(READY)
	$(BIN)/python -m treesurgeon.search.demo

test: $(READY)
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow"

test-slow: $(READY)
	$(BIN)/python -m pytest -n 2 --dist worksteal -m slow

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

bench: $(READY)
	$(BIN)/python benchmarks/throughput.py
	$(BIN)/python benchmarks/tracing.py
	$(BIN)/python benchmarks/overhead.py
	$(BIN)/python benchmarks/stepping.py
	$(BIN)/python benchmarks/certificate.py

docs: $(READY)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --group docs
	PYTHONPATH=.pkg NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --config-file docs/mkdocs.yml

clean:
	rm -rf $(VENV) runs build *.egg-info
