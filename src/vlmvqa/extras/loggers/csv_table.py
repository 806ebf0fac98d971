"""CSV logger: `metrics.csv` in the run's folder."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from typing import Any

from vlmvqa.extras.loggers.tracking import Logger, RunInfo
from vlmvqa.paths import replace_file


class CsvTable(Logger):
    """One row per logged step, one column per metric; empty if a step has no such metric."""

    def __init__(self, run: RunInfo) -> None:
        self.path = run.folder / "metrics.csv"
        self.rows: dict[int, dict[str, Any]] = {}
        if run.step and self.path.exists():
            with self.path.open(encoding="utf-8", newline="") as file:
                rows = {int(row["step"]): row for row in csv.DictReader(file)}
            self.rows = {step: row for step, row in rows.items() if step <= run.step}
        self._write()

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Add numbers to the row of a step, and replace the file."""
        self.rows.setdefault(step, {"step": step}).update(metrics)
        self._write()

    def _write(self) -> None:
        columns = dict.fromkeys(["step", *(name for row in self.rows.values() for name in row)])
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.rows.values())
        replace_file(self.path, text.getvalue())
