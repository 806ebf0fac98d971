"""The loggers: TensorBoard, Weights & Biases, MLflow, a CSV table. All write below the run's folder, unless told.

A resumed run continues in the same place with each of them. TensorBoard and the table lose what came
after the checkpoint; Weights & Biases and MLflow cannot take a point back, and hold it twice.
"""

from __future__ import annotations

import csv
import io
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from vlmvqa.data.submissions import replace_file
from vlmvqa.errors import InputError
from vlmvqa.training.samples import Sample

# In a run's folder: what the run is called there.
WANDB_RUN, MLFLOW_RUN = ".wandb_run", ".mlflow_run"
PROJECT = "vlmvqa"  # with those who ask for one, where WANDB_PROJECT or MLFLOW_EXPERIMENT_NAME says no other


@dataclass(frozen=True)
class Run:
    """What a logger is opened with.

    Attributes:
        folder: the run's.
        name: how it is called where others are.
        config: resolved.
        config_yaml: the same as text.
        code: its git state.
        step: of the checkpoint that it resumes from (0: it begins).
    """

    folder: Path
    name: str
    config: Mapping[str, Any]
    config_yaml: str
    code: str
    step: int = 0


class Logger(Protocol):
    """Where numbers go, opened for a `Run`.

    Attributes:
        shows_samples: whether it has a place for pictures.
    """

    shows_samples: bool

    def numbers(self, values: Mapping[str, float], step: int) -> None: ...

    def samples(self, samples: Sequence[Sample], step: int) -> None: ...

    def close(self, ended: bool) -> None: ...


class TensorBoard:
    """Event files in `runs/` of the run's folder."""

    shows_samples = True

    def __init__(self, run: Run) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # From this step on, what is there already no longer counts.
        self.writer = SummaryWriter(str(run.folder / "runs"), purge_step=run.step + 1)
        self.writer.add_text("config", _as_code(run.config_yaml), run.step)
        self.writer.add_text("code", run.code, run.step)
        self.writer.flush()

    def numbers(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()  # a kill must not take them along

    def samples(self, samples: Sequence[Sample], step: int) -> None:
        for sample in samples:
            if sample.picture is not None:
                picture = np.asarray(sample.picture.convert("RGB"))
                self.writer.add_image(f"samples/{sample.name}", picture, step, dataformats="HWC")
            self.writer.add_text(f"samples/{sample.name}", _as_code(sample.text()), step)
        self.writer.flush()

    def close(self, ended: bool) -> None:
        self.writer.close()


class WeightsAndBiases:
    """A run at wandb.ai, or in `wandb/` of the run's folder until `wandb sync`."""

    shows_samples = True

    def __init__(self, run: Run) -> None:
        import wandb

        self.wandb, known = wandb, run.folder / WANDB_RUN
        try:
            self.run = wandb.init(
                project=os.environ.get("WANDB_PROJECT", PROJECT),
                name=run.name,
                dir=run.folder,
                config=dict(run.config),
                id=known.read_text() if known.exists() else None,
                resume="allow" if known.exists() else None,
            )
        except wandb.Error as error:
            raise InputError(
                f"logger=wandb: Weights & Biases opens no run ({_line(error)}); run `wandb login`, set "
                "WANDB_MODE=offline to keep it on disk, or choose logger=tensorboard"
            ) from error
        known.write_text(self.run.id)
        self.run.config.update({"code": run.code}, allow_val_change=True)
        # Its own count of calls is no step of the training: curves are drawn over ours, as transformers does.
        self.run.define_metric("train/global_step")
        self.run.define_metric("*", step_metric="train/global_step", step_sync=True)

    def numbers(self, values: Mapping[str, float], step: int) -> None:
        self.run.log({**values, "train/global_step": step})

    def samples(self, samples: Sequence[Sample], step: int) -> None:
        columns: list[str | int] = ["image", "task", "question", "answer", "p", "score", "references"]
        table = self.wandb.Table(columns=columns)
        for one in samples:
            picture = None if one.picture is None else self.wandb.Image(one.picture)
            references = ", ".join(one.answers)
            table.add_data(picture, one.task, one.question, one.answer, one.probability, one.score, references)
        self.run.log({"samples": table, "train/global_step": step})

    def close(self, ended: bool) -> None:
        self.run.finish(exit_code=0 if ended else 1)


class MlFlow:
    """A run in `mlruns/` of the run's folder, or on the server that MLFLOW_TRACKING_URI names.

    A folder of files, although MLflow would rather have a database: that needs its large package (or SQLAlchemy), and
    one run's numbers are few.
    """

    shows_samples = True

    def __init__(self, run: Run) -> None:
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # a logger reports to whom it was told, nobody else
        from mlflow import MlflowClient
        from mlflow.exceptions import MlflowException

        place = os.environ.get("MLFLOW_TRACKING_URI") or (run.folder / "mlruns").resolve().as_uri()
        known = run.folder / MLFLOW_RUN
        try:
            self.client = MlflowClient(tracking_uri=place)
            self.id = known.read_text() if known.exists() else self._create(run)
            self.client.update_run(self.id, status="RUNNING")
            self.client.log_text(self.id, run.config_yaml, "config.yaml")
            self.client.set_tag(self.id, "code", run.code)
        except (MlflowException, OSError) as error:
            raise InputError(
                f"logger=mlflow: MLflow opens no run at {place} ({_line(error)}); correct MLFLOW_TRACKING_URI, leave "
                "it out to write into the run's folder, or choose logger=tensorboard"
            ) from error
        known.write_text(self.id)

    def _create(self, run: Run) -> str:
        from mlflow.entities import Param

        named = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        known = self.client.get_experiment_by_name(named)
        experiment = known.experiment_id if known else self.client.create_experiment(named)
        created: str = self.client.create_run(experiment, run_name=run.name).info.run_id
        # Once: parameters cannot be changed, and how often a resumed run logs may be.
        params = [Param(key, str(value)[:500]) for key, value in _flat(run.config)]
        for start in range(0, len(params), 100):  # the most that a server takes at once
            self.client.log_batch(created, params=params[start : start + 100])
        return created

    def numbers(self, values: Mapping[str, float], step: int) -> None:
        from mlflow.entities import Metric

        now = int(1000 * time.time())
        self.client.log_batch(self.id, metrics=[Metric(name, value, now, step) for name, value in values.items()])

    def samples(self, samples: Sequence[Sample], step: int) -> None:
        folder = f"samples/{step:08d}"
        self.client.log_text(self.id, "\n\n".join(f"{one.name}\n{one.text()}" for one in samples), f"{folder}.txt")
        for one in samples:
            if one.picture is not None:
                self.client.log_image(self.id, one.picture.convert("RGB"), f"{folder}/{one.name}.png")

    def close(self, ended: bool) -> None:
        self.client.set_terminated(self.id, "FINISHED" if ended else "KILLED")


class CsvTable:
    """`metrics.csv`: a row a step at which anything was logged, a column a name; empty where it was not."""

    shows_samples = False

    def __init__(self, run: Run) -> None:
        self.path = run.folder / "metrics.csv"
        self.rows: dict[int, dict[str, float]] = {}
        self.columns: list[str] = []
        if run.step:
            for step, row in _read_table(self.path):
                if step <= run.step:
                    self._take(row, step)
        replace_file(self.path, self._text(self.rows, header=True))

    def numbers(self, values: Mapping[str, float], step: int) -> None:
        known, before = step in self.rows, len(self.columns)
        self._take(values, step)
        if known or len(self.columns) > before:  # a line that stands already, or the first one, changes
            replace_file(self.path, self._text(self.rows, header=True))
        else:
            with self.path.open("a", encoding="utf-8", newline="") as file:
                file.write(self._text([step], header=False))

    def samples(self, samples: Sequence[Sample], step: int) -> None:
        """It has no place for them: `samples.jsonl` has."""

    def close(self, ended: bool) -> None:
        """Every row is written."""

    def _take(self, values: Mapping[str, float], step: int) -> None:
        self.columns += [name for name in values if name not in self.columns]
        self.rows.setdefault(step, {}).update(values)

    def _text(self, steps: Any, header: bool) -> str:
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, ["step", *self.columns], lineterminator="\n")
        if header:
            writer.writeheader()
        writer.writerows({"step": step, **self.rows[step]} for step in steps)
        return text.getvalue()


LOGGERS: dict[str, Callable[[Run], Logger]] = {
    "tensorboard": TensorBoard,
    "wandb": WeightsAndBiases,
    "mlflow": MlFlow,
    "csv": CsvTable,
}


def _read_table(path: Path) -> list[tuple[int, dict[str, float]]]:
    """Step and numbers of each row, without a last one that a kill cut short."""
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    whole = text[: text.rfind("\n") + 1]
    return [
        (int(row.pop("step")), {name: float(value) for name, value in row.items() if value})
        for row in csv.DictReader(io.StringIO(whole, newline=""))
    ]


def _as_code(text: str) -> str:
    """As TensorBoard, which reads Markdown, shows it letter by letter."""
    return "\n".join("    " + line for line in text.splitlines())


def _flat(value: Any, name: str = "") -> list[tuple[str, Any]]:
    if not isinstance(value, Mapping) or not value:
        return [(name, value)]
    return [leaf for key, inner in value.items() for leaf in _flat(inner, f"{name}.{key}" if name else str(key))]


def _line(error: Exception) -> str:
    return " ".join(str(error).split())
