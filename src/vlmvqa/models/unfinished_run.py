"""The newest checkpoint of a run that has no `model/` yet, in the place of a saved model."""

from __future__ import annotations

import sys
from pathlib import Path

from vlmvqa import ranks
from vlmvqa.errors import InputError
from vlmvqa.models.checkpoint import CONFIG
from vlmvqa.paths import EXPECTED
from vlmvqa.training.checkpoints import newest_intact


def newest_checkpoint(folder: Path) -> Path:
    """Return the newest undamaged checkpoint of a run without `model/`, and print its name.

    Raises:
        InputError: the folder holds no complete checkpoint.
    """
    checkpoint, complaints = newest_intact(folder)
    if checkpoint is None or not (checkpoint / CONFIG).is_file():
        reason = f"no checkpoint is complete ({complaints[0]})" if complaints else _why_not(checkpoint or folder)
        raise InputError(f"{checkpoint or folder} is not a saved model: {reason}; {EXPECTED}")
    if ranks.is_first():
        print(*complaints, f"{folder} has no model/ yet: loading {checkpoint}", sep="\n", file=sys.stderr)
    return checkpoint


def _why_not(path: Path) -> str:
    """Return a clause that describes an existing path without `config.json`."""
    if path.is_file():
        return "it is a file"
    if not any(path.iterdir()):
        return "it is an empty folder"
    if (path / "files.json").is_file():
        return f"it is a checkpoint without {CONFIG}, of an older version; resume its run with resume=auto"
    if (path / "run.json").is_file():
        return "it is a run without model/ and without a checkpoint; resume it with resume=auto"
    return f"it holds no {CONFIG}"
