"""The logs of a run's stages, separately and as one."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vlmvqa.training.log import read_log
from vlmvqa.training.run_folder import STAGES

Log = Sequence[Mapping[str, Any]]


def stage_logs(folder: Path) -> dict[str, Log]:
    """Return the log of each stage of a run by name; the log of a run without stages under ""."""
    record = folder / STAGES
    places = json.loads(record.read_text(encoding="utf-8")) if record.exists() else {"": "."}
    return {name: read_log(folder / place / "log.jsonl") for name, place in places.items()}


def join(logs: Mapping[str, Log]) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """Return the records of all stages with steps and epochs counted on, and the steps before each stage."""
    joined: list[dict[str, Any]] = []
    starts: dict[str, int] = {}
    for name, log in logs.items():
        steps = starts[name] = max((record["step"] for record in joined), default=0)
        epochs = max((record.get("epoch", 0.0) for record in joined), default=0.0)
        for record in log:
            more = {"epoch": record["epoch"] + epochs} if "epoch" in record else {}
            joined.append({**record, "step": record["step"] + steps, **more})
    return joined, starts
