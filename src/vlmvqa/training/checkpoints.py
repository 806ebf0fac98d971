"""Which checkpoints of a run are whole.

The Trainer writes weights, optimizer and random states first and `trainer_state.json` last, so a checkpoint
with a readable state is whole, and a kill in the middle leaves one without. Those are never resumed from.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

STATE = "trainer_state.json"


def whole_checkpoints(folder: Path) -> list[Path]:
    """The whole checkpoints of a run's folder, oldest first."""
    return [checkpoint for checkpoint in _all(folder) if _is_whole(checkpoint)]


def remove_unfinished(folder: Path) -> list[Path]:
    """Delete what a kill or a full disk left half-written, so that it counts nowhere; returns what went."""
    unfinished = [checkpoint for checkpoint in _all(folder) if not _is_whole(checkpoint)]
    for checkpoint in unfinished:
        shutil.rmtree(checkpoint)
    return unfinished


def _all(folder: Path) -> list[Path]:
    found = [path for path in folder.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted(found, key=lambda path: int(path.name.removeprefix("checkpoint-")))


def _is_whole(checkpoint: Path) -> bool:
    try:
        state = json.loads((checkpoint / STATE).read_text())
    except (OSError, json.JSONDecodeError):
        return False
    return bool(state.get("global_step") == int(checkpoint.name.removeprefix("checkpoint-")))
