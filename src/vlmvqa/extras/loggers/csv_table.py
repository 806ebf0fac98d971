"""CSV logger: `metrics.csv` in the run's folder."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping
from pathlib import Path

from vlmvqa.extras.loggers.tracking import Logger, RunInfo
from vlmvqa.paths import replace_file


class CsvTable(Logger):
    """One row per logged step, one column per metric; empty if a step has no such metric."""

    def __init__(self, run: RunInfo) -> None:
        self.path = run.folder / "metrics.csv"
        self.rows: dict[int, dict[str, float]] = {}
        self.columns: list[str] = []
        if run.step:
            for step, row in _read_table(self.path):
                if step <= run.step:
                    self._add(row, step)
        self._rewrite()

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Append a row; rewrite the file if the step exists or there is a new column."""
        exists, columns = step in self.rows, len(self.columns)
        self._add(metrics, step)
        if exists or len(self.columns) > columns:
            self._rewrite()
        else:
            with self.path.open("a", encoding="utf-8", newline="") as file:
                self._writer(file).writerow({"step": step, **self.rows[step]})

    def _add(self, metrics: Mapping[str, float], step: int) -> None:
        self.columns += [name for name in metrics if name not in self.columns]
        self.rows.setdefault(step, {}).update(metrics)

    def _rewrite(self) -> None:
        text = io.StringIO(newline="")
        writer = self._writer(text)
        writer.writeheader()
        writer.writerows({"step": step, **row} for step, row in self.rows.items())
        replace_file(self.path, text.getvalue())

    def _writer(self, file: io.TextIOBase) -> csv.DictWriter[str]:
        return csv.DictWriter(file, ["step", *self.columns], lineterminator="\n")


def _read_table(path: Path) -> Iterable[tuple[int, dict[str, float]]]:
    """Yield step and metrics of each row, without a truncated last row of a killed run."""
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    complete = text[: text.rfind("\n") + 1]
    for row in csv.DictReader(io.StringIO(complete, newline="")):
        yield int(row.pop("step")), {name: float(value) for name, value in row.items() if value}
