"""`log.jsonl`, one line a logging step; and what of such a file counts when a run resumes from a checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def append(path: Path, records: list[dict[str, Any]]) -> None:
    """Add a line a record, all of them at once."""
    with path.open("a", encoding="utf-8") as file:
        file.write("".join(json.dumps(record) + "\n" for record in records))


def cut(path: Path, step: int) -> None:
    """Keep the records up to a step (0: none) of a file of JSON lines, which is made if it is missing."""
    kept = [record for record in read_log(path) if record["step"] <= step] if step else []
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in kept), encoding="utf-8")


def read_log(path: Path) -> list[dict[str, Any]]:
    """The records of a `log.jsonl`, without a last line that a kill cut short."""
    records = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records
