"""Training is transformers' Trainer; here is only what it does not do.

loss          over supervised tokens, divided by those of the whole global batch (the Trainer counts them,
              `VLM.forward` divides)
optimizer     a learning rate a part (encoder, projector, language model), no decay on norms and biases
evaluation    answers are generated and scored, logits never leave the model
log           `log.jsonl`, one line a logging step, with questions per second
checkpoints   only whole ones count (`checkpoints.py`)
"""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from vlmvqa.data.batch import Processor, TrainingSet
from vlmvqa.errors import InputError
from vlmvqa.models.vlm import VLM
from vlmvqa.sequence.rows import IGNORE, PROMPT
from vlmvqa.training.checkpoints import remove_unfinished, whole_checkpoints

PARTS = ("vision", "projector", "language")


class VqaTrainer(Trainer):
    """transformers' Trainer over a `VLM` and a `TrainingSet`.

    Args:
        score: called with nothing at every evaluation; its numbers are logged with the prefix `eval_`.
        learning_rates: of each part, where it differs from `args.learning_rate` (None: it does not).
    """

    def __init__(
        self,
        model: VLM,
        args: TrainingArguments,
        training_set: TrainingSet,
        processor: Processor,
        images_per_row: int = 1,
        learning_rates: Mapping[str, float | None] | None = None,
        score: Callable[[], Mapping[str, float]] | None = None,
    ) -> None:
        self.vlm, self.folder = model, Path(str(args.output_dir))
        self.learning_rates = dict(learning_rates or {})
        self.score = score
        self.questions_seen, self.counting_since = 0, 0.0
        super().__init__(
            model=model,
            args=args,
            data_collator=lambda encoded: processor.collate(encoded, images_per_row),
            train_dataset=training_set,
            # `evaluate` brings its own questions, but the Trainer wants to see a data set before it evaluates.
            eval_dataset=training_set if score else None,
            callbacks=[LogFile(self.folder / "log.jsonl"), EpochOfTargets(training_set)],
        )

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Groups by part and by whether weights decay; the scheduler scales each group's own rate."""
        if self.optimizer is None:
            kind, arguments = self.get_optimizer_cls_and_kwargs(self.args)
            self.optimizer = kind(self.parameter_groups(), **arguments)
        return self.optimizer

    def parameter_groups(self) -> list[dict[str, Any]]:
        """The optimizer's groups: `params`, `lr`, `weight_decay`, and the `name` of the part."""
        decayed = set(self.get_decay_parameter_names(self.vlm))
        groups = []
        for part in PARTS:
            named = [(n, p) for n, p in self.vlm.named_parameters() if n.startswith(part + ".") and p.requires_grad]
            rate = self.learning_rates.get(part)
            rate = self.args.learning_rate if rate is None else rate
            for decays in (True, False):
                params = [p for n, p in named if (n in decayed) == decays]
                decay = self.args.weight_decay if decays else 0.0
                if params:
                    groups.append({"params": params, "lr": rate, "weight_decay": decay, "name": part})
        if not groups:
            raise InputError("nothing trains: every part is set to trainable=none; set one to all")
        return groups

    def training_step(
        self, model: nn.Module, inputs: dict[str, Tensor | Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        self.counting_since = self.counting_since or time.perf_counter()
        self.questions_seen += int(((inputs["role"] == PROMPT) & (inputs["labels"] != IGNORE)).sum())
        loss = super().training_step(model, inputs, num_items_in_batch)
        if not torch.isfinite(loss):
            raise self._diverged(f"the loss is {loss.item()}")
        return loss

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        if norm is not None and not math.isfinite(float(norm)):
            raise self._diverged(f"the gradient norm is {float(norm)}")
        return norm

    def _diverged(self, what: str) -> InputError:
        kept = whole_checkpoints(self.folder)
        last = f"the last good checkpoint is {kept[-1]}" if kept else "no checkpoint was written before it"
        return InputError(
            f"{what} at step {self.state.global_step + 1}, so training stopped before the weights took it in; {last}; "
            "lower trainer.learning_rate or trainer.max_grad_norm, or look at the data"
        )

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Generate and score answers, instead of the Trainer's loop over logits."""
        if self.score is None:
            raise InputError("the trainer was built without questions to evaluate on")
        started = time.perf_counter()
        metrics = {f"eval_{name}": value for name, value in self.score().items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        self.counting_since += time.perf_counter() - started  # questions per second are training's
        return metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            now = time.perf_counter()
            logs["questions_per_second"] = self.questions_seen / (now - self.counting_since)
            self.questions_seen, self.counting_since = 0, now
        super().log(logs, start_time)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        try:
            super()._save_checkpoint(model, trial)
        except (OSError, RuntimeError, SafetensorError) as error:
            free = shutil.disk_usage(self.folder).free  # before the unfinished checkpoint's part is given back
            remove_unfinished(self.folder)
            if "No space left on device" not in str(error) and free > 2**20:
                raise  # torch.save says only that its writer failed
            kept = whole_checkpoints(self.folder)
            raise InputError(
                f"the disk of {self.folder} is full: checkpoint {self.state.global_step} was not kept"
                f"{f', {kept[-1]} is whole' if kept else ''}; free space and go on with resume=auto"
            ) from error


class LogFile(TrainerCallback):
    """Every logged record as a line of `log.jsonl`; a resumed run cuts what came after its checkpoint."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        records = read_log(self.path)
        kept = [record for record in records if record["step"] <= state.global_step] if state.global_step else []
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text("".join(json.dumps(record) + "\n" for record in kept))

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        if state.is_world_process_zero and self.path.parent.exists():
            with self.path.open("a") as file:
                file.write(json.dumps({"step": state.global_step, **(logs or {})}) + "\n")


class EpochOfTargets(TrainerCallback):
    """Tells the training set which epoch it is, for targets drawn anew each epoch.

    accelerate forwards the epoch to the data set in one process only, to the sampler in several.
    """

    def __init__(self, training_set: TrainingSet) -> None:
        self.training_set = training_set

    def on_epoch_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.training_set.set_epoch(int((state.epoch or 0) + 1e-6))


def read_log(path: Path) -> list[dict[str, Any]]:
    """The records of a `log.jsonl`, without a last line that a kill cut short."""
    records = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records
