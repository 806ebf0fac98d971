"""Run a study: train every arm with every seed, resume after a kill, and write the comparison."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import IO, Any

import yaml

from vlmvqa import ranks
from vlmvqa.config.schema import TrainConfig
from vlmvqa.errors import InputError, counted
from vlmvqa.extras.planning.time import EFFICIENCY
from vlmvqa.extras.run_series.locks import locked, try_lock
from vlmvqa.extras.run_series.settings import common_settings, latest
from vlmvqa.extras.run_series.training import ask_rank0, duration, is_finished, run_job
from vlmvqa.extras.study import cost, tables
from vlmvqa.extras.study.command_line import chosen_arms
from vlmvqa.extras.study.cost import ArmCost, arm_costs, seconds, with_equal_flops
from vlmvqa.extras.study.progress import Progress
from vlmvqa.extras.study.report_page import write_page
from vlmvqa.extras.study.results import RunResult, read_run, summarize
from vlmvqa.extras.study.settings import StudyConfig, StudyRun, build_arms, study_runs
from vlmvqa.paths import replace_file
from vlmvqa.training.run import train

RECORD = "study.yaml"  # in the study's folder: the settings of its runs


def run_study(config: StudyConfig) -> bool:
    """Train the runs that are not finished, compare all, and write the tables; return whether a signal stopped it."""
    if not config.only_report:
        arms = build_arms(config)
        costs = ask_rank0(lambda: _costs(config, arms))
        if costs and config.settings.equal == "flops":
            arms = with_equal_flops(arms, costs)
        runs = study_runs(config, arms)
        ask_rank0(lambda: open_record(config))
        if ranks.is_first():
            print_plan(config.settings.title, runs, costs)
        if train_all(runs, Progress(runs, costs)):
            ranks.print_on_rank0("the study continues with the same command")
            return True
    if ranks.is_first():
        write_report(config)
    return False


def _costs(config: StudyConfig, arms: Mapping[str, TrainConfig]) -> dict[str, ArmCost]:
    """Return the cost of each arm; nothing if no run is left."""
    finished = all(is_finished(run.folder) for run in study_runs(config, arms))
    return {} if finished and not config.run.overwrite else arm_costs(arms)


def open_record(config: StudyConfig) -> None:
    """Write the settings of the study's runs, of this and of earlier commands.

    A later command may add arms and seeds, but change nothing.

    Raises:
        InputError: it changes settings, or would delete runs that another process trains.
    """
    study = config.settings
    record: dict[str, Any] = {
        "size": config.size,
        "equal": study.equal,
        "baseline": study.baseline,
        "settings": latest(common_settings(asdict(study), config.base, config.size)),
        "arms": {name: list(study.arms[name]) for name in chosen_arms(study.baseline, study.arms, config.arms)},
        "seeds": list(config.seeds),
    }
    with locked(config.run.folder):
        _write_record(config.run.folder, record, config.run.overwrite)


def _write_record(folder: Path, record: dict[str, Any], overwrite: bool) -> None:
    """Write the settings of this command and of earlier ones; raises like `open_record`."""
    path, arms = folder / RECORD, record["arms"]
    before = yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else None
    if before is not None and overwrite:
        _delete_runs(folder, before)
    elif before is not None:
        changed = [
            key for key in ("size", "equal", "baseline", "settings") if before.get(key, record[key]) != record[key]
        ]
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
        if is_claimed(folder / name / f"seed-{seed}"):
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
    if costs and all(one.tera_flop for one in costs.values()):
        total = seconds(left[0].config, sum(costs[run.arm].tera_flop or 0.0 for run in left))
        lines.append(
            f"about {duration(total)} in total, if training reaches {EFFICIENCY:.0%} of this device's fastest matrix "
            "product; without evaluations"
        )
    print("\n".join(lines), flush=True)


def train_all(runs: Sequence[StudyRun], progress: Progress) -> bool:
    """Train the runs that are neither finished nor trained by another process; return whether a signal stopped one.

    A run that fails is recorded, and the others continue.
    """
    claims = Claims(runs)
    while (number := ask_rank0(claims.take)) is not None:
        run = runs[number]
        ranks.print_on_rank0(f"\n{progress.heading(run)}")
        if run_job(partial(train, run.config, progress.callbacks(run)), partial(_record_failure, run)):
            return True
        claims.release()
    return False


class Claims:
    """Claims of this process, by its rank 0, on the runs that it trains."""

    def __init__(self, runs: Sequence[StudyRun]) -> None:
        self.runs, self.tried = runs, set[int]()
        self.lock: IO[str] | None = None
        self.failed_before = {number for number, run in enumerate(runs) if failure(run.folder).exists()}

    def take(self) -> int | None:
        """Claim the next run and return its number; None if no run is left that another process doesn't train.

        Those that failed before this command are tried again, after the others.
        """
        for number in sorted(range(len(self.runs)), key=lambda number: number in self.failed_before):
            folder = self.runs[number].folder
            failed = failure(folder).exists() and number not in self.failed_before
            if failed or number in self.tried or is_finished(folder):
                continue
            self.lock = claim(folder)
            if self.lock is not None and not is_finished(folder):
                self.tried.add(number)
                return number
            self.release()
        return None

    def release(self) -> None:
        """Release the claim on the last run."""
        if self.lock is not None:
            self.lock.close()
            self.lock = None


def claim(folder: Path) -> IO[str] | None:
    """Return the lock of a run; None if another process trains it."""
    return try_lock(folder.with_name(f".{folder.name}.lock"))


def is_claimed(folder: Path) -> bool:
    """Return whether another process trains a run."""
    lock = claim(folder)
    if lock is not None:
        lock.close()
    return lock is None


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
        InputError: there is no study, or the baseline has no finished run, or has fewer than an arm given with `runs`.
    """
    folder = config.run.folder
    if not (folder / RECORD).is_file():
        raise InputError(f"{folder} holds no study; train it first, without only_report=true")
    with locked(folder):
        _write_report(config, folder)


def _write_report(config: StudyConfig, folder: Path) -> None:
    record = yaml.safe_load((folder / RECORD).read_text(encoding="utf-8"))
    study = replace(config.settings, arms=record["arms"])
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
    if not seeds and not config.only_report and any(is_claimed(folder / run) for run in failed):
        print("other processes train the study's runs; the last one writes the table")
        return
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
