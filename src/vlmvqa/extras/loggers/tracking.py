"""The experiment loggers, which get metrics, sample answers, the config and the code's git state.

`logger=tensorboard`, `wandb`, `mlflow`, `csv` or several of them get the same metrics under the same names, which are
transformers' names where it has any:

train/...   a logging step: train/loss, train/learning_rate, train/questions_per_second
eval/...    an evaluation during training: eval/vqa_accuracy
final/...   the scores of the saved model: final/vqav2_vqa_accuracy

transformers' own callbacks are not used for these four, because names, resuming and locations differ between them. Any
other service that transformers supports (`logger=comet_ml`) uses its callback.
"""

from __future__ import annotations

import atexit
import importlib
import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import TrainerCallback
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from vlmvqa.code_state import code_state
from vlmvqa.config.compatibility import Conflicts, RunRequest, missing
from vlmvqa.config.compose import to_dict, to_yaml
from vlmvqa.config.schema import TrainConfig
from vlmvqa.data.tasks import Task
from vlmvqa.errors import suggest
from vlmvqa.extras.loggers.samples import Sample, SampledQuestions
from vlmvqa.training.log import SAMPLES, write_records

# Module and class of each logger, imported on first use.
LOGGERS = {
    "tensorboard": ("vlmvqa.extras.loggers.tensorboard_events", "TensorBoard"),
    "wandb": ("vlmvqa.extras.loggers.weights_and_biases", "WeightsAndBiases"),
    "mlflow": ("vlmvqa.extras.loggers.mlflow_run", "MlflowRun"),
    "csv": ("vlmvqa.extras.loggers.csv_table", "CsvTable"),
}
# Loggers that need a package of the same name, and the file in the run's folder that stores their run id.
RUN_ID_FILES = {"wandb": ".wandb_run", "mlflow": ".mlflow_run"}


@dataclass(frozen=True)
class RunInfo:
    """Information about a run for its loggers: resolved config, git state, step it resumes from (0: a new run)."""

    folder: Path
    name: str
    config: Mapping[str, Any]
    config_yaml: str
    code: str
    step: int = 0


class Logger:
    """Base class of the loggers, constructed with a `RunInfo`; `shows_samples`: whether it displays samples."""

    shows_samples = False

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Log numbers by name."""

    def log_samples(self, samples: Sequence[Sample], step: int) -> None:
        """Log sample answers with their images."""

    def close(self, finished: bool) -> None:
        """Close the logger; `finished` is False if the run was stopped or failed."""


def open_logger(name: str, run: RunInfo) -> Logger:
    """Open one of `LOGGERS`."""
    module, class_name = LOGGERS[name]
    logger: Logger = getattr(importlib.import_module(module), class_name)(run)
    return logger


def chosen(loggers: str | Sequence[str] | None) -> tuple[list[str], list[str]]:
    """Return the loggers of a config that this project implements, and those that transformers implements."""
    named = [loggers] if isinstance(loggers, str) else list(loggers or ())
    ours = [name for name in LOGGERS if name in named]
    return ours, [name for name in named if name not in (*LOGGERS, "none")]


def conflicts(r: RunRequest) -> Conflicts:
    """Return for each logger whether it is unknown or its package is missing, with the error message."""
    ours, others = chosen(r.trainer.get("report_to"))
    known = [*LOGGERS, "none"]
    return [
        *(
            (
                name not in INTEGRATION_TO_CALLBACK,
                f"logger={name} is unknown{suggest(name, known)}; use one or several of {', '.join(known)}",
            )
            for name in others
        ),
        *(
            (missing(name), f"logger={name} needs {name}; install it with: pip install 'vlmvqa[{name}]'")
            for name in ours
            if name in RUN_ID_FILES
        ),
    ]


def named(record: Mapping[str, Any]) -> dict[str, float]:
    """Return the numbers of a record of the Trainer under the names above."""
    found = {}
    for key, value in record.items():
        if isinstance(value, int | float) and key != "step":
            found[f"eval/{key.removeprefix('eval_')}" if key.startswith("eval_") else f"train/{key}"] = float(value)
    return found


class Tracking(TrainerCallback):
    """The loggers of a run, open on rank 0 from before the first step until the final scores are known; and samples.

    Args:
        config: the run's configuration.
    """

    def __init__(self, config: TrainConfig) -> None:
        self.config, self.names = config, chosen(config.trainer["report_to"])[0]
        self.open: list[Logger] = []
        self.step = 0
        self.selected: dict[str, SampledQuestions] = {}  # by task
        self.seen: list[Sample] = []  # of the present evaluation

    def start(self, step: int) -> None:
        """Open the loggers, or resume those whose ids are in the run's folder; only rank 0 calls this.

        Args:
            step: the step that the run resumes from; 0: a new run.

        Raises:
            InputError: a logger is unavailable.
        """
        self.step, config = step, self.config
        atexit.register(self.finish)  # for runs that fail
        run = RunInfo(
            config.run.folder, str(config.run.name), to_dict(config), to_yaml(config), str(code_state()), step
        )
        for name in self.names:
            self.open.append(open_logger(name, run))

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        """Log a record's numbers."""
        self.step = state.global_step
        for logger in self.open:
            logger.log_metrics(named(logs or {}), self.step)

    def sample(self, task: Task, answers: Mapping[Any, Any], scores: Mapping[Any, float]) -> None:
        """Keep the sample answers of a task's evaluation.

        Args:
            answers: `predictor.Answer` by question id.
            scores: by question id, for questions that have one.
        """
        if task.name not in self.selected:
            config = self.config
            self.selected[task.name] = SampledQuestions.choose(
                task.evaluated, config.log_samples, config.seed, task.name
            )
        shown = any(logger.shows_samples for logger in self.open)
        self.seen += self.selected[task.name].samples(answers, scores, shown)

    def log_samples(self, step: int) -> None:
        """Write the sample answers of an evaluation to `samples.jsonl` and to the loggers that can show them."""
        samples, self.seen = self.seen, []
        if samples:
            write_records(self.config.run.folder / SAMPLES, [sample.record(step) for sample in samples])
        for logger in self.open:
            if samples and logger.shows_samples:
                logger.log_samples(samples, step)

    def finish(self, scores: Mapping[str, float | None] | None = None) -> None:
        """Log the final scores and close the loggers.

        Args:
            scores: final scores by name; None for a run that was stopped or failed.
        """
        final = {f"final/{name}": value for name, value in (scores or {}).items() if value is not None}
        for logger in self.open:
            if final:
                logger.log_metrics(final, self.step)
            logger.close(finished=scores is not None)
        self.open = []
