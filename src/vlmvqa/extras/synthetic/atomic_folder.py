"""Generate a dataset folder on first use; the folder appears complete or not at all."""

from __future__ import annotations

import errno
import inspect
import json
import os
import shutil
import uuid
from collections.abc import Callable, Mapping
from functools import wraps
from pathlib import Path
from typing import Any, Concatenate, ParamSpec

from vlmvqa.errors import InputError

SETTINGS = "settings.json"
P = ParamSpec("P")


def generated_once(
    name: str, minimums: Mapping[str, int], **fixed: Any
) -> Callable[[Callable[Concatenate[Path, P], None]], Callable[Concatenate[Path, P], Path]]:
    """Make a function that fills an empty folder return a dataset's folder, generating it on first use.

    The function's keyword arguments except `progress` are the dataset's settings. They are saved in `settings.json`
    with `fixed`, and an existing folder is reused if it has the same. Several processes may call it at the same time.

    Args:
        name: the dataset's name in error messages, "shapes".
        minimums: the smallest allowed value of some settings.

    Raises:
        InputError: by the function: a setting is below its minimum, the folder holds other files or was generated with
            other settings, or it cannot be written.
    """

    def decorate(fill: Callable[Concatenate[Path, P], None]) -> Callable[Concatenate[Path, P], Path]:
        @wraps(fill)
        def write(root: Path, /, *args: P.args, **given: P.kwargs) -> Path:
            arguments = inspect.signature(fill).bind(root, *args, **given)
            arguments.apply_defaults()
            _, *options = arguments.arguments.items()
            settings = {**fixed, **{key: value for key, value in options if key != "progress"}}
            for setting, minimum in minimums.items():
                if settings[setting] < minimum:
                    raise InputError(
                        f"the {name} dataset needs {setting} of at least {minimum}, not {settings[setting]}."
                    )
            return _generate(root, name, settings, lambda folder: fill(folder, *args, **given))

        return write

    return decorate


def _generate(root: Path, name: str, settings: Mapping[str, Any], fill: Callable[[Path], None]) -> Path:
    if root.exists() and (not root.is_dir() or any(root.iterdir())):
        return _reuse(root, name, settings)
    unfinished = root.with_name(f".{root.name}.{uuid.uuid4().hex}")
    try:
        unfinished.mkdir(parents=True)
        fill(unfinished)
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
    changes = ", ".join(
        f"{key} {found.get(key)}, now {settings.get(key)}"
        for key in {**settings, **found}
        if found.get(key) != settings.get(key)
    )
    if changes:
        raise InputError(
            f"{root} was generated with other settings ({changes}); delete it, or choose another data.root."
        )
    return root
