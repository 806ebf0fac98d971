"""Output of a training: records in `log.jsonl`, printed lines, a progress bar, a table of the model's parts."""

from __future__ import annotations

import json
import textwrap
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm
from transformers import (
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from vlmvqa import ranks
from vlmvqa.models.interface import Model
from vlmvqa.training.checkpoint_state import num_elements

# Values printed for a training step, with their format and digits; `log.jsonl` and the loggers get all values.
PRINTED = {
    "loss": ("loss {}", 4),
    "learning_rate": ("lr {}", 3),
    "grad_norm": ("grad norm {}", 3),
    "questions_per_second": ("{} questions/s", 3),
}
SAMPLES = "samples.jsonl"  # in a run's folder: answers to the same questions at every evaluation
WIDTH = 99  # columns of a printed line
BAR_FORMAT = "{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt}, {remaining} left{postfix}"


def parts_table(model: Model, groups: Sequence[Mapping[str, Any]]) -> str:
    """Return a table of the model's parts: parameters, trained parameters, dtype, learning rate.

    Args:
        groups: the optimizer's parameter groups (`VqaTrainer.parameter_groups`).
    """
    rates = {group["name"]: group["lr"] for group in groups}
    parts = {name: list(model.part(name).parameters) for name in ("vision", "projector", "language")}
    lines = [f"{'module':<12}{'parameters':>16}{'trained':>16}  {'dtype':<10}{'learning rate':>14}"]
    for name, parameters in [*parts.items(), ("total", list(model.parameters()))]:
        trained = sum(p.numel() for p in parameters if p.requires_grad)
        dtypes = "/".join(sorted({str(p.dtype).removeprefix("torch.") for p in parameters}))
        rate = "" if name == "total" else f"{rates[name]:g}" if name in rates else "-"
        count = sum(num_elements(p) for p in parameters)
        lines.append(f"{name:<12}{count:>16,}{f'{trained:,}' if trained else 'frozen':>16}  {dtypes:<10}{rate:>14}")
    return "\n".join(lines)


def rounded(value: float) -> float:
    """Round to four significant digits; to an integer from 1,000 on."""
    return round(value) if abs(value) >= 1000 else float(f"{value:.4g}")


def short(value: Any, digits: int = 4) -> str:
    """Format a number with so many significant digits, without an exponent up to a million."""
    if not isinstance(value, int | float):
        return str(value)
    return f"{value:,.0f}" if 10**digits - 0.5 <= abs(value) < 1e6 else f"{value:.{digits}g}"


def format_values(logs: Mapping[str, Any], names: Iterable[str]) -> str:
    """Format the named values that a log record contains."""
    found = [(name, *PRINTED.get(name, (f"{name} {{}}", 4))) for name in names if name in logs]
    return ", ".join(text.format(short(logs[name], digits)) for name, text, digits in found)


def log_line(logs: Mapping[str, Any], state: TrainerState, time_left: str = "") -> str:
    """Format a log record: the `PRINTED` values of a training step, all values of an evaluation.

    Args:
        time_left: shown after the step, where no progress bar shows it.
    """
    names = PRINTED if "loss" in logs else [name for name in logs if name != "epoch"]
    left = f", {time_left} left" if time_left else ""
    line = f"step {state.global_step:,}/{state.max_steps:,}{left}: {format_values(logs, names)}"
    return textwrap.fill(line, WIDTH, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)


class ProgressBar(ProgressCallback):
    """The Trainer's progress bar, followed by the last loss, learning rate and throughput.

    It starts at the step that a run resumes from, so the time left is estimated from this run's steps.
    """

    training_bar: Any

    def on_train_begin(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        """Create the bar."""
        self.current_step = state.global_step
        if state.is_world_process_zero:
            self.training_bar = tqdm(
                total=state.max_steps, initial=state.global_step, dynamic_ncols=True, bar_format=BAR_FORMAT
            )

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **more: Any) -> None:
        """Print the record above the bar and update the values after it."""
        if self.training_bar is None or not logs:
            return
        self.training_bar.write(log_line(logs, state))
        if "loss" in logs:
            self.training_bar.set_postfix_str(format_values(logs, ("loss", "learning_rate", "questions_per_second")))


class LinePrinter(PrinterCallback):
    """Print log records with the time left, where there is no progress bar."""

    def __init__(self) -> None:
        self.start_time, self.start_step = 0.0, 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        """Record when and at which step the training starts."""
        self.start_time, self.start_step = time.monotonic(), state.global_step

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **more: Any) -> None:
        """Print the record."""
        if not state.is_world_process_zero or not logs:
            return
        done, remaining = state.global_step - self.start_step, state.max_steps - state.global_step
        left = tqdm.format_interval((time.monotonic() - self.start_time) / done * remaining) if done else ""
        print(log_line(logs, state, left), flush=True)


def replace_progress_callbacks(trainer: Trainer) -> None:
    """Replace the Trainer's progress bar or printer."""
    for theirs, ours in ((ProgressCallback, ProgressBar), (PrinterCallback, LinePrinter)):
        if trainer.pop_callback(theirs) is not None:
            trainer.add_callback(ours)


# ---- files of records


def write_records(path: Path, records: list[dict[str, Any]]) -> None:
    """Append records to a JSON lines file, in a single write."""
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


class LogFile(TrainerCallback):
    """Write every logged record to `log.jsonl`; a resumed run removes the records after its checkpoint."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Remove the records after the current step."""
        if ranks.is_first():
            truncate(self.path, state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        """Append a record."""
        if ranks.is_first() and self.path.parent.exists():
            write_records(self.path, [{"step": state.global_step, **(logs or {})}])
