"""Small datasets are repeated until training takes `data.min_steps` steps."""

from __future__ import annotations

import math
from collections.abc import Sequence

from vlmvqa.data.tasks import Task
from vlmvqa.training.trainer import VqaTrainer


def num_epochs(configured: float, given: frozenset[str], epoch_steps: int, tasks: Sequence[Task]) -> float:
    """Return the epochs of a run: more than configured for a small dataset, to train `data.min_steps` steps.

    A `trainer.num_train_epochs` set on the command line is kept.
    """
    if "trainer.num_train_epochs" in given:
        return configured
    return max(configured, math.ceil(max(task.data.min_steps for task in tasks) / epoch_steps))


def repeat_small_data(trainer: VqaTrainer, given: frozenset[str], tasks: Sequence[Task]) -> list[str]:
    """Set the epochs of a run without `trainer.max_steps` (`num_epochs`); return the line that reports a change."""
    arguments, configured = trainer.args, trainer.args.num_train_epochs
    epochs = num_epochs(configured, given, len(trainer.training_set) // trainer.global_batch, tasks)
    if arguments.max_steps > 0 or epochs == configured:
        return []
    arguments.num_train_epochs, least = epochs, max(task.data.min_steps for task in tasks)
    return [f"{epochs:g} epochs instead of {configured:g}, because the dataset is small (data.min_steps={least})"]
