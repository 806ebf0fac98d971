"""A training checkpoint, and the folder of a stopped run, load like a finished model."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

import vlmvqa
from tests.end_to_end.scripts import SMALL, TRAIN_IMAGE, call, done, predictions, sentence
from vlmvqa import fingerprint


@pytest.fixture
def stopped(trained: Path, tmp_path: Path) -> Path:
    """A run as it is after its last checkpoint and before its model is written."""
    run = tmp_path / "stopped"
    shutil.copytree(trained, run, symlinks=True)
    shutil.rmtree(run / "model")
    return run


def test_a_checkpoint_answers_as_the_model_does(trained: Path, stopped: Path, tmp_path: Path, whole: Path) -> None:
    asked = (f"image={whole / TRAIN_IMAGE}", "question=how many?")
    found = {}
    for place in (trained, trained / "checkpoint-2", trained / "latest", stopped):
        folder = tmp_path / "asked"
        ended = done(call("predict", f"checkpoint={place}", *asked, f"run.dir={folder}"))
        assert (f"{stopped} has no model/ yet: loading {stopped / 'checkpoint-2'}\n" in ended.err) == (place == stopped)
        found[place] = predictions(folder)
    assert all(one == found[trained] for one in found.values())
    model = vlmvqa.load(trained)
    last = vlmvqa.load(trained / "checkpoint-2")
    assert (last.prompt, last.prompts, last.decoding) == (model.prompt, model.prompts, model.decoding)
    assert fingerprint.weights_in(trained / "checkpoint-2") == fingerprint.weights_in(trained / "model")


def test_a_stopped_run_is_scored_and_trained_on(stopped: Path, tmp_path: Path, whole: Path) -> None:
    data = ("data=vqav2", f"data.root={whole}")
    ended = done(call("eval", f"checkpoint={stopped}", *data, "split=val", f"run.dir={tmp_path / 'scored'}"))
    assert ended.err.count("has no model/ yet") == 1
    small = [word for word in SMALL if not word.startswith("model.")]
    on = ("train", f"init_from={stopped}", *data, *small, f"run.dir={tmp_path / 'on'}")
    ended = done(call(*on, "trainer.max_steps=1"))
    assert ended.err.count("has no model/ yet") == 1
    assert vlmvqa.load(tmp_path / "on").started_from == {
        "model": str(stopped / "checkpoint-2"),
        "weights": fingerprint.weights_in(stopped / "checkpoint-2"),
    }
    shutil.rmtree(stopped / "checkpoint-2")
    assert "it is a run without model/ and without a checkpoint; resume" in sentence(call(*on))
