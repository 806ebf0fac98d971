"""Load a checkpoint that `checkpoint_state.py` saved, under any strategy and number of ranks."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from transformers.trainer import SCHEDULER_NAME, TRAINER_STATE_NAME

from vlmvqa import ranks
from vlmvqa.errors import InputError
from vlmvqa.models.checkpoint import WEIGHTS
from vlmvqa.training.checkpoint_state import MOMENTS, PROGRESS

if TYPE_CHECKING:
    from vlmvqa.training.trainer import VqaTrainer


def load_weights(trainer: VqaTrainer, path: Path) -> None:
    """Load what `save_weights` saved; every rank must call this."""
    saved = load_file(path)
    trainer.full_state.load_weights({name: saved[trainer.vlm.saved_name(name)] for name in trainer.saved_dtypes})


def load(trainer: VqaTrainer, folder: Path) -> None:
    """Load what `save` saved into a trainer that is ready for its first step; every rank must call this."""
    load_weights(trainer, folder / WEIGHTS)
    with safe_open(folder / MOMENTS, framework="pt") as file:
        step = int(file.metadata()["step"])
        trainer.full_state.load_moments({name: file.get_tensor(name) for name in file.keys()}, step)  # noqa: SIM118
    _load_schedule(trainer, folder)
    if getattr(trainer.accelerator, "scaler", None) is not None:  # DeepSpeed starts with a new one
        trainer._load_scaler(str(folder))
    trainer.clipping.norms = progress(folder)["norms"]


def progress(folder: Path) -> dict[str, Any]:
    """Return a checkpoint's progress.json: world_size, global_batch, norms, base."""
    found: dict[str, Any] = json.loads((folder / PROGRESS).read_text())
    return found


def total_steps(folder: Path) -> int:
    """Return the planned number of optimizer steps of the run that saved a checkpoint."""
    found: int = json.loads((folder / TRAINER_STATE_NAME).read_text())["max_steps"]
    return found


def position(trainer: VqaTrainer, folder: Path, epoch: int, batches: int, steps_per_epoch: int) -> tuple[int, int]:
    """Return the epoch and micro-batch to resume at: after the rows trained on, whatever the batch was then.

    Args:
        epoch, batches: the position if the rows of a step are those of the checkpoint's run.
        steps_per_epoch: optimizer steps of an epoch now.

    Raises:
        InputError: the order of the rows depends on the rows of a step, which have changed.
    """
    before, now = progress(folder)["global_batch"], trainer.global_batch
    if before == now:
        return epoch, batches
    window = trainer.training_set.settings.length_window
    if window > 1:
        raise InputError(
            f"data.length_window={window}: an epoch's order depends on the rows of a step, {before} before and {now} "
            "now; keep their number"
        )
    rows = len(trainer.training_set.packing)  # without the rows that fill the last step of an epoch
    epoch, steps = divmod(trainer.state.global_step, math.ceil(rows / before))
    within = math.ceil(min(steps * before, rows) / now)
    epoch, within = epoch + within // steps_per_epoch, within % steps_per_epoch
    return epoch, within * trainer.args.gradient_accumulation_steps


def _load_schedule(trainer: VqaTrainer, folder: Path) -> None:
    """Load the schedule's step; its length and base rates come from this run's config.

    They equal the checkpoint's unless the run is extended or resumed with resume_force; a changed learning rate is
    printed.
    """
    schedule = trainer.lr_scheduler
    saved = torch.load(folder / SCHEDULER_NAME, map_location="cpu", weights_only=True)
    before, step = [float(rate) for rate in saved["_last_lr"]], saved["last_epoch"]
    pairs = zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)
    rates = [float(base) * scale(step) for base, scale in pairs]
    if [float(rate) for rate in saved["base_lrs"]] == [float(rate) for rate in schedule.base_lrs]:
        schedule.load_state_dict(saved)
    schedule.last_epoch = step
    if len(before) == len(rates) and all(math.isclose(*pair, rel_tol=1e-6) for pair in zip(before, rates, strict=True)):
        rates = before  # the saved values, bit for bit
    else:
        kind = str(getattr(trainer.args.lr_scheduler_type, "value", trainer.args.lr_scheduler_type))
        ranks.print_on_rank0(
            f"learning rate after step {trainer.state.global_step:,}: {max(before):.3g} before, {max(rates):.3g} now "
            f"(the {kind} schedule spans {trainer.state.max_steps:,} steps)"
        )
    schedule._last_lr = rates
    for group, rate in zip(trainer.plain_optimizer().param_groups, rates, strict=True):
        group["lr"] = group["lr"].fill_(rate) if isinstance(group["lr"], Tensor) else float(rate)
