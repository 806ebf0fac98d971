"""What the files of a checkpoint hold: the same under every strategy and number of ranks, so that any resumes from any.

model.safetensors       every weight, whole, in the model's own type; of a model with adapters, what trains
optimizer.safetensors   AdamW's moments by parameter name, whole, in fp32; how many steps they have seen
scheduler.pt            the place in the learning rates' schedule
scaler.pt               fp16's loss scale, under ddp (DeepSpeed finds its own again within a few steps)
rng_state*.pth          each rank's random state
progress.json           ranks, global batch, the last gradient norms, the fingerprint of what adapters lie over
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


def whole_weights(trainer: VqaTrainer) -> dict[str, Tensor]:
    """The weights that are saved, whole, in the types they had before a strategy changed them; on rank 0 alone."""
    found = trainer.whole.weights(trainer.saved)
    return {name: weight.to("cpu", trainer.saved[name]) for name, weight in found if ranks.is_first()}


def write_weights(trainer: VqaTrainer, path: Path) -> None:
    """Write the whole weights in the model's own type, from rank 0; all ranks together."""
    whole = whole_weights(trainer)
    if ranks.is_first():
        named = {trainer.vlm.saved_name(name): weight.contiguous() for name, weight in whole.items()}
        save_file(named, path, {"format": "pt"})


def put_weights(trainer: VqaTrainer, path: Path) -> None:
    """Put back what `write_weights` wrote; all ranks together."""
    saved = load_file(path)
    trainer.whole.put_weights({name: saved[trainer.vlm.saved_name(name)] for name in trainer.saved})


def write(trainer: VqaTrainer, folder: Path) -> None:
    """Write all that a run needs to resume; all ranks together."""
    write_weights(trainer, folder / WEIGHTS)
    moments = {name: moment.float().cpu() for name, moment in trainer.whole.moments() if ranks.is_first()}
    trainer._save_rng_state(str(folder))
    if not ranks.is_first():
        return
    contiguous = {name: moment.contiguous() for name, moment in moments.items()}
    save_file(contiguous, folder / MOMENTS, {"step": str(trainer.whole.step())})
    schedule: Any = trainer.lr_scheduler
    torch.save(schedule.state_dict(), folder / SCHEDULER_NAME)
    trainer._save_scaler(str(folder))
    seen = {
        "world_size": ranks.world_size(),
        "global_batch": trainer.global_batch,
        "norms": trainer.clipping.norms,
        "base": trainer.base,
    }
    (folder / PROGRESS).write_text(json.dumps(seen) + "\n")
    exported: Any = trainer.state.stateful_callbacks
    exported["TrainerControl"] = trainer.control.state()
    trainer.state.save_to_json(str(folder / TRAINER_STATE_NAME))
    if trainer.describe is not None:
        trainer.describe(folder)


def load(trainer: VqaTrainer, folder: Path) -> None:
    """Put back what `write` wrote, into a trainer that is ready for its first step."""
    put_weights(trainer, folder / WEIGHTS)
    with safe_open(folder / MOMENTS, framework="pt") as file:
        step = int(file.metadata()["step"])
        trainer.whole.put_moments({name: file.get_tensor(name) for name in file.keys()}, step)  # noqa: SIM118
    _load_schedule(trainer, folder)
    if getattr(trainer.accelerator, "scaler", None) is not None:  # DeepSpeed begins with its own anew
        trainer._load_scaler(str(folder))
    trainer.clipping.norms = progress(folder)["norms"]


def progress(folder: Path) -> dict[str, Any]:
    """Ranks, global batch, last gradient norms and the adapters' base when a checkpoint was written."""
    found: dict[str, Any] = json.loads((folder / PROGRESS).read_text())
    return found


def total_steps(folder: Path) -> int:
    """How many optimizer steps the run that wrote a checkpoint was to make."""
    found: int = json.loads((folder / TRAINER_STATE_NAME).read_text())["max_steps"]
    return found


def _load_schedule(trainer: VqaTrainer, folder: Path) -> None:
    """Take the place in the schedule from the checkpoint, length and rates from this run, and print what that changes.

    Both are the checkpoint's own, unless the run is extended or resumed by resume_force.
    """
    schedule: Any = trainer.lr_scheduler
    saved = torch.load(folder / SCHEDULER_NAME, map_location="cpu", weights_only=True)
    before, place = [float(rate) for rate in saved["_last_lr"]], saved["last_epoch"]
    pairs = zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)
    rates = [float(base) * scale(place) for base, scale in pairs]
    if [float(rate) for rate in saved["base_lrs"]] == [float(rate) for rate in schedule.base_lrs]:
        schedule.load_state_dict(saved)
    schedule.last_epoch = place
    if len(before) == len(rates) and all(math.isclose(*pair, rel_tol=1e-6) for pair in zip(before, rates, strict=True)):
        rates = before  # to the last bit
    else:
        kind = str(getattr(trainer.args.lr_scheduler_type, "value", trainer.args.lr_scheduler_type))
        ranks.say(
            f"learning rate after step {trainer.state.global_step:,}: {max(before):.3g} before, {max(rates):.3g} now "
            f"(the {kind} schedule spans {trainer.state.max_steps:,} steps)"
        )
    schedule._last_lr = rates
    for group, rate in zip(trainer.plain_optimizer().param_groups, rates, strict=True):
        group["lr"] = group["lr"].fill_(rate) if isinstance(group["lr"], Tensor) else float(rate)
