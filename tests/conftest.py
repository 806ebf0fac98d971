"""`launch/` is a folder of scripts, not a package: its modules are imported as the scripts import them."""

from __future__ import annotations

import gc
import os
import shutil
import sys
import tempfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "launch"))

# Before any module of ours or of a test is imported: the hub's library reads it when it is.
os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
torch.set_num_threads(1)  # tiny operations: two threads that wait for each other are slower than one


def pytest_configure(config: pytest.Config) -> None:
    """For all processes that tests start, so set before test modules copy the environment: what tests read is cached
    apart from what users read; as above, nothing is asked of the hub, and each has one thread."""
    os.environ["VLMVQA_CACHE"] = tempfile.mkdtemp(prefix="vlmvqa-cache-")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest first: begun last, it would run alone."""
    items.sort(key=lambda item: item.path.name != "test_demo.py")


def pytest_collection_finish(session: pytest.Session) -> None:
    """Each training collects garbage: it need not look through all that was imported."""
    gc.freeze()


def pytest_unconfigure(config: pytest.Config) -> None:
    gc.unfreeze()
    shutil.rmtree(os.environ["VLMVQA_CACHE"], ignore_errors=True)
