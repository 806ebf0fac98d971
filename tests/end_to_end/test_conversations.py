"""Conversations with and without images, trained and scored in one process and on two ranks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from tests import forks
from tests.end_to_end.scripts import SMALL, call, done, losses, metrics, predictions

pytestmark = pytest.mark.slow
COLORS = ("red", "green", "blue", "white")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Every third conversation is text only, so that a rank has steps without an image."""
    folder = tmp_path / "data"
    folder.mkdir()
    for color in COLORS:
        Image.new("RGB", (40, 40), color).save(folder / f"{color}.png")
    for split, count in (("train", 24), ("val", 6)):
        lines = []
        for number in range(count):
            color, picture = COLORS[number % 4], number % 3 != 0
            turns = [("What color is it?", color), ("Are you sure?", "Yes."), ("Say it again.", color)][
                : 1 + number % 3
            ]
            texts = [{"user": user, "assistant": assistant} for user, assistant in turns]
            lines.append(json.dumps({"images": [f"{color}.png"] if picture else [], "texts": texts}))
        (folder / f"{split}.jsonl").write_text("\n".join(lines))
    return folder


@pytest.mark.parametrize("strategy", [None, "fsdp", "zero3"])
def test_conversations_are_trained_and_scored(root: Path, tmp_path: Path, strategy: str | None) -> None:
    """On two ranks with the losses of one process."""
    given = ("data=conversations", f"data.root={root}", "decoding.max_new_tokens=4", *SMALL, "data.length_window=0")
    done(call("train", *given, f"run.dir={tmp_path / 'run'}", "trainer.max_steps=4"))
    found = metrics(tmp_path / "run")
    assert found["metric"] == "exact_match" and len(predictions(tmp_path / "run")) == 6
    if strategy is None:
        return
    split = ("trainer.per_device_train_batch_size=2", f"dist={strategy}", "report=false", "trainer.max_steps=4")
    process = forks.ranks(2, ["launch/train.py", *given, *split, f"run.dir={tmp_path / 'two'}"])
    printed, _ = process.communicate(timeout=300)
    assert process.returncode == 0, printed[-3000:]
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "run"), abs=1e-4)
