# Everything a contributor runs. `make help` lists the targets with the comments beside them.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PYTEST := $(BIN)/python -m pytest
SEED ?= 0
HOURS ?= 1

# Ray starts many Python processes; with bytecode on disk each of them starts twice as fast.
unexport PYTHONDONTWRITEBYTECODE
# Our lock files decide what is installed, not the settings of the machine.
unexport PIP_REQUIRE_VIRTUALENV PIP_CONSTRAINT UV_CONSTRAINT UV_OVERRIDE UV_EXCLUDE_NEWER
export RAY_USAGE_STATS_ENABLED := 0

.DEFAULT_GOAL := help
.PHONY: help setup demo demo-record docs unit test test-ray test-others test-all soak sim check bench lock clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-11s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(VENV)/.complete ## make .venv with all that development and tests need (PYTHON=python3.12 for another)

$(VENV)/.complete: requirements/uv.lock requirements/dev.lock pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed: make setup PYTHON=python3.11")'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements/uv.lock
	$(BIN)/uv pip sync --quiet --python $(BIN)/python --require-hashes --compile-bytecode requirements/dev.lock
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --no-build-isolation --editable .
	touch $@

demo: setup ## a few hundred orders against failing services, killed with SIGKILL on the way: under 90 s
	$(BIN)/pyworkflow-ray demo

demo-record: setup ## the demo on a terminal of fixed size, recorded and drawn: docs/demo.cast, docs/demo.svg
	$(BIN)/python docs/recording docs/demo --command '$(BIN)/pyworkflow-ray demo --dir {dir}' \
		--shown 'pyworkflow-ray demo --dir /tmp/demo' --speed 6

unit: setup ## tests without Ray, half a minute
	$(PYTEST) tests/unit tests/property tests/cli -m "not ray and not slow"

# Two processes side by side: the tests on Ray mostly wait, the others mostly compute. Each tells its result at its end.
test: setup ## all tests but the slow ones, with Ray: a quarter of an hour on 2 cores
	@$(MAKE) --no-print-directory --keep-going --jobs=2 --output-sync=target test-ray test-others

test-ray: setup
	$(PYTEST) tests -m "ray and not slow"

test-others: setup
	$(PYTEST) tests -m "not ray and not slow"

test-all: setup ## all tests, at least 200 real SIGKILLs among them, up to an hour
	HYPOTHESIS_PROFILE=search $(PYTEST) tests

sim: setup ## one schedule of the simulator again: make sim SEED=n
	$(BIN)/python -m pyworkflow_ray.testing.simulate --seed $(SEED)

soak: setup ## schedules and crashes for as long as given: make soak HOURS=8
	$(BIN)/python -m pyworkflow_ray.testing.simulate --first-seed $(SEED) --hours $(HOURS)

check: setup ## format, lint, types, order of imports, and whether the docs name all that there is
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(PYTEST) -q tests/unit/test_layers.py tests/docs/test_site.py -m "not slow"

docs: setup ## the documentation site, in build/docs; a warning is an error, and no network is used
	$(BIN)/python -m sphinx --builder html --fail-on-warning --keep-going --quiet docs build/docs
	@echo "open build/docs/index.html"

bench: $(VENV)/.bench ## every benchmark, each beside its peers and the machine's limit: table, JSON and plots in build/bench
	$(BIN)/python -m benchmarks

$(VENV)/.bench: $(VENV)/.complete requirements/bench.lock
	$(BIN)/uv pip install --quiet --python $(BIN)/python --require-hashes --compile-bytecode -r requirements/bench.lock
	touch $@

lock: setup ## write requirements/*.lock anew from pyproject.toml
	./requirements/compile

clean: ## remove .venv and caches
	rm -rf $(VENV) build .mypy_cache .ruff_cache .hypothesis .import_linter_cache
