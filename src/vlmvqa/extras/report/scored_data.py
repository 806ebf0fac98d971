"""The data of finished runs, read again with the settings in their folders."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import yaml

from vlmvqa.config.schema import DataSettings
from vlmvqa.data.example import Example, count_questions
from vlmvqa.data.tasks import data_settings, read_examples
from vlmvqa.errors import BadRecords, InputError


def run_data(folder: Path) -> DataSettings:
    """Return the data settings of a run.

    Raises:
        InputError: its config or its data does not exist.
    """
    run = folder if (folder / "config.yaml").is_file() else folder.parent  # each task of a mixture has its own folder
    if not (run / "config.yaml").is_file():
        raise InputError(f"{folder} has no config.yaml")
    data = data_settings(yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))["data"])
    if run != folder:
        data = data.tasks[folder.name]
    if data.hub is None and data.shards is None and not Path(data.root or "").expanduser().is_dir():
        raise InputError(f"{data.root} does not exist")  # synthetic data is not generated for this
    return data


def scored_examples(folder: Path) -> list[Example]:
    """Read the examples that a run was evaluated on.

    Raises:
        InputError: its config or its data does not exist.
    """
    metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    return read_examples(run_data(folder), metrics["split"], metrics["max_samples"], BadRecords("skip"))


def training_questions(folders: Sequence[Path]) -> dict[Path, int] | None:
    """Return the number of questions of each run's training set; None if the data of a run cannot be read."""
    counts: dict[str, int] = {}
    found = {}
    try:
        for folder in folders:
            data = run_data(folder)
            if str(data) not in counts:
                examples = read_examples(data, data.train_split, data.max_train_samples, BadRecords("skip"))
                counts[str(data)] = count_questions(examples)
            found[folder] = counts[str(data)]
    except InputError:
        return None
    return found
