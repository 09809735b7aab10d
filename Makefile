# make demo    install into .venv, fetch base and reviews, compare all strategies with plain prompting
# make test    the same set-up, then the test suite, but for what `make parity` runs
# make parity  our methods and formats against the reference implementations; writes docs/parity.md; the last line is JSON
#              (the first time it makes adapter-hub's environment, which benchmarks share; TRITUNE_ADAPTERS_PYTHON names another)
# make guards  each defect that a test in tests/guards guards against, built into a copy of the code: that test must fail there
# make test-cuda    what needs a GPU, with the python and torch of the machine: make test-cuda PYTHON=python3
# make check   formatting, lint, types
# make bench   speed and memory against other libraries (20 minutes; the first time it makes their environments as well)
# make bench-sweep    look for the peers' best settings on this machine (before a bench that is to be quoted)
# make bench-prediction    speed of classification against lm-evaluation-harness
# The set-up runs once and again only when pyproject.toml or constraints.txt change.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test test-cuda parity guards check format bench bench-sweep bench-prediction bench-environments clean

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed; say which: make PYTHON=python3.12"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt "pip>=25.1"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $@

demo: $(READY)
	$(BIN)/tritune demo --out runs/demo --overwrite

test: $(READY)
	$(BIN)/python -m pytest -n 2 --dist loadgroup --ignore=tests/parity --ignore=tests/unit/exchange --ignore=tests/cuda

# CPU builds are what the set-up installs; a GPU's torch is the machine's own.
test-cuda:
	PYTHONPATH=src:. $(PYTHON) -m pytest tests/cuda -o filterwarnings=default

ifndef TRITUNE_ADAPTERS_PYTHON
ADAPTERS := benchmarks/.venv-adapters/.ready
parity: export TRITUNE_ADAPTERS_PYTHON = $(CURDIR)/benchmarks/.venv-adapters/bin/python
endif

parity: $(READY) $(ADAPTERS)
	@$(BIN)/python -m tests.parity.run

guards: $(READY)
	@$(BIN)/python -m tests.guards.broken

check: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The peers' environments hold versions of their own, so none of them is the project's.
benchmarks/.venv-%/.ready: benchmarks/peers/requirements-%.txt
	test -x benchmarks/.venv-$*/bin/python || $(PYTHON) -m venv benchmarks/.venv-$*
	benchmarks/.venv-$*/bin/python -m pip install --quiet --disable-pip-version-check -r $<
	touch $@

bench-environments: $(READY) benchmarks/.venv-peft/.ready benchmarks/.venv-adapters/.ready

bench: bench-environments
	@$(BIN)/python -m benchmarks.training --minutes 17

bench-prediction: $(READY) benchmarks/.venv-lm-eval/.ready
	@$(BIN)/python -m benchmarks.prediction

bench-sweep: bench-environments
	@$(BIN)/python -m benchmarks.sweep

clean:
	rm -rf $(VENV) benchmarks/.venv-* build dist src/*.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
