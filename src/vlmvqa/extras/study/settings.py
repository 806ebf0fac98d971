"""The config of `launch/study.py`, and the runs that a study consists of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any

from vlmvqa.config import compatibility
from vlmvqa.config.compose import build
from vlmvqa.config.schema import DistSettings, RunSettings, TrainConfig
from vlmvqa.errors import InputError
from vlmvqa.extras.study.command_line import compose_arms, refuse_arms


@dataclass(frozen=True)
class StudySettings:
    """The `study` group: arms that differ in a few settings of launch/train.py.

    Attributes:
        title: of the table.
        motivation: why the study is of interest; printed in the report.
        published: findings to compare with, each with `finding` and `source`.
        base: settings of launch/train.py for all arms.
        smoke: further settings for all arms at `size=smoke`.
        arms: the settings of each arm.
        baseline: the arm that the others are compared with.
        equal: what the arms have in common: "steps", "questions" (epochs) or "flops".
        metric: the score that is compared; None: the task's own.
    """

    title: str
    motivation: str
    arms: Mapping[str, Sequence[str]]
    baseline: str
    base: Sequence[str] = ()
    smoke: Sequence[str] = ()
    published: Sequence[Mapping[str, Any]] = ()
    equal: str = "questions"
    metric: str | None = None


@dataclass(frozen=True)
class StudyConfig:
    """Config of launch/study.py; conf/study.yaml documents its keys."""

    run: RunSettings
    study: StudySettings | None = None
    seeds: Sequence[int] = (0, 1, 2)
    size: str = "full"
    base: Sequence[str] = ()
    arms: Sequence[str] | None = None
    runs: Mapping[str, Sequence[str]] = field(default_factory=dict)
    only_report: bool = False
    seed: int = 0
    launcher: tuple[str, str] | None = None
    given: frozenset[str] = frozenset()

    @property
    def settings(self) -> StudySettings:
        """The `study` group, which `compose_arms` requires."""
        assert self.study is not None
        return self.study


@dataclass(frozen=True)
class StudyRun:
    """One run of a study: an arm with a seed."""

    arm: str
    seed: int
    config: TrainConfig

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return self.config.run.folder

    @property
    def name(self) -> str:
        """Arm and seed, as in the path of the folder."""
        return f"{self.arm}/seed-{self.seed}"


def build_arms(config: StudyConfig) -> dict[str, TrainConfig]:
    """Return the config of each arm, the baseline first.

    Raises:
        InputError: arms cannot run; with the reason for each.
    """
    built: dict[str, TrainConfig] = {}
    problems: dict[str, str] = {}
    jobs = compose_arms({**vars(config), "study": asdict(config.study) if config.study else None})
    for name, job in jobs.items():
        try:
            built[name] = build(TrainConfig, job.values, job.given, config.launcher)
            compatibility.check(built[name], built[name].dist or DistSettings())
        except InputError as error:
            problems[name] = str(error)
    refuse_arms(problems, len(jobs))
    return built


def study_runs(config: StudyConfig, arms: Mapping[str, TrainConfig]) -> list[StudyRun]:
    """Return the runs of a study: all arms with the first seed, then with the next."""
    runs = []
    for seed, (name, train) in product(config.seeds, arms.items()):
        where = RunSettings(f"{config.run.name}/{name}/seed-{seed}", f"{config.run.dir}/{name}/seed-{seed}")
        runs.append(StudyRun(name, seed, replace(train, run=where, seed=seed, resume="auto")))
    return runs
