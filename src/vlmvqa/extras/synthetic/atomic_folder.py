"""Generate a dataset folder on first use; the folder appears complete or not at all."""

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


def generate_once(
    root: Path,
    name: str,
    settings: Mapping[str, Any],
    minimums: Mapping[str, int],
    generate: Callable[[Path], None],
) -> Path:
    """Return `root`, generating it first unless it already holds a dataset with these settings.

    Several processes may call this at the same time.

    Args:
        root: the dataset's folder.
        name: the dataset's name in error messages, "shapes".
        settings: everything that `generate` depends on; saved in `root/settings.json`.
        minimums: the smallest allowed value of some settings.
        generate: fills an empty folder with the dataset's files.

    Raises:
        InputError: a setting is below its minimum, `root` holds other files or was generated with other settings, or
            it cannot be written.
    """
    for setting, minimum in minimums.items():
        if settings[setting] < minimum:
            raise InputError(f"the {name} dataset needs {setting} of at least {minimum}, not {settings[setting]}.")
    if root.exists() and (not root.is_dir() or any(root.iterdir())):
        return _reuse(root, name, settings)
    unfinished = root.with_name(f".{root.name}.{uuid.uuid4().hex}")
    try:
        unfinished.mkdir(parents=True)
        generate(unfinished)
        (unfinished / SETTINGS).write_text(json.dumps(settings, indent=2) + "\n")
        os.rename(unfinished, root)
    except OSError as error:
        # Another process finished first: a folder cannot be renamed over one that holds files.
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            return _reuse(root, name, settings)
        raise InputError(
            f"cannot write the {name} dataset to {root}: {error.strerror}; choose another data.root."
        ) from None
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return root


def _reuse(root: Path, name: str, settings: Mapping[str, Any]) -> Path:
    """Return `root` if it was generated with these settings; raise `InputError` otherwise."""
    try:
        found = json.loads((root / SETTINGS).read_text())
    except (OSError, ValueError):
        found = None
    if not isinstance(found, dict):
        raise InputError(
            f"{root} exists and is not a {name} dataset (no readable {SETTINGS}); choose another data.root."
        )
    if found != settings:
        changes = ", ".join(
            f"{key} {found.get(key)}, now {settings.get(key)}"
            for key in {**settings, **found}
            if found.get(key) != settings.get(key)
        )
        raise InputError(
            f"{root} was generated with other settings ({changes}); delete it, or choose another data.root."
        )
    return root
