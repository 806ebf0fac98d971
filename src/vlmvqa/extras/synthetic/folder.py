"""Drawing a small data set in a benchmark's own files, at first use: the folder appears whole or not at all."""

from __future__ import annotations

import errno
import json
import os
import shutil
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from vlmvqa.errors import InputError

SETTINGS = "settings.json"


def write_once(root: Path, name: str, settings: Mapping[str, int | str], draw: Callable[[Path], None]) -> Path:
    """Let `draw` fill a folder and call it `root`, unless it is there already with these settings.

    Several processes may ask for it at once.

    Args:
        name: how an error names the data set, "shapes".
        settings: all that `draw` depends on; written beside its files.

    Raises:
        InputError: `root` holds something else or was written with other settings, or it cannot be written.
    """
    if root.exists() and (not root.is_dir() or any(root.iterdir())):
        return _reuse(root, name, settings)
    unfinished = root.with_name(f".{root.name}.{uuid.uuid4().hex}")
    try:
        unfinished.mkdir(parents=True)
        draw(unfinished)
        (unfinished / SETTINGS).write_text(json.dumps(settings, indent=2) + "\n")
        os.rename(unfinished, root)
    except OSError as error:
        # Another process finished first: a folder cannot be renamed over one that holds files.
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            return _reuse(root, name, settings)
        raise InputError(
            f"cannot write the {name} data set to {root}: {error.strerror}; choose another data.root."
        ) from None
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return root


def refuse_small(name: str, settings: Mapping[str, Any], least: Mapping[str, int]) -> None:
    """Refuse numbers no data set can be made of.

    Args:
        least: what each setting must at least be.
    """
    for setting, minimum in least.items():
        if settings[setting] < minimum:
            raise InputError(f"the {name} data set needs {setting} of at least {minimum}, not {settings[setting]}.")


def _reuse(root: Path, name: str, settings: Mapping[str, int | str]) -> Path:
    """`root`, if it was written with these settings."""
    try:
        found = json.loads((root / SETTINGS).read_text())
    except (OSError, ValueError):
        found = None
    if not isinstance(found, dict):
        raise InputError(
            f"{root} exists and is not a {name} data set (no readable {SETTINGS}); choose another data.root."
        )
    if found != settings:
        raise InputError(
            f"{root} was written with other settings ({_differences(found, settings)}); "
            "delete it, or choose another data.root."
        )
    return root


def _differences(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    """`seed 0, now 1`: what differs between two settings."""
    return ", ".join(
        f"{name} {found.get(name)}, now {wanted.get(name)}"
        for name in {**wanted, **found}
        if found.get(name) != wanted.get(name)
    )
