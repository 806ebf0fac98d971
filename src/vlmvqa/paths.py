"""Paths given by a user that do not exist: the absolute path that was tried, and the nearest one that exists.

Imports no PyTorch, so that a mistyped path is reported at once.
"""

from __future__ import annotations

import difflib
from pathlib import Path

from vlmvqa.errors import InputError

RUNS = "runs"  # the folder of all runs, where run.dir names no other
EXPECTED = "name a run's folder, its model/ folder, one of its checkpoints, or a hub id"


def is_hub_id(name: str) -> bool:
    """Whether a name that is no folder here may be a hub id: `owner/name`."""
    return name.count("/") == 1 and not name.startswith((".", "/", "~"))


def refuse_missing(key: str, given: str) -> None:
    """Raise if a file or folder does not exist.

    Args:
        key: the setting that names it.

    Raises:
        InputError: with the absolute path and the nearest one that exists.
    """
    path = _absolute(given)
    if not path.exists():
        raise InputError(f"{key}={given} does not exist; the nearest existing path to {path} is {nearest(path)}")


def refuse_missing_model(given: str) -> None:
    """Raise if a model's name is a local path that does not exist. What may be a hub id is left to the loader.

    Raises:
        InputError: with the absolute path and the nearest one that exists.
    """
    path = _absolute(given)
    if path.exists() or (is_hub_id(given) and not _holds_runs(path.parent)):
        return
    raise InputError(f"{missing_model(path)}; {EXPECTED}")


def missing_model(path: Path) -> str:
    """Return the clause for a model that does not exist: the absolute path, and the nearest one that exists."""
    return f"no model at {path}; the nearest is {nearest(path)}"


def nearest(path: Path) -> Path:
    """Return the existing path that is most like an absolute path: similar names, or else the deepest folder."""
    found = Path(path.anchor)
    for part in path.parts[1:]:
        if (found / part).exists():
            found /= part
            continue
        similar = difflib.get_close_matches(part, _names(found), n=1)
        if not similar:
            break
        found /= similar[0]
    return found


def _absolute(given: str) -> Path:
    return Path(given).expanduser().absolute()


def _names(folder: Path) -> list[str]:
    try:
        return sorted(path.name for path in folder.iterdir())
    except OSError:
        return []


def _holds_runs(folder: Path) -> bool:
    """Whether this is a folder of runs, not one of a hub user's models."""
    return folder.name == RUNS or any(folder.glob("*/run.json"))
