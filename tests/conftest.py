"""`launch/` is a folder of scripts, not a package: its modules are imported as the scripts import them."""

from __future__ import annotations

import gc
import importlib
import os
import shutil
import sys
import tempfile
from pathlib import Path

import pytest

from tests import forks
from vlmvqa import startup

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "launch"))

# Before any module of ours or of a test is imported: PyTorch and the hub's library read it then. One thread, because
# two that wait for each other are slower on tiny operations.
os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
startup.prepare()


def pytest_configure(config: pytest.Config) -> None:
    """For all processes that tests start, so set before test modules copy the environment: what tests read is cached
    apart from what users read; as above, nothing is asked of the hub, and each has one thread."""
    os.environ["VLMVQA_CACHE"] = tempfile.mkdtemp(prefix="vlmvqa-cache-")
    if not is_worker(config):
        os.environ[forks.FOLDER] = tempfile.mkdtemp(prefix="vlmvqa-forks-")


def is_worker(config: pytest.Config) -> bool:
    """Whether this is one of pytest-xdist's workers, and not the process that the user started."""
    return hasattr(config, "workerinput")


def pytest_collection(session: pytest.Session) -> None:
    """A worker runs most files, so it imports what most need, as the scripts do."""
    if is_worker(session.config):
        with startup.fewer_imports():
            importlib.import_module("vlmvqa.training.trainer")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first: begun last, one would run alone. `make test` keeps this order."""
    folders = ("distributed", "end_to_end", "unit")
    items.sort(key=lambda item: folders.index(item.path.parent.name))


def pytest_collection_finish(session: pytest.Session) -> None:
    """Each training collects garbage: it need not look through all that was imported."""
    gc.freeze()


def pytest_unconfigure(config: pytest.Config) -> None:
    gc.unfreeze()
    shutil.rmtree(os.environ["VLMVQA_CACHE"], ignore_errors=True)
    if not is_worker(config):
        forks.stop()
        shutil.rmtree(os.environ[forks.FOLDER], ignore_errors=True)
