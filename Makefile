# The two commands of the README are `make demo` and `make test`; they are independent.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: help demo test slow lowest lint check docs benchmark clean
help:  ## Show this list.
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/'

# A stamp per set of packages, so that a second run installs nothing.
.venv/bin/python:
	$(PYTHON) -m venv .venv
.venv/.run: .venv/bin/python pyproject.toml
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable .
	@touch $@
.venv/.dev: .venv/bin/python pyproject.toml
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev,docs]'
	@touch $@ .venv/.run

demo: .venv/.run  ## Train on real handwritten digits (a few minutes on a laptop) and sample some.
	$(BIN)/lit-diffusion fit --config digits

# One process per core, with one thread each: the tensors are small, and more threads only wait. A
# process that has finished takes over tests of another one; neighbouring tests, which share fixtures,
# stay together. At most eight, since each needs two gigabytes. WORKERS=0 runs in one process.
WORKERS ?= auto
test: export OMP_NUM_THREADS ?= 1
PYTEST = $(BIN)/python -m pytest --numprocesses=$(WORKERS) --maxprocesses=8 --dist=worksteal
test: .venv/.dev  ## Run every test that is not marked slow, on all cores.
	$(PYTEST)
slow: export OMP_NUM_THREADS ?= 1
slow: .venv/.dev  ## Run the tests that are marked slow: whole programs, killed, on many ranks, installed.
	$(PYTEST) -m slow

# The lowest declared version of each dependency, in an environment of its own (3 GB, minutes).
LOWEST := .venv-lowest/bin
lowest: export OMP_NUM_THREADS ?= 1
lowest:  ## Run the mathematics, the command line and the security tests on the lowest versions.
	$(PYTHON) -m venv .venv-lowest
	$(LOWEST)/python tests/lowest_versions.py > .venv-lowest/constraints.txt
	$(LOWEST)/python -m pip install --quiet --disable-pip-version-check --editable . 'pytest>=8' \
	  --constraint .venv-lowest/constraints.txt
	$(LOWEST)/python -m pytest -W default tests/test_golden.py tests/test_contracts.py \
	  tests/test_samplers.py tests/test_pretrained.py tests/test_description.py \
	  tests/training/test_cli.py tests/training/test_mistakes.py \
	  tests/training/test_nothing_executes.py tests/training/test_damage.py \
	  tests/training/test_secrets.py

lint: .venv/.dev  ## Check style, imports and types.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: .venv/.dev  ## Build the documentation, gallery included; any warning is an error.
	rm -rf docs/api/generated  # pages of modules that are gone
	$(BIN)/python -m sphinx -W --keep-going -b html docs docs/_build/html

# Style and documentation use one core each, so they run in parallel; the tests need all cores, and
# their summary is the last line.
check:  ## Everything that a change must pass.
	@$(MAKE) --no-print-directory .venv/.dev
	@$(MAKE) --no-print-directory --jobs=2 --output-sync=target lint docs
	@$(MAKE) --no-print-directory test

benchmark: .venv/.dev  ## Measure the speed of everything (half an hour); writes to speed/.
	$(BIN)/python benchmarks/speed.py --out speed

clean:  ## Remove what the commands above created (except runs/).
	rm -rf .venv .venv-lowest docs/_build docs/gallery_built docs/api/generated .pytest_cache .ruff_cache .mypy_cache
