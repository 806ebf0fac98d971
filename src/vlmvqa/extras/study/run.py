"""Run a study: train every arm with every seed, resume after a kill, and write the comparison."""

from __future__ import annotations

import gc
import json
import os
import time
import traceback
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch
import yaml

from vlmvqa import ranks
from vlmvqa.errors import InputError, counted
from vlmvqa.extras.study import tables
from vlmvqa.extras.study.results import RunResult, is_finished, read_run, summarize
from vlmvqa.extras.study.settings import StudyConfig, StudyRun, StudySettings, build_runs
from vlmvqa.paths import replace_file
from vlmvqa.training.run import train

FROZEN = "study.yaml"  # in the study's folder: its config at the first start


def run_study(config: StudyConfig) -> bool:
    """Train the runs that are not finished, compare all, and write the tables; return whether a signal stopped it."""
    runs = build_runs(config)
    assert config.study is not None, "checked by build_runs"
    study = replace(config.study, arms={run.arm: config.study.arms[run.arm] for run in runs})
    if not config.only_report:
        ranks.broadcast_from_rank0(lambda: _freeze(config, study))
        print_plan(study, runs)
        if train_all(runs):
            ranks.print_on_rank0("the study continues with the same command")
            return True
    if ranks.is_first():
        write_report(config, study, runs)
    return False


def _freeze(config: StudyConfig, study: StudySettings) -> None:
    """Write the settings of every run at the first start; later starts may add arms and seeds, but change nothing."""
    path = config.run.folder / FROZEN
    shared = {**asdict(replace(study, arms={})), "base": [*study.base, *config.base], "size": config.size}
    given = json.loads(json.dumps({"shared": shared, "arms": dict(study.arms)}))
    if path.is_file() and not config.run.overwrite:
        before = yaml.safe_load(path.read_text(encoding="utf-8"))
        changed = [key for key, value in given["shared"].items() if before["shared"][key] != value]
        changed += [f"arms.{name}" for name, arm in given["arms"].items() if before["arms"].get(name, arm) != arm]
        if changed:
            raise InputError(
                f"{path}: {', '.join(changed)} differ from the study's first start; choose another run.name, or start "
                "over with run.overwrite=true"
            )
        given["arms"] = {**before["arms"], **given["arms"]}
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, yaml.safe_dump(given, sort_keys=False, allow_unicode=True, width=120))


def print_plan(study: StudySettings, runs: Sequence[StudyRun]) -> None:
    """Print the number of runs, and of those that are left."""
    left = sum(not is_finished(run.folder) for run in runs)
    arms, seeds = counted(len(study.arms), "arm"), counted(len({run.seed for run in runs}), "seed")
    ranks.print_on_rank0(f"{study.title}: {arms} x {seeds} = {counted(len(runs), 'run')}, {left} left")


def train_all(runs: Sequence[StudyRun]) -> bool:
    """Train the runs that are not finished, one after the other; return whether a signal stopped one.

    A run that fails is recorded, and the others continue.
    """
    left = [run for run in runs if not is_finished(run.folder)]
    began = time.monotonic()
    for done, run in enumerate(left):
        rest = f", about {_duration((time.monotonic() - began) / done * (len(left) - done))} left" if done else ""
        ranks.print_on_rank0(f"\nrun {len(runs) - len(left) + done + 1} of {len(runs)}: {run.name}{rest}")
        error, before = None, set(os.environ)
        try:
            if train(run.config):
                return True
        except Exception as found:
            if ranks.world_size() > 1:  # the others wait for this rank
                raise
            error = str(found) if isinstance(found, InputError) else traceback.format_exc().strip()
        finally:
            for name in set(os.environ) - before:  # of a process group that has ended
                del os.environ[name]
            if torch.distributed.is_initialized():
                torch.distributed.destroy_process_group()
            gc.collect()
        if ranks.is_first():
            _record_failure(run, error)
    return False


def _record_failure(run: StudyRun, error: str | None) -> None:
    path = _failure(run)
    path.unlink(missing_ok=True)
    if error is not None:
        print(f"{run.name} failed: {error}")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(error, encoding="utf-8")


def _failure(run: StudyRun) -> Path:
    """Return the file next to a run's folder that says why it failed."""
    return run.folder.with_name(f"{run.folder.name}-failed.txt")


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02} min" if minutes >= 60 else f"{minutes} min"


def write_report(config: StudyConfig, study: StudySettings, runs: Sequence[StudyRun]) -> None:
    """Compare the finished runs; write `study.json`, `study.md` and `study.tex`, and print the table.

    Raises:
        InputError: the baseline has no finished run.
    """
    results: dict[str, dict[str, RunResult]] = {name: {} for name in study.arms}
    failed = {}
    for run in runs:
        if is_finished(run.folder):
            results[run.arm][str(run.seed)] = read_run(run.folder)
        else:
            path = _failure(run)
            error = path.read_text(encoding="utf-8").splitlines() if path.is_file() else ["not finished"]
            failed[run.name] = error[-1]
    for name, folders in config.runs.items():
        results[name] = {folder: read_run(Path(folder).expanduser()) for folder in folders}
    if not results[study.baseline]:
        raise InputError(f"no run of the baseline {study.baseline} is finished in {config.run.folder}; train it first")
    found = summarize(config, study, {name: one for name, one in results.items() if one}, failed)
    folder = config.run.folder
    replace_file(folder / "study.json", json.dumps(found, indent=2, ensure_ascii=False) + "\n")
    replace_file(folder / "study.md", tables.markdown(found))
    replace_file(folder / "study.tex", tables.latex(found))
    print(f"\n{tables.text(found)}\n\nstudy: {folder / 'study.md'}, {folder / 'study.json'}, {folder / 'study.tex'}")
