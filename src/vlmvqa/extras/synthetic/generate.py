"""Generate the synthetic dataset that a config asks for (data.synthetic=true), unless it exists."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vlmvqa.config.schema import DataSettings
from vlmvqa.errors import InputError

# Sources with a generator: a module of the same name in this package.
GENERATORS = ("vqav2", "docvqa", "gqa", "coco_captions", "jsonl")


def generator(source: str) -> Callable[..., Path]:
    """Return the function that generates a source's dataset."""
    write: Callable[..., Path] = importlib.import_module(f"vlmvqa.extras.synthetic.{source}").write
    return write


def generate(settings: DataSettings, root: Path) -> dict[str, Any]:
    """Generate the source's synthetic dataset in `root` unless it exists; return the options that its reader takes."""
    if settings.source not in GENERATORS:
        known = ", ".join(GENERATORS)
        raise InputError(
            f"data.synthetic: there is no synthetic data for {settings.source}, only for {known}; leave it out"
        )
    write = generator(settings.source)
    own = set(inspect.signature(write).parameters)
    write(root, **{name: value for name, value in settings.options.items() if name in own}, progress=True)
    return {name: value for name, value in settings.options.items() if name not in own}
