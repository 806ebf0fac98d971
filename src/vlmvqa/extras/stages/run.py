"""Train the stages of a run that are not finished, one after the other."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence

from transformers import TrainerCallback

from vlmvqa import ranks
from vlmvqa.config import compatibility
from vlmvqa.config.schema import DistSettings, TrainConfig
from vlmvqa.errors import InputError
from vlmvqa.extras.run_series.training import ask_rank0, isolated_job
from vlmvqa.extras.stages.settings import stage_runs
from vlmvqa.models.checkpoint import CONFIG
from vlmvqa.paths import replace_file
from vlmvqa.ranks import LAUNCH
from vlmvqa.training.initial_model import with_saved_model
from vlmvqa.training.resume import refuse_changes
from vlmvqa.training.run import train_once
from vlmvqa.training.run_folder import STAGES, STARTED, is_resumed, refuse_run


def train_stages(config: TrainConfig, callbacks: Sequence[TrainerCallback] = ()) -> bool:
    """Train the stages that are not finished, and score the last one; return whether a signal stopped it.

    Args:
        callbacks: of the last stage.
    """
    runs = stage_runs(config)
    for run in runs.values():
        compatibility.check(run, run.dist or DistSettings())
    finished = ask_rank0(lambda: open_folder(config, runs))
    for number, (name, run) in enumerate(runs.items(), start=1):
        if number == len(runs):
            ranks.print_on_rank0(f"\nstage {number} of {len(runs)}: {name}")
            return train_once(run, callbacks)
        if number <= finished:
            ranks.print_on_rank0(f"stage {number} of {len(runs)}: {name} is finished")
            continue
        ranks.print_on_rank0(f"\nstage {number} of {len(runs)}: {name}")
        with isolated_job():
            if train_once(run, is_scored=False):
                return True
    return train_once(config, callbacks)  # replaces a run with stages


def open_folder(config: TrainConfig, runs: Mapping[str, TrainConfig]) -> int:
    """Create the run's folder, or empty it if the run starts over; return the number of finished stages.

    Raises:
        InputError: the folder holds another run, or the settings of a finished stage have changed.
    """
    folder = config.run.folder
    refuse_run(folder, config)
    record, resumed = folder / STAGES, is_resumed(folder, config)
    before = list(json.loads(record.read_text(encoding="utf-8"))) if record.exists() else []
    holds = bool(before) or (folder / "log.jsonl").exists()
    if holds and (before != list(runs) if resumed else not config.run.overwrite):
        stages = f"the stages {', '.join(before)}" if before else "no stages"
        raise InputError(
            f"{folder} already holds a run with {stages}; "
            "resume it by its own command with resume=auto, choose another run.name, or replace it with "
            "run.overwrite=true"
        )
    if holds and not resumed:
        shutil.rmtree(folder)
    if not runs:
        return 0
    if LAUNCH in os.environ:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / STARTED).write_text(os.environ[LAUNCH])
    places = {name: os.path.relpath(run.run.folder, folder) for name, run in runs.items()}
    replace_file(record, json.dumps(places, indent=1) + "\n")
    finished = [run for run in list(runs.values())[:-1] if (run.run.folder / "model" / CONFIG).is_file()]
    for run in finished if not config.resume_force else ():
        refuse_changes(run.run.folder, run if run.init_from is None else with_saved_model(run), None)
    return len(finished)
