"""The folder of a training run: checks before it is used, and the checkpoint that a run resumes from."""

from __future__ import annotations

import json
import math
import os
import platform
import re
import shlex
import shutil
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml

from vlmvqa import ranks
from vlmvqa.code_state import code_state, versions
from vlmvqa.config.compose import to_dict, to_yaml
from vlmvqa.config.schema import TrainConfig
from vlmvqa.errors import InputError, counted
from vlmvqa.paths import replace_file
from vlmvqa.ranks import LAUNCH
from vlmvqa.training.checkpoint_state import progress, total_steps
from vlmvqa.training.checkpoints import LATEST, newest_intact, point, remove_incomplete
from vlmvqa.training.log import SAMPLES

if TYPE_CHECKING:
    from vlmvqa.extras.adapters.peft_adapters import Adapter

SWEEP = "multirun.yaml"  # Hydra's record of a sweep, in the sweep's folder
RUN = "run.json"  # time, command, device and code of every start
STARTED = ".launch"  # id of the torchrun launch that started this run
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
    "trainer.report_to",
    "trainer.disable_tqdm",
)
# ...and the length, which may grow.
EPOCHS, STEPS = "trainer.num_train_epochs", "trainer.max_steps"


def is_resumed(folder: Path, config: TrainConfig) -> bool:
    """Return whether the run resumes: with resume=auto, or because torchrun restarted it after a failure.

    A run was restarted if the folder holds the id of its own launch. torchrun's restart count differs between machines,
    and does not show whether the attempt before had started.
    """
    if config.resume not in (None, "auto"):
        raise InputError(f"resume={config.resume} is unknown; use resume=auto, or leave it out to start over")
    launch, named = os.environ.get(LAUNCH), folder / STARTED
    return config.resume == "auto" or (launch is not None and named.exists() and named.read_text() == launch)


def refuse_run(folder: Path, config: TrainConfig) -> None:
    """Raise if the folder holds a run that is neither resumed nor replaced."""
    log = folder / "log.jsonl"  # empty if the run failed before its first entry
    holds = (log.exists() and log.stat().st_size > 0) or any(folder.glob("checkpoint-*"))
    if not is_resumed(folder, config) and holds and not config.run.overwrite:
        raise InputError(
            f"{folder} already holds a run; resume it with resume=auto, choose another run.name, "
            "or replace it with run.overwrite=true"
        )
    if holds and not is_resumed(folder, config) and (folder / SWEEP).exists():
        raise InputError(f"{folder} also holds the runs of a sweep, which would be deleted; choose another run.name")


def open_run(folder: Path, config: TrainConfig, global_batch: int, world: int) -> tuple[Path | None, list[str]]:
    """Create the run's folder, or empty it if the run starts from the beginning.

    Args:
        global_batch: examples per optimizer step.
        world: number of ranks.

    Returns:
        the checkpoint to resume from, if any; and messages to print.
    """
    resumed = is_resumed(folder, config)
    if not resumed and (folder / "log.jsonl").exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if LAUNCH in os.environ:
        (folder / STARTED).write_text(os.environ[LAUNCH])
    if not resumed:
        loggers = folder.glob(".*_run")  # their run ids
        for left in (folder / "skipped.jsonl", folder / SAMPLES, folder / RUN, *loggers):
            left.unlink(missing_ok=True)  # by a run that ended before its first step
    messages = [
        f"{unfinished} is incomplete (writing it was interrupted) and was removed"
        for unfinished in remove_incomplete(folder)
    ]
    checkpoint, complaints = newest_intact(folder) if resumed else (None, [])
    if checkpoint is not None:
        if not config.resume_force:
            _refuse_changes(folder, config, checkpoint)
            _refuse_other_batch(checkpoint, global_batch, world, config)
        point(folder / LATEST, checkpoint)
        messages += [*complaints, f"resuming from {checkpoint}"]
    elif resumed and not complaints and (folder / "config.yaml").exists():
        messages.append(f"{folder} holds no checkpoint yet, so training starts from the beginning")
    elif complaints:
        raise InputError(f"{folder}: no checkpoint is complete ({complaints[0]}); start over with run.overwrite=true")
    (folder / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
    return checkpoint, messages


def record_start(folder: Path, step: int) -> None:
    """Add this start to `run.json`.

    Args:
        step: step of the checkpoint that the run resumes from; 0 without one.
    """
    path = folder / RUN
    before = json.loads(path.read_text(encoding="utf-8"))["starts"] if path.exists() else []
    code = code_state()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU ({platform.machine()})"
    start = {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "from_step": step,
        "command": shlex.join(sys.argv),
        "git": {"commit": code.commit, "changed": code.changed, **({"reason": code.reason} if code.reason else {})},
        "ranks": ranks.world_size(),
        "device": device,
        "versions": versions(),
    }
    replace_file(path, json.dumps({"starts": [*before, start]}, indent=2) + "\n")


def _refuse_changes(folder: Path, config: TrainConfig, checkpoint: Path) -> None:
    """Raise if the settings of a resumed run have changed, unless they only extend it."""
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
        and not _extends(key, old, new, checkpoint)
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


def _refuse_other_batch(checkpoint: Path, global_batch: int, world: int, config: TrainConfig) -> None:
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


def refuse_other_base(checkpoint: Path | None, adapter: Adapter) -> None:
    """Raise if the base weights differ from those that the adapters of a resumed run were trained on."""
    if checkpoint is not None and progress(checkpoint).get("base") != adapter.fingerprint:
        raise InputError(
            f"{checkpoint} was trained over other weights than {adapter.base} holds now; put back the base it was "
            "trained on, or start over with run.overwrite=true"
        )


def _flat(value: Any, name: str = "") -> dict[str, Any]:
    if not isinstance(value, dict) or not value:
        return {name: value}
    return {
        key: leaf
        for part, inner in value.items()
        for key, leaf in _flat(inner, f"{name}.{part}" if name else str(part)).items()
    }
