"""Checks of a resumed run: settings and batch must equal those of the run before."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import yaml

from vlmvqa.config.compose import to_dict
from vlmvqa.config.schema import TrainConfig
from vlmvqa.errors import InputError, counted
from vlmvqa.training.checkpoint_loading import progress, total_steps

# Settings that determine the result of a run: a resumed run cannot change them...
DECIDES = (
    *("init_from", "model", "adapt", "data", "seed", "trainable", "learning_rates", "trainer"),
    *("clip_percentile", "loss_weighting"),
)
# ...except for data locations, evaluation and the division of the work (the global batch is checked separately).
FREE = (
    "data.root",
    "data.shards",
    "data.expected_counts",
    "data.archives",
    "data.feature_cache",
    "data.eval_split",
    "data.max_eval_samples",
    "data.extra_metrics",
    "data.on_bad_record",
    "model.language.attention",
    "model.language.loss",
    "trainer.per_device",
    "trainer.gradient_accumulation_steps",
    "trainer.activation_checkpointing",
    "trainer.torch_compile",
    "trainer.use_cpu",
    "trainer.logging",
    "trainer.eval",
    "trainer.save",
    "trainer.dataloader",
    "trainer.early_stopping",
    "trainer.report_to",
    "trainer.disable_tqdm",
)
# ...and the length, which may grow.
EPOCHS, STEPS = "trainer.num_train_epochs", "trainer.max_steps"


def refuse_changes(folder: Path, config: TrainConfig, checkpoint: Path | None) -> None:
    """Raise if the settings of a resumed run have changed, unless they only extend it.

    Args:
        checkpoint: that the run resumes from; None for a finished stage, which cannot be extended.
    """
    before = folder / "config.yaml"
    if not before.exists():
        raise InputError(
            f"{before} is missing, so this run's settings cannot be compared; resume anyway with resume_force=true"
        )
    old, new = (_flat(values) for values in (yaml.safe_load(before.read_text(encoding="utf-8")), to_dict(config)))
    changed = [
        key
        for key in sorted(old | new)
        if key.split(".")[0] in DECIDES
        and not re.sub(r"^data\.parts\.[^.]+\.", "data.", key).startswith(FREE)
        and old.get(key) != new.get(key)
        and not (checkpoint and _extends(key, old, new, checkpoint))
    ]
    if changed:
        listed = "; ".join(f"{key} was {old.get(key)} and is now {new.get(key)}" for key in changed)
        hint = ""
        if set(changed) & {EPOCHS, STEPS}:
            hint = f" (a run can be extended, not shortened: raise {STEPS} where it is set, else {EPOCHS})"
        raise InputError(
            f"{folder} cannot be resumed with changed settings: {listed}{hint}; give the previous values, "
            "choose another run.name, or resume anyway with resume_force=true"
        )


def _extends(key: str, old: dict[str, Any], new: dict[str, Any], checkpoint: Path) -> bool:
    """Return whether a changed setting extends the run: more epochs, or more steps than planned."""
    if key == STEPS:
        return bool(new.get(key, -1) > total_steps(checkpoint))
    return key == EPOCHS and new.get(STEPS, -1) <= 0 and new.get(key, 0) > old.get(key, math.inf)


def refuse_other_batch(checkpoint: Path, global_batch: int, world: int, config: TrainConfig) -> None:
    """Raise if the steps of a resumed run would have more or fewer examples than before."""
    before = progress(checkpoint)["global_batch"]
    if before == global_batch:
        return
    accumulated, rest = divmod(before, world * config.trainer["per_device_train_batch_size"])
    remedy = "choose trainer.per_device_train_batch_size and trainer.gradient_accumulation_steps that keep it"
    if accumulated and not rest:
        remedy = f"set trainer.gradient_accumulation_steps={accumulated}"
    raise InputError(
        f"{checkpoint} was trained with {counted(before, 'row')} a step, now it would be {global_batch}: {remedy}, "
        "or resume anyway with resume_force=true"
    )


def _flat(value: Any, name: str = "") -> dict[str, Any]:
    if not isinstance(value, dict) or not value:
        return {name: value}
    return {
        key: leaf
        for part, inner in value.items()
        for key, leaf in _flat(inner, f"{name}.{part}" if name else str(part)).items()
    }
