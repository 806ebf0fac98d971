"""Sweeps (`-m a=1,2`): a folder for each job, named after its overrides, and a table of all jobs at the end."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig

from vlmvqa import ranks
from vlmvqa.config.early_checks import flatten
from vlmvqa.config.hydra_jobs import swept_values
from vlmvqa.config.overrides import Composition, Job, quoted
from vlmvqa.paths import RUNS

# The output setting of each script that names it itself. The others choose a folder per job, or can't be swept.
OUTPUTS = {"merge": "output", **dict.fromkeys(("train", "eval", "predict", "show", "plan"), "run.dir")}
JOBS = ".jobs"  # a file for each job of the sweep, which may run on another machine
LONGEST = 200  # bytes of a folder's name


@dataclass(frozen=True)
class Sweep:
    """A sweep's folder and the keys that distinguish its jobs.

    Attributes:
        folder: Hydra's output folder; contains the jobs' folders if these are named here.
        keys: the keys that the sweep varies.
        output: the setting that names a job's folder, if the command gives all jobs the same; else None.
    """

    folder: Path
    keys: tuple[str, ...]
    output: str | None

    @classmethod
    def of(cls, composition: Composition, config_name: str) -> Sweep:
        """Return the sweep of a command line."""
        given = [argument for argument in composition.arguments if "=" in argument and not argument.startswith("-")]
        keys = tuple(_key(one) for one in given if len(swept_values(one)) > 1)
        output = OUTPUTS.get(config_name)
        folders = [flatten(job.values).get(output) if output else None for job in composition.jobs]
        if folders[0] is not None and folders[0] in folders[1:]:
            return cls(Path(folders[0]).expanduser(), keys, output)
        digest = hashlib.sha256("\n".join(given).encode()).hexdigest()
        return cls(Path(RUNS, "sweeps", f"{config_name}-{digest[:8]}"), keys, None)

    @property
    def overrides(self) -> list[str]:
        """The overrides of Hydra's own node."""
        return [f"hydra.sweep.dir={quoted(str(self.folder))}"]

    def begin(self) -> None:
        """Remove the records of an earlier sweep in the same folder."""
        if ranks.is_first():
            shutil.rmtree(self.folder / JOBS, ignore_errors=True)

    def run(self, job: Job, start: Callable[[Job], bool | None]) -> None:
        """Run a job in its own folder; a signal ends the sweep. A refused job is recorded, and the others still run."""
        overrides = [one.lstrip("+") for one in HydraConfig.get().overrides.task if _key(one) in self.keys]
        ranks.print_on_rank0(f"\njob {HydraConfig.get().job.num}: {' '.join(overrides)}")
        if self.output is not None:
            job = replace(job, values=_in_own_folder(job.values, self.output, overrides))
        error, stopped = None, None
        try:
            with ranks.one_job():
                stopped = start(job)
        except SystemExit as stop:
            error = str(stop.code)
            if ranks.world_size() > 1 or not error.startswith("error: "):
                raise
            print(error, file=sys.stderr)
        if stopped and HydraConfig.get().runtime.choices["hydra/launcher"] == "basic":  # else this process runs one job
            sys.exit(0)
        values = flatten(job.values)
        self._record(overrides, values.get("output") or values.get("run.dir"), error)

    def _record(self, overrides: list[str], folder: str | None, error: str | None) -> None:
        if ranks.is_first():
            path = self.folder / JOBS / f"{HydraConfig.get().job.num}.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps({"overrides": overrides, "folder": folder, "error": error}), encoding="utf-8")

    def finish(self) -> bool:
        """Print the table of the jobs that ended; return whether none of them was refused."""
        paths = sorted((self.folder / JOBS).glob("*.json"), key=lambda path: int(path.stem))
        jobs = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
        if jobs:
            print(f"\n{table(jobs)}", flush=True)
        return all(job["error"] is None for job in jobs)


def table(jobs: Sequence[Mapping[str, Any]]) -> str:
    """Return a table with a row per job, or per task of it: overrides, score with its 95 % interval, report."""
    rows = [("job", "score [95 % interval]", "report")]
    for job in jobs:
        found = [("refused", job["error"])] if job["error"] else list(_scores(Path(job["folder"]).expanduser()))
        rows += [(" ".join(job["overrides"]), *one) for one in found]
    widths = [max(len(row[column]) for row in rows) for column in range(2)]
    return "\n".join(f"{job:<{widths[0]}}  {score:<{widths[1]}}  {report}" for job, score, report in rows)


def _scores(folder: Path) -> Iterator[tuple[str, str]]:
    """Yield the score and the report of a run, or of each of its tasks."""
    tasks = [folder] if (folder / "metrics.json").is_file() else [path.parent for path in folder.glob("*/metrics.json")]
    for task in sorted(tasks):
        ((name, score), *_) = json.loads((task / "metrics.json").read_text(encoding="utf-8"))["metrics"].items()
        shown = "-" if score["overall"] is None else f"{score['overall']:.2f}"
        if score.get("interval"):
            shown += " [{:.2f}, {:.2f}]".format(*score["interval"])
        yield f"{name} {shown}", str(task / "report.html")
    if not tasks:
        yield "-", str(folder)


def _in_own_folder(values: Mapping[str, Any], output: str, overrides: Sequence[str]) -> dict[str, Any]:
    """Return a job's values with its own folder below the sweep's, and with the name of that folder."""
    changed, part = deepcopy(dict(values)), _folder_name(overrides)
    group, _, key = output.rpartition(".")
    node = changed[group] if group else changed
    node[key] = f"{node[key]}/{part}"
    if changed["run"].get("name") is not None:
        changed["run"]["name"] += f"/{part}"
    return changed


def _folder_name(overrides: Sequence[str]) -> str:
    """Return the overrides as a folder's name without commas: Hydra would read `checkpoint=<folder>` as a sweep."""
    name = "+".join(overrides).replace(os.sep, "_").replace(",", "_")
    if len(name.encode()) > LONGEST:
        name = f"{name[: LONGEST // 4]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
    return name


def _key(override: str) -> str:
    return override.lstrip("+").partition("=")[0]
