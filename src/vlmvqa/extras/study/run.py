"""Run a study: train every arm with every seed, resume after a kill, and write the comparison."""

from __future__ import annotations

import gc
import json
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
import yaml

from vlmvqa import ranks
from vlmvqa.errors import InputError, counted
from vlmvqa.extras.study import tables
from vlmvqa.extras.study.report_page import write_page
from vlmvqa.extras.study.results import RunResult, is_finished, read_run, summarize
from vlmvqa.extras.study.settings import StudyConfig, StudyRun, build_runs
from vlmvqa.paths import replace_file
from vlmvqa.training.interrupt import SIGNALS
from vlmvqa.training.run import train

RECORD = "study.yaml"  # in the study's folder: the settings of its runs


def run_study(config: StudyConfig) -> bool:
    """Train the runs that are not finished, compare all, and write the tables; return whether a signal stopped it."""
    runs = build_runs(config)
    study = config.study
    assert study is not None, "checked by build_runs"
    record = ranks.broadcast_from_rank0(lambda: open_record(config, runs))
    if not config.only_report:
        print_plan(study.title, runs)
        if train_all(runs):
            ranks.print_on_rank0("the study continues with the same command")
            return True
    if ranks.is_first():
        write_report(config, record)
    return False


def open_record(config: StudyConfig, runs: Sequence[StudyRun]) -> dict[str, Any]:
    """Return the settings of the study's runs, of this and of earlier commands, and write them.

    A later command may add arms and seeds, but change nothing.

    Raises:
        InputError: it changes settings; or there is nothing to report.
    """
    path, study = config.run.folder / RECORD, config.study
    assert study is not None, "checked by build_runs"
    before = yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else None
    if config.only_report:
        if before is None:
            raise InputError(f"{config.run.folder} holds no study; train it first, without only_report=true")
        return dict(before)
    arms = {run.arm: list(study.arms[run.arm]) for run in runs}
    smoke = study.smoke if config.size == "smoke" else ()
    settings = [*study.base, *smoke, *config.base]
    record: dict[str, Any] = {"size": config.size, "settings": settings, "arms": arms, "seeds": list(config.seeds)}
    if before is not None and config.run.overwrite:
        for name in before["arms"]:
            shutil.rmtree(config.run.folder / name, ignore_errors=True)
    elif before is not None:
        changed = [key for key in ("size", "settings") if before[key] != record[key]]
        changed += [f"arms.{name}" for name, arm in arms.items() if before["arms"].get(name, arm) != arm]
        if changed:
            raise InputError(
                f"{path}: {', '.join(changed)} differ from the study's first start; choose another run.name, or start "
                "over with run.overwrite=true"
            )
        record["arms"] = {**before["arms"], **arms}
        record["seeds"] = list(dict.fromkeys([*before["seeds"], *config.seeds]))
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, yaml.safe_dump(record, sort_keys=False, allow_unicode=True, width=120))
    return record


def print_plan(title: str, runs: Sequence[StudyRun]) -> None:
    """Print the number of runs, and of those that are left."""
    left = sum(not is_finished(run.folder) for run in runs)
    arms, seeds = counted(len({run.arm for run in runs}), "arm"), counted(len({run.seed for run in runs}), "seed")
    ranks.print_on_rank0(f"{title}: {arms} x {seeds} = {counted(len(runs), 'run')}, {left} left")


def train_all(runs: Sequence[StudyRun]) -> bool:
    """Train the runs that are not finished, one after the other; return whether a signal stopped one.

    A run that fails is recorded, and the others continue.
    """
    left = [run for run in runs if not is_finished(run.folder)]
    left.sort(key=lambda run: failure(run.folder).exists())  # failed ones are tried again at the end
    began = time.monotonic()
    for done, run in enumerate(left):
        rest = f", about {_duration((time.monotonic() - began) / done * (len(left) - done))} left" if done else ""
        ranks.print_on_rank0(f"\nrun {len(runs) - len(left) + done + 1} of {len(runs)}: {run.name}{rest}")
        error, handlers = None, {number: signal.getsignal(number) for number in SIGNALS}
        with ranks.one_job():
            try:
                if train(run.config):
                    return True
            except Exception as found:
                error = str(found) if isinstance(found, InputError) else traceback.format_exc().strip()
                if ranks.world_size() > 1:  # the others wait for this rank
                    _record_failure(run, error)
                    raise
        for number, handler in handlers.items():  # a run that failed leaves its own
            signal.signal(number, handler)
        if "torch._dynamo" in sys.modules:  # each run compiles its own blocks
            torch._dynamo.reset()
        gc.collect()
        _record_failure(run, error)
    return False


def _record_failure(run: StudyRun, error: str | None) -> None:
    if not ranks.is_first():
        return
    path = failure(run.folder)
    path.unlink(missing_ok=True)
    if error is not None:
        print(f"{run.name} failed: {error}")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(error, encoding="utf-8")


def failure(folder: Path) -> Path:
    """Return the file next to a run's folder that holds the error message of a failed run."""
    return folder.with_name(f"{folder.name}-failed.txt")


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02} min" if minutes >= 60 else f"{minutes} min"


def write_report(config: StudyConfig, record: Mapping[str, Any]) -> None:
    """Compare the finished runs; write `study.json`, `study.md`, `study.tex` and `report.html`, and print the table.

    Args:
        record: the settings of all runs (`open_record`).

    Raises:
        InputError: the baseline has no finished run, or fewer than there are runs of an arm from elsewhere.
    """
    assert config.study is not None, "checked by build_runs"
    folder, study = config.run.folder, replace(config.study, arms=record["arms"])
    results: dict[str, dict[str, RunResult]] = {study.baseline: {}}
    failed = {}
    for name, seed in product(record["arms"], record["seeds"]):
        run = folder / name / f"seed-{seed}"
        if is_finished(run):
            results.setdefault(name, {})[str(seed)] = read_run(run)
        else:
            lines = failure(run).read_text(encoding="utf-8").splitlines() if failure(run).is_file() else []
            failed[f"{name}/seed-{seed}"] = lines[-1] if lines else "not finished"
    seeds = list(results[study.baseline])
    if not seeds:
        raise InputError(f"no run of the baseline {study.baseline} is finished in {folder}; train it first")
    for name, folders in config.runs.items():
        if len(folders) > len(seeds):
            raise InputError(f"runs.{name} has {len(folders)} runs, the baseline {len(seeds)}; train more of its seeds")
        runs = (read_run(Path(one).expanduser()) for one in folders)
        results[name] = dict(zip(seeds, runs, strict=False))
    found = {**summarize(study, results, failed, folder, config.seed), "size": record["size"]}
    replace_file(folder / "study.json", json.dumps(found, indent=2, ensure_ascii=False) + "\n")
    replace_file(folder / "study.md", tables.markdown(found))
    replace_file(folder / "study.tex", tables.latex(found))
    print(f"\n{tables.text(found)}\n\nstudy: {folder / 'study.md'}, {folder / 'study.json'}, {folder / 'study.tex'}")
    write_page(found, results, folder)
    print(f"report: {folder / 'report.html'}")
