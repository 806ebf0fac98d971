"""Save and load the files of a checkpoint, which are the same under every strategy and number of ranks.

model.safetensors       full weights in the model's own dtypes; with adapters, only the trained weights
optimizer.safetensors   AdamW's full moments in fp32 by parameter name, and their number of steps
scheduler.pt            the learning rate schedule
scaler.pt               fp16's loss scale under ddp (DeepSpeed finds its own again within a few steps)
rng_state*.pth          random state of each rank
progress.json           number of ranks, global batch, last gradient norms, fingerprint of the adapters' base model
trainer_state.json      transformers' own: step, epoch, best score
config.json, tokenizer  as in `model/` (models/checkpoint.py), so that a checkpoint loads like a saved model
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.trainer import SCHEDULER_NAME, TRAINER_STATE_NAME

from vlmvqa import ranks

if TYPE_CHECKING:
    from vlmvqa.training.trainer import VqaTrainer

WEIGHTS, MOMENTS, PROGRESS = "model.safetensors", "optimizer.safetensors", "progress.json"


def full_weights(trainer: VqaTrainer) -> dict[str, Tensor]:
    """Return the full weights that are saved, in host memory and their original dtypes; empty except on rank 0."""
    gathered = trainer.full_state.weights(trainer.saved_dtypes)
    return {name: weight.to("cpu", trainer.saved_dtypes[name]) for name, weight in gathered if ranks.is_first()}


def save_weights(trainer: VqaTrainer, path: Path) -> None:
    """Save the full weights in the model's own dtypes; every rank must call this, rank 0 writes."""
    weights = full_weights(trainer)
    if ranks.is_first():
        named = {trainer.vlm.saved_name(name): weight.contiguous() for name, weight in weights.items()}
        save_file(named, path, {"format": "pt"})


def load_weights(trainer: VqaTrainer, path: Path) -> None:
    """Load what `save_weights` saved; every rank must call this."""
    saved = load_file(path)
    trainer.full_state.load_weights({name: saved[trainer.vlm.saved_name(name)] for name in trainer.saved_dtypes})


def save(trainer: VqaTrainer, folder: Path) -> None:
    """Save everything that resuming a run needs; every rank must call this."""
    save_weights(trainer, folder / WEIGHTS)
    moments = {name: moment.float().cpu() for name, moment in trainer.full_state.moments() if ranks.is_first()}
    trainer._save_rng_state(str(folder))
    if not ranks.is_first():
        return
    contiguous = {name: moment.contiguous() for name, moment in moments.items()}
    save_file(contiguous, folder / MOMENTS, {"step": str(trainer.full_state.step())})
    torch.save(trainer.lr_scheduler.state_dict(), folder / SCHEDULER_NAME)
    trainer._save_scaler(str(folder))
    progress = {
        "world_size": ranks.world_size(),
        "global_batch": trainer.global_batch,
        "norms": trainer.clipping.norms,
        "base": trainer.base_fingerprint,
    }
    (folder / PROGRESS).write_text(json.dumps(progress) + "\n")
    trainer.state.stateful_callbacks["TrainerControl"] = trainer.control.state()
    trainer.state.save_to_json(str(folder / TRAINER_STATE_NAME))
    if trainer.describe is not None:
        trainer.describe(folder)


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
        rates = before  # bit for bit
    else:
        kind = str(getattr(trainer.args.lr_scheduler_type, "value", trainer.args.lr_scheduler_type))
        ranks.print_on_rank0(
            f"learning rate after step {trainer.state.global_step:,}: {max(before):.3g} before, {max(rates):.3g} now "
            f"(the {kind} schedule spans {trainer.state.max_steps:,} steps)"
        )
    schedule._last_lr = rates
    for group, rate in zip(trainer.plain_optimizer().param_groups, rates, strict=True):
        group["lr"] = group["lr"].fill_(rate) if isinstance(group["lr"], Tensor) else float(rate)
