# `make demo` and `make test` do all their own set-up in .venv; the second time there is nothing to set up.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
DEMO := runs/demo

.DEFAULT_GOAL := help
.PHONY: help demo test lint benchmark-deps clean

help: ## this list
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/'

# torch goes first and alone, so that the build the constraints and your pip settings choose is the one everything else finds.
$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch==2.13.0 hatchling
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-build-isolation -e '.[dev]'
	@touch $@

# Exit code 3 is a verdict other than "converged": the report says which, and that is what a demo is to show.
demo: $(READY) ## fit models/eight_schools.py and leave a report in runs/demo
	@if [ -e $(DEMO)/.made-by-make ]; then rm -rf $(DEMO); fi
	@if [ -e $(DEMO) ]; then echo "$(DEMO) was not made by 'make demo': move it away and run this again" >&2; exit 2; fi
	@mkdir -p $(DEMO) && touch $(DEMO)/.made-by-make
	$(BIN)/bbvi-conv fit models/eight_schools.py --family full-rank --out $(DEMO) || test $$? -eq 3
	@echo "The report is $(CURDIR)/$(DEMO)/report.html"

test: $(READY) ## style, types, tests and doctests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2

lint: $(READY) ## style and types only
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The peers come with --no-deps where their lists would pull in another torch or more than their models need.
benchmark-deps: $(READY) ## install the peers that benchmarks/ measures against
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt numpyro jax cloudpickle imageio scikit-learn
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-deps pythae zuko

clean: ## remove .venv, caches and build outputs (never runs/)
	rm -rf .venv build dist .mypy_cache .pytest_cache .ruff_cache
	find bbvi_conv models tests -name __pycache__ -type d -prune -exec rm -rf {} +
