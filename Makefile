# Main targets: `make demo` and `make test`. Each first installs its dependencies into .venv, once.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CORE := $(VENV)/.core
READY := $(VENV)/.ready
HARNESSES := .venv-harnesses
# A git URL or folder, and the commit that evaluation/vlmevalkit_adapter is written against.
VLMEVALKIT ?= https://github.com/open-compass/VLMEvalKit
VLMEVALKIT_COMMIT := e8e78f05f3080fe28154f2130321f17951c3be94
PIP := $(BIN)/pip install --quiet --no-compile --constraint requirements.lock
# loadfile: tests of one file share their fixtures. The longest files run first (tests/conftest.py).
PYTEST := $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --durations=40

# Each process would compile what it imports again: 20 s for a worker of pytest.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test test-slow test-all test-gpu test-harnesses vlmevalkit coverage docs lint lock clean

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

# Tests with lmms-eval and VLMEvalKit; without VLMEvalKit its tests are skipped. HARNESS_TESTS: which of them.
HARNESS_TESTS ?= harness
test-harnesses: $(HARNESSES)/.ready vlmevalkit
	$(HARNESSES)/bin/python -m pytest -m "$(HARNESS_TESTS)" tests/end_to_end/test_lmms_eval.py tests/end_to_end/test_vlmevalkit.py

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

# A layer over .venv, because the harnesses' pins conflict with ours: its packages precede those of .venv, which stays as
# it is. The requirements files say which of their packages are installed, and why not all.
LAYER_PIP := $(BIN)/pip --python $(HARNESSES)/bin/python install --quiet --no-compile
SITE := import sysconfig; print(sysconfig.get_path("purelib"))
$(HARNESSES)/.ready: $(READY) evaluation/lmms_eval_adapter/requirements.txt evaluation/vlmevalkit_adapter/requirements.txt
	$(BIN)/python -m venv --clear --without-pip $(HARNESSES)
	$(BIN)/python -c '$(SITE)' > "$$($(HARNESSES)/bin/python -c '$(SITE)')/venv.pth"
	$(LAYER_PIP) --no-deps --editable . lmms-eval==0.7.3
	grep -v lmms-eval evaluation/lmms_eval_adapter/requirements.txt > $(HARNESSES)/more.txt
	$(LAYER_PIP) --requirement $(HARNESSES)/more.txt
	@touch $@

# It is a git repository only: its checkout is put on the path.
vlmevalkit: $(HARNESSES)/.ready
	@test -e $(HARNESSES)/VLMEvalKit/.ready || { \
	  rm -rf $(HARNESSES)/VLMEvalKit && git init --quiet $(HARNESSES)/VLMEvalKit && \
	  git -C $(HARNESSES)/VLMEvalKit fetch --quiet --depth 1 $(VLMEVALKIT) $(VLMEVALKIT_COMMIT) && \
	  git -C $(HARNESSES)/VLMEvalKit checkout --quiet FETCH_HEAD && \
	  $(LAYER_PIP) --requirement evaluation/vlmevalkit_adapter/requirements.txt && \
	  echo $(abspath $(HARNESSES)/VLMEvalKit) > "$$($(HARNESSES)/bin/python -c '$(SITE)')/vlmevalkit.pth" && \
	  touch $(HARNESSES)/VLMEvalKit/.ready; \
	} || echo "VLMEvalKit cannot be installed from $(VLMEVALKIT): its tests are skipped; set VLMEVALKIT to a clone" >&2

# Pin the installed versions; run it after changing the bounds in setup.cfg.
lock: $(READY)
	$(BIN)/pip freeze --exclude-editable | grep -v '^-e' > requirements.lock

clean:
	rm -rf $(VENV) $(HARNESSES) .pytest_cache .mypy_cache .ruff_cache .coverage
