"""JSON lines files of a run, such as `log.jsonl` with one line per logging step."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def append(path: Path, records: list[dict[str, Any]]) -> None:
    """Append records, one line each, in a single write."""
    with path.open("a", encoding="utf-8") as file:
        file.write("".join(json.dumps(record) + "\n" for record in records))


def truncate(path: Path, step: int) -> None:
    """Keep the records up to a step (0: none); create the file if it is missing."""
    kept = [record for record in read_log(path) if record["step"] <= step] if step else []
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in kept), encoding="utf-8")


def read_log(path: Path) -> list[dict[str, Any]]:
    """Return the records of a file, without a last line that a kill has cut off; none if the file is missing."""
    records = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records
