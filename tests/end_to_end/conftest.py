"""A small data set, a copy of it to be damaged, and a run on it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.end_to_end.scripts import SMALL, call, change, done
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


@pytest.fixture(scope="session")
def scored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The results of launch/eval.py for a model that answers yes, no and numbers.

    Where all annotators agree, they say "Yes" and "No": our score counts "yes" as wrong, that of harnesses does not.
    """
    folder = tmp_path_factory.mktemp("scored")
    root = synthetic_vqav2.write(folder / "data", train_images=40, val_images=10, questions_per_image=5)

    def capitalise(parsed: Any) -> None:
        for record in parsed["annotations"]:
            if len({answer["answer"] for answer in record["answers"]}) == 1:
                for answer in record["answers"]:
                    answer["answer"] = answer["answer"].capitalize()

    change(root / "v2_mscoco_val2014_annotations.json", capitalise)
    data = ("data=vqav2", f"data.root={root}")
    steps = ("trainer.max_steps=150", "trainer.learning_rate=3e-3", "trainer.logging_steps=50")
    done(call("train", *data, f"run.dir={folder / 'run'}", *SMALL, *steps))
    checkpoint = (f"checkpoint={folder / 'run'}", "split=val", "report=false")
    done(call("eval", *data, *checkpoint, f"run.dir={folder / 'eval'}"))
    return folder
