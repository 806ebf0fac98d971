"""Small datasets are repeated until training takes `data.min_steps` steps."""

from __future__ import annotations

from pathlib import Path

from tests.unit.test_trainer import model, trainer
from vlmvqa.config.schema import DataSettings
from vlmvqa.data.tasks import Task
from vlmvqa.training.small_data import repeat_small_data


def test_a_small_data_set_is_repeated(tmp_path: Path) -> None:
    """Eight rows, two per step; not if the command sets the number of epochs or steps."""
    task, vlm = Task("", DataSettings("jsonl", "mine", min_steps=10), [], []), model()
    longer = trainer(tmp_path, vlm, max_steps=-1, num_train_epochs=1)
    assert repeat_small_data(longer, frozenset(), [task]) == [
        "3 epochs instead of 1, because the dataset is small (data.min_steps=10)"
    ]
    longer.train()
    assert longer.state.global_step == 12
    assert repeat_small_data(longer, frozenset(), [task]) == []  # long enough
    assert repeat_small_data(trainer(tmp_path, vlm, max_steps=4), frozenset(), [task]) == []
    short = trainer(tmp_path, vlm, max_steps=-1, num_train_epochs=1)
    given = frozenset({"trainer.num_train_epochs"})
    assert repeat_small_data(short, given, [task]) == []
