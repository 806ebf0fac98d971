"""Write results files for the benchmarks' servers and scripts, atomically."""

from __future__ import annotations

import json
import os
import uuid
from pathlib import Path
from typing import Any


def write_json(path: Path, results: list[dict[str, Any]]) -> None:
    """Write a list of results as one JSON file."""
    replace_file(path, json.dumps(results))


def replace_file(path: Path, text: str) -> None:
    """Write a file under a temporary name, then rename it: a reader finds the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        unfinished.write_text(text, encoding="utf-8")
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def numeric_id(key: int | str) -> int | str:
    """Convert an id that became a string (as a key of a JSON object) back to a number; return others unchanged."""
    return int(key) if isinstance(key, str) and key.isdecimal() else key
