"""Paths: of the project's own files, and those that a user gives, with error messages for missing ones.

Imports no PyTorch, so that mistyped paths are reported at once.
"""

from __future__ import annotations

import difflib
import os
import uuid
from pathlib import Path

from vlmvqa.errors import InputError

RUNS = "runs"  # the default folder of all runs
EXPECTED = "name a run's folder, its model/ folder, one of its checkpoints, or a hub id"
_HERE = Path(__file__).resolve().parent
_ROOT = _HERE if (_HERE / "launch").is_dir() else _HERE.parents[1]
LAUNCH, CONF = _ROOT / "launch", _ROOT / "conf"
# Run as a module. A helm.py in launch/ would shadow crfm-helm's package `helm`.
HELM, HELM_MODULE = _ROOT / "evaluation" / "helm" / "run.py", "vlmvqa.evaluation.helm.run"
CALLED_AS = "VLMVQA_CALLED_AS"  # environment variable of scripts that were started as `vlmvqa <script>`


def is_hub_id(name: str) -> bool:
    """Return whether a name can be a Hub id: `owner/name`."""
    return name.count("/") == 1 and not name.startswith((".", "/", "~"))


def refuse_missing(key: str, given: str) -> None:
    """Raise if the file or folder in the setting `key` does not exist.

    Raises:
        InputError: names the absolute path and the nearest one that exists.
    """
    path = _absolute(given)
    if not path.exists():
        raise InputError(f"{key}={given} does not exist; the nearest existing path to {path} is {nearest(path)}")


def refuse_no_root(where: str, root: str | None, hub: str | None, packed: str | None) -> None:
    """Raise if a dataset names no source to read it from."""
    if root is None and hub is None and packed is None:
        raise InputError(f"{where}.root must be given; add {where}.root=... to the command")


def refuse_missing_model(given: str) -> None:
    """Raise if a model's name is a local path that does not exist; possible Hub ids are left to the loader.

    Raises:
        InputError: names the absolute path and the nearest one that exists.
    """
    path = _absolute(given)
    if path.exists() or (is_hub_id(given) and not _holds_runs(path.parent)):
        return
    raise InputError(f"{missing_model(path)}; {EXPECTED}")


def missing_model(path: Path) -> str:
    """Return the clause for a missing model: the absolute path, and the nearest one that exists."""
    return f"no model at {path}; the nearest is {nearest(path)}"


def nearest(path: Path) -> Path:
    """Return the existing path most similar to an absolute path, following similar names as deep as possible."""
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
    """Return whether this is a folder of runs, not a Hub user's name."""
    return folder.name == RUNS or any(folder.glob("*/run.json"))


def replace_file(path: Path, text: str) -> None:
    """Write a file under a temporary name, then rename it: a reader finds the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        unfinished.write_text(text, encoding="utf-8")
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
