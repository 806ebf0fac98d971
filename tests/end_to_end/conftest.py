"""A small data set, a copy of it to be damaged, and a run on it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.end_to_end.scripts import SMALL, call, done
from vlmvqa.extras.synthetic import vqav2 as synthetic_vqav2


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small data set in VQAv2's files; nothing is wrong with it."""
    root = tmp_path_factory.mktemp("whole") / "vqav2"
    return synthetic_vqav2.write(root, train_images=6, val_images=4, questions_per_image=2)


@pytest.fixture
def root(tmp_path: Path, whole: Path) -> Path:
    """A copy of it, to be damaged."""
    return Path(shutil.copytree(whole, tmp_path / "vqav2"))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, whole: Path) -> Path:
    """The folder of a run of two steps."""
    folder = tmp_path_factory.mktemp("runs") / "trained"
    done(call("train", "data=vqav2", f"data.root={whole}", f"run.dir={folder}", *SMALL))
    return folder
