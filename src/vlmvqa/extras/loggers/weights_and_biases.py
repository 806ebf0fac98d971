"""Weights & Biases logger: a run at wandb.ai, or offline in `wandb/` of the run's folder until `wandb sync`."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

import wandb

from vlmvqa.errors import InputError
from vlmvqa.extras.loggers import PROJECT
from vlmvqa.extras.loggers.samples import Sample
from vlmvqa.extras.loggers.tracking import RUN_ID_FILES, Logger, RunInfo


class WeightsAndBiases(Logger):
    """Metrics, and samples as a table with images."""

    shows_samples = True

    def __init__(self, run: RunInfo) -> None:
        id_file = run.folder / RUN_ID_FILES["wandb"]
        try:
            self.run = wandb.init(
                project=os.environ.get("WANDB_PROJECT", PROJECT),
                name=run.name,
                dir=run.folder,
                config=dict(run.config),
                id=id_file.read_text() if id_file.exists() else None,
                resume="allow" if id_file.exists() else None,
            )
        except wandb.Error as error:
            raise InputError(
                f"logger=wandb: Weights & Biases opens no run ({' '.join(str(error).split())}); run `wandb login`, set "
                "WANDB_MODE=offline to keep it on disk, or choose logger=tensorboard"
            ) from error
        id_file.write_text(self.run.id)
        self.run.config.update({"code": run.code}, allow_val_change=True)
        # wandb's own step counts calls of log(); use the training step as the x axis, as transformers does.
        self.run.define_metric("train/global_step")
        self.run.define_metric("*", step_metric="train/global_step", step_sync=True)

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Log metrics at a training step."""
        self.run.log({**metrics, "train/global_step": step})

    def log_samples(self, samples: Sequence[Sample], step: int) -> None:
        """Log a table of samples."""
        columns: list[str | int] = ["image", "task", "question", "answer", "p", "score", "references"]
        table = wandb.Table(columns=columns)
        for sample in samples:
            image = None if sample.thumbnail is None else wandb.Image(sample.thumbnail)
            values = (sample.task, sample.question, sample.answer, sample.probability, sample.score)
            table.add_data(image, *values, ", ".join(sample.answers))
        self.run.log({"samples": table, "train/global_step": step})

    def close(self, finished: bool) -> None:
        """Mark the run as finished or failed."""
        self.run.finish(exit_code=0 if finished else 1)
