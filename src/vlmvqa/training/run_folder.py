"""The folder of a training run: checks before it is used, and the checkpoint that a run resumes from."""

from __future__ import annotations

import json
import os
import platform
import shlex
import shutil
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path

import torch

from vlmvqa import ranks
from vlmvqa.code_state import code_state, versions
from vlmvqa.config.compose import to_yaml
from vlmvqa.config.schema import TrainConfig
from vlmvqa.errors import InputError
from vlmvqa.paths import replace_file
from vlmvqa.ranks import LAUNCH
from vlmvqa.training.checkpoints import LATEST, newest_intact, point, remove_incomplete
from vlmvqa.training.log import SAMPLES

SWEEP = "multirun.yaml"  # Hydra's record of a sweep, in the sweep's folder
RUN = "run.json"  # time, command, device and code of every start
STAGES = "stages.json"  # of a run with stages: the folder of each
STARTED = ".launch"  # id of the torchrun launch that started this run


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
            from vlmvqa.training.resume import refuse_changes, refuse_other_batch

            refuse_changes(folder, config, checkpoint)
            refuse_other_batch(checkpoint, global_batch, world, config)
        point(folder / LATEST, checkpoint)
        messages += [*complaints, f"resuming from {checkpoint}"]
    elif resumed and not complaints and (folder / "config.yaml").exists():
        messages.append(f"{folder} holds no checkpoint yet, so training starts from the beginning")
    elif complaints:
        raise InputError(f"{folder}: no checkpoint is complete ({complaints[0]}); start over with run.overwrite=true")
    (folder / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
    return checkpoint, messages


def record_start(folder: Path, step: int, parameters: Mapping[str, int]) -> None:
    """Add this start to `run.json`.

    Args:
        step: step of the checkpoint that the run resumes from; 0 without one.
        parameters: `total` and `trained` numbers of weights.
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
        "parameters": dict(parameters),
        "ranks": ranks.world_size(),
        "device": device,
        "versions": versions(),
    }
    replace_file(path, json.dumps({"starts": [*before, start]}, indent=2) + "\n")
