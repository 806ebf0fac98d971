"""Result files as the benchmarks' servers and scripts read them: there whole or not at all."""

from __future__ import annotations

import json
import os
import uuid
from pathlib import Path
from typing import Any


def write_json(path: Path, results: list[dict[str, Any]]) -> None:
    """A list of results as one JSON file."""
    replace_file(path, json.dumps(results))


def replace_file(path: Path, text: str) -> None:
    """Write a file under another name, then give it its own: a reader finds the old one or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        unfinished.write_text(text, encoding="utf-8")
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def number(key: int | str) -> int | str:
    """An id as the number that it was before it became text on its way (a key of a JSON object); else as it is."""
    return int(key) if isinstance(key, str) and key.isdecimal() else key
