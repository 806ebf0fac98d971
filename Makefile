# Main targets: `make demo` and `make test`. Each first installs its dependencies into .venv, once.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CORE := $(VENV)/.core
READY := $(VENV)/.ready
PIP := $(BIN)/pip install --quiet --no-compile --constraint requirements.lock
# loadfile: tests of one file share their fixtures. The longest files run first (tests/conftest.py).
PYTEST := $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --durations=40

.PHONY: demo test test-slow test-all test-gpu coverage docs lint lock clean

demo: $(CORE)
	$(BIN)/python launch/train.py run.name=demo run.overwrite=true

# Lint, and every invariant once, at small size.
test: $(READY) lint
	$(PYTEST) -m "not slow and not long"

# Tests that take minutes: real launchers, a sample of the strategy matrix, recipes. CI runs them after `make test`.
test-slow: $(READY)
	$(PYTEST) -m "slow and not long"

# All tests; takes hours and is run by hand: the tables of docs/scaling.md, all adapted tasks, HELM's pages, the wheel, the
# demo at full size.
test-all: $(READY) lint
	$(PYTEST)

# Tests of kernels and precisions that need a GPU; without one they are skipped.
test-gpu: $(READY)
	$(BIN)/python -m pytest tests/unit/test_cuda.py tests/unit/test_throughput.py::test_on_a_gpu_the_clock_times_its_stream

coverage: $(READY)
	$(PYTEST) -m "not slow and not long" --cov --cov-report=term

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --num-workers 2

# Build docs/ as a site in site/; a broken link is an error.
docs: $(READY)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# torch and torchvision are installed first, pinned, so that their builds match. --no-compile: Python compiles on import.
$(CORE): setup.cfg pyproject.toml requirements.lock
	@$(PYTHON) -c 'import sys; sys.exit("vlmvqa needs Python 3.11 or newer; try: make PYTHON=python3.11" if sys.version_info < (3, 11) else 0)'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV): some 5 GB, a few minutes"
	$(PIP) torch torchvision
	$(PIP) --editable .
	@touch $(CORE)

$(READY): $(CORE)
	@echo "installing the extras and the dependencies of the tests: 1 GB more"
	$(PIP) --editable '.[all]'
	@touch $(READY)

# Pin the installed versions; run it after changing the bounds in setup.cfg.
lock: $(READY)
	$(BIN)/pip freeze --exclude-editable | grep -v '^-e' > requirements.lock

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .coverage
