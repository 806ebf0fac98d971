# Two commands: `make demo` and `make test`. Each sets everything up in .venv first, once.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

# Threads that wait give their core away soon: on a busy machine, PyTorch's forever spinning ones are ten times slower.
export GOMP_SPINCOUNT := 10000

.PHONY: demo test test-slow docs lint lock clean

demo: $(READY)
	$(BIN)/python launch/train.py run.name=demo run.overwrite=true

test: $(READY) lint
	$(BIN)/python -m pytest -m "not slow and not long" -n 2 --dist loadfile --cov --cov-report=term

test-slow: $(READY)
	$(BIN)/python -m pytest -m slow -n 2 --dist loadfile --no-loadscope-reorder --no-header

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The pages as a site, in site/; a link that leads nowhere is an error.
docs: $(READY)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# torch and torchvision are asked for first and by pin: a matching pair of builds from the registry.
$(READY): setup.cfg pyproject.toml requirements.lock
	@$(PYTHON) -c 'import sys; sys.exit("vlmvqa needs Python 3.11 or newer; try: make PYTHON=python3.11" if sys.version_info < (3, 11) else 0)'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV): some 6 GB, about five minutes"
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --constraint requirements.lock torch torchvision
	$(BIN)/pip install --quiet --constraint requirements.lock --editable '.[all]'
	@touch $(READY)

# Pins of what is installed now; run it after changing the bounds in setup.cfg.
lock: $(READY)
	$(BIN)/pip freeze --exclude-editable | grep -v '^-e' > requirements.lock

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .coverage
