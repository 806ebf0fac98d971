"""Read a split from its shards, as the `data` group describes it."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

from vlmvqa.config.schema import DataSettings
from vlmvqa.data.example import Example
from vlmvqa.data.tasks import has_questions
from vlmvqa.extras.shards import shards
from vlmvqa.extras.synthetic.generate import GENERATORS, generator


def packing_key(settings: DataSettings, split: str, max_samples: int | None) -> dict[str, Any]:
    """Return the description of a split that its shards keep; options of the generator are no part of it."""
    generating = inspect.signature(generator(settings.source)).parameters if settings.source in GENERATORS else ()
    options = {name: value for name, value in settings.options.items() if name not in generating}
    return {"source": settings.source, "split": split, "max_samples": max_samples, "options": options}


def read_split(settings: DataSettings, split: str, max_samples: int | None) -> list[Example]:
    """Return the examples of a split that `data.shards` holds."""
    folder, key = Path(str(settings.shards)).expanduser(), packing_key(settings, split, max_samples)
    return shards.read(folder, key, settings.prompt, has_questions=has_questions(settings.source))
