"""Run a study: train every arm with every seed, resume after a kill, and write the comparison."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import yaml

from vlmvqa import ranks
from vlmvqa.config.schema import DistSettings
from vlmvqa.errors import InputError, counted
from vlmvqa.extras.planning.time import EFFICIENCY
from vlmvqa.extras.run_series.training import ask_rank0, duration, is_finished, run_job
from vlmvqa.extras.study import cost, tables
from vlmvqa.extras.study.command_line import chosen_arms
from vlmvqa.extras.study.cost import ArmCost, arm_costs, seconds, with_equal_flops
from vlmvqa.extras.study.locks import claimed, locked
from vlmvqa.extras.study.progress import Progress
from vlmvqa.extras.study.report_page import write_page
from vlmvqa.extras.study.results import RunResult, read_run, summarize
from vlmvqa.extras.study.settings import StudyConfig, StudyRun, build_arms, study_runs
from vlmvqa.paths import replace_file
from vlmvqa.training import distributed
from vlmvqa.training.run import train

RECORD = "study.yaml"  # in the study's folder: the settings of its runs


def run_study(config: StudyConfig) -> bool:
    """Train the runs that are not finished, compare all, and write the tables; return whether a signal stopped it."""
    arms, study = build_arms(config), config.study
    assert study is not None, "checked by build_arms"
    if not config.only_report:
        finished = all(is_finished(run.folder) for run in study_runs(config, arms))
        costs = {} if finished else ask_rank0(lambda: arm_costs(arms))
        if study.equal == "flops" and costs:
            arms = with_equal_flops(arms, costs)
        runs = study_runs(config, arms)
        ask_rank0(lambda: open_record(config))
        print_plan(study.title, runs, costs)
        if train_all(runs, costs):
            ranks.print_on_rank0("the study continues with the same command")
            return True
    if ranks.is_first():
        with locked(config.run.folder):
            write_report(config)
    return False


def open_record(config: StudyConfig) -> None:
    """Write the settings of the study's runs, of this and of earlier commands.

    A later command may add arms and seeds, but change nothing.

    Raises:
        InputError: it changes settings, or would delete runs that another process trains.
    """
    folder, study = config.run.folder, config.study
    assert study is not None, "checked by build_arms"
    arms = {name: list(study.arms[name]) for name in chosen_arms(study.baseline, study.arms, config.arms)}
    smoke = study.smoke if config.size == "smoke" else ()
    settings = [*study.base, *smoke, *config.base]
    record: dict[str, Any] = {"size": config.size, "settings": settings, "arms": arms, "seeds": list(config.seeds)}
    with locked(folder):
        _write_record(folder, record, config.run.overwrite)


def _write_record(folder: Path, record: dict[str, Any], overwrite: bool) -> None:
    """Write the settings of this command and of earlier ones; raises like `open_record`."""
    path, arms = folder / RECORD, record["arms"]
    before = yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else None
    if before is not None and overwrite:
        _delete_runs(folder, before)
    elif before is not None:
        changed = [key for key in ("size", "settings") if before[key] != record[key]]
        changed += [f"arms.{name}" for name, arm in arms.items() if before["arms"].get(name, arm) != arm]
        if changed:
            raise InputError(
                f"{path}: {', '.join(changed)} differ from the study's first start; choose another run.name, or start "
                "over with run.overwrite=true"
            )
        record["arms"] = {**before["arms"], **arms}
        record["seeds"] = list(dict.fromkeys([*before["seeds"], *record["seeds"]]))
    replace_file(path, yaml.safe_dump(record, sort_keys=False, allow_unicode=True, width=120))


def _delete_runs(folder: Path, record: Mapping[str, Any]) -> None:
    """Delete a study's runs."""
    for name, seed in product(record["arms"], record["seeds"]):
        with claimed(folder / name / f"seed-{seed}") as mine:
            if not mine:
                raise InputError(f"{folder / name}: another process trains seed {seed}; stop it first")
    for name in record["arms"]:
        shutil.rmtree(folder / name, ignore_errors=True)


def print_plan(title: str, runs: Sequence[StudyRun], costs: Mapping[str, ArmCost]) -> None:
    """Print the number of runs, of those that are left, what each arm costs, and the time of all.

    Args:
        costs: cost by arm; empty if no run is left.
    """
    left = [run for run in runs if not is_finished(run.folder)]
    arms, seeds = counted(len({run.arm for run in runs}), "arm"), counted(len({run.seed for run in runs}), "seed")
    lines = [f"{title}: {arms} x {seeds} = {counted(len(runs), 'run')}, {len(left)} left"]
    if costs:
        lines += ["", cost.table(costs), ""]
    if left and all(one.tera_flop for one in costs.values()):
        total = seconds(left[0].config, sum(costs[run.arm].tera_flop or 0.0 for run in left))
        lines.append(
            f"about {duration(total)} in total, if training reaches {EFFICIENCY:.0%} of this device's fastest matrix "
            "product; without evaluations"
        )
    ranks.print_on_rank0("\n".join(lines))


def train_all(runs: Sequence[StudyRun], costs: Mapping[str, ArmCost]) -> bool:
    """Train the runs that are not finished, one after the other; return whether a signal stopped one.

    A run that fails is recorded, and the others continue. A run that another process trains is left to it.
    """
    left = [run for run in runs if not is_finished(run.folder)]
    left.sort(key=lambda run: failure(run.folder).exists())  # failed ones are tried again at the end
    progress = Progress(runs, left, costs)
    for run in left:
        if run_job(partial(train_claimed, run, progress), partial(_record_failure, run)):
            return True
        progress.add(run)
    return False


def train_claimed(run: StudyRun, progress: Progress) -> bool:
    """Train a run unless another process does or did; return whether a signal stopped it."""
    if "RANK" in os.environ:  # the ranks agree on whose run it is
        distributed.start(run.config.dist or DistSettings(), bool(run.config.trainer.get("use_cpu")))
    with claimed(run.folder) as mine:
        if not mine or is_finished(run.folder):
            return False
        ranks.print_on_rank0(f"\n{progress.heading(run)}")
        return train(run.config, progress.callbacks(run))


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


def write_report(config: StudyConfig) -> None:
    """Compare the finished runs; write `study.json`, `study.md`, `study.tex` and `report.html`, and print the table.

    Raises:
        InputError: there is no study, or the baseline has no finished run, or fewer than there are runs of an arm from
            elsewhere.
    """
    folder = config.run.folder
    if not (folder / RECORD).is_file():
        raise InputError(f"{folder} holds no study; train it first, without only_report=true")
    record = yaml.safe_load((folder / RECORD).read_text(encoding="utf-8"))
    assert config.study is not None, "checked by build_arms"
    study = replace(config.study, arms=record["arms"])
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
