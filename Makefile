# Two commands: `make demo` and `make test`. Each installs what it needs into .venv first, once.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CORE := $(VENV)/.core
READY := $(VENV)/.ready
PIP := $(BIN)/pip install --quiet --no-compile --constraint requirements.lock
# Tests of one file share what they set up. The longest files come first (tests/conftest.py).
PYTEST := $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --durations=40

.PHONY: demo test test-slow test-all coverage docs lint lock clean

demo: $(CORE)
	$(BIN)/python launch/train.py run.name=demo run.overwrite=true

# Every invariant once, at small size.
test: $(READY) lint
	$(PYTEST) -m "not slow and not long"

# What takes minutes: real launchers, a sample of the matrix of strategies, recipes. CI runs it after `make test`.
test-slow: $(READY)
	$(PYTEST) -m "slow and not long"

# By hand, hours: the tables of docs/scaling.md, all adapted tasks, HELM's pages, the wheel, the demo at its full size.
test-all: $(READY) lint
	$(PYTEST)

coverage: $(READY)
	$(PYTEST) -m "not slow and not long" --cov --cov-report=term

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --num-workers 2

# The pages as a site, in site/; a link that leads nowhere is an error.
docs: $(READY)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# torch and torchvision first, by pin: a matching pair of builds from the registry. Python compiles what it imports.
$(CORE): setup.cfg pyproject.toml requirements.lock
	@$(PYTHON) -c 'import sys; sys.exit("vlmvqa needs Python 3.11 or newer; try: make PYTHON=python3.11" if sys.version_info < (3, 11) else 0)'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV): some 5 GB, a few minutes"
	$(PIP) torch torchvision
	$(PIP) --editable .
	@touch $(CORE)

$(READY): $(CORE)
	@echo "installing the extras and what the tests need: 1 GB more"
	$(PIP) --editable '.[all]'
	@touch $(READY)

# Pins of what is installed now; run it after changing the bounds in setup.cfg.
lock: $(READY)
	$(BIN)/pip freeze --exclude-editable | grep -v '^-e' > requirements.lock

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .coverage
