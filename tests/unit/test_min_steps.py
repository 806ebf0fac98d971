"""A small data set of a user's own is repeated until training makes enough steps."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.unit.test_trainer import model, trainer
from vlmvqa.data.tasks import DataSettings, Task
from vlmvqa.training.arguments import repeat_small_data


def test_a_small_data_set_is_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight rows at two a step; never where the command says how long."""
    task, vlm = Task("", DataSettings("jsonl", "mine", min_steps=10), [], []), model()
    longer = trainer(tmp_path, vlm, max_steps=-1, num_train_epochs=1)
    assert repeat_small_data(longer, [task]) == (
        "3 epochs instead of 1, since a small data set makes few steps (data.min_steps=10)"
    )
    longer.train()
    assert longer.state.global_step == 12
    assert repeat_small_data(longer, [task]) is None  # long enough
    assert repeat_small_data(trainer(tmp_path, vlm, max_steps=4), [task]) is None
    monkeypatch.setattr("training_from_config.given_keys", lambda: ["trainer.num_train_epochs"])
    assert repeat_small_data(trainer(tmp_path, vlm, max_steps=-1, num_train_epochs=1), [task]) is None
