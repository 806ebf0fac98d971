"""The config of `launch/sweep.py`, and the run that a trial trains."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from vlmvqa.config import compatibility
from vlmvqa.config.compose import build
from vlmvqa.config.overrides import Job
from vlmvqa.config.schema import DistSettings, RunSettings, TrainConfig
from vlmvqa.extras.run_series.settings import common_settings, compose_run, latest
from vlmvqa.extras.sweep.command_line import compose_sweep
from vlmvqa.extras.sweep.space import Parameter, Value, override, read_space


@dataclass(frozen=True)
class PruningSettings:
    """`sweep.pruning`: end a trial whose best score is below the median of earlier trials at the same step.

    Attributes:
        startup_trials: trials that complete before one is pruned.
        warmup_steps: steps of a trial before it is pruned.
    """

    startup_trials: int = 5
    warmup_steps: int = 0


@dataclass(frozen=True)
class SearchSettings:
    """The `sweep` group: a search space of settings of launch/train.py.

    Attributes:
        title: of the report.
        base: settings of all trials.
        smoke: further settings of all trials at `size=smoke`.
        space: ranges and choices by setting (`space.read_space`).
        startup_trials: trials with random settings, before Optuna's TPE proposes them.
        pruning: when trials end early; None: never.
    """

    title: str
    space: Mapping[str, Any]
    base: Sequence[str] = ()
    smoke: Sequence[str] = ()
    startup_trials: int = 10
    pruning: PruningSettings | None = None


@dataclass(frozen=True)
class SweepConfig:
    """Config of launch/sweep.py; conf/sweep.yaml documents its keys."""

    run: RunSettings
    sweep: SearchSettings | None = None
    trials: int = 20
    size: str = "full"
    base: Sequence[str] = ()
    seed: int = 0
    only_report: bool = False
    launcher: tuple[str, str] | None = None
    given: frozenset[str] = frozenset()

    @property
    def search(self) -> SearchSettings:
        """The `sweep` group, which `compose_sweep` requires."""
        assert self.sweep is not None
        return self.sweep

    @property
    def space(self) -> dict[str, Parameter]:
        """The parameters by their setting."""
        return read_space(self.search.space)

    @property
    def settings(self) -> list[str]:
        """The settings of all trials."""
        return latest(common_settings(asdict(self.search), self.base, self.size))

    def overrides(self, parameters: Mapping[str, Value]) -> list[str]:
        """Return the settings of a trial."""
        return latest([*self.settings, *(override(key, value) for key, value in parameters.items())])


def check_space(config: SweepConfig) -> str:
    """Return the metric of all trials; raise an InputError if runs of the search space cannot be trained."""
    values = {**vars(config), "sweep": asdict(config.sweep) if config.sweep else None}
    (metric,) = {_build(job, config.launcher).data.metric for job in compose_sweep(values)}
    return metric


def trial_config(config: SweepConfig, number: int, parameters: Mapping[str, Value]) -> TrainConfig:
    """Return the config of a trial's run."""
    train = _build(compose_run(config.overrides(parameters), "sweep"), config.launcher)
    where = RunSettings(f"{config.run.name}/trial-{number}", f"{config.run.dir}/trial-{number}")
    return replace(train, run=where, seed=config.seed, resume="auto")


def _build(job: Job, launcher: tuple[str, str] | None) -> TrainConfig:
    """Build the config of a run, and check its combinations."""
    train = build(TrainConfig, job.values, job.given, launcher)
    compatibility.check(train, train.dist or DistSettings())
    return train
