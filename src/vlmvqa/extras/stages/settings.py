"""The configs of a run's stages: what each trains from, and where it is saved."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

from vlmvqa.config.compose import build
from vlmvqa.config.overrides import Job
from vlmvqa.config.schema import TrainConfig
from vlmvqa.errors import InputError
from vlmvqa.extras.stages.command_line import sets_model


def build_stages(jobs: Mapping[str, Job], given: Iterable[str] = ()) -> dict[str, TrainConfig]:
    """Return the config of each stage; raise an InputError if one before the last trains adapters."""
    *earlier, last = jobs
    kind: type[TrainConfig] = TrainConfig
    if "plan" in jobs[last].values:
        from vlmvqa.extras.planning.run import PlanConfig

        kind = PlanConfig
    built = {name: build(kind, job.values, job.given) for name, job in jobs.items()}
    for name in earlier:
        if built[name].adapt is not None:
            raise InputError(f"stages.{name}: adapters can be trained in the last stage only; set trainable instead")
    return built


def stage_runs(config: TrainConfig) -> dict[str, TrainConfig]:
    """Return the training of each stage by name.

    Earlier stages are trained in `stages/<number>-<name>` of the run's folder, the last one in the folder itself. Each
    continues the model of the one before; optimizer, schedule and data order are its own.
    """
    runs: dict[str, TrainConfig] = {}
    init_from = config.init_from
    for number, name in enumerate(config.stages, start=1):
        is_last = number == len(config.stages)
        stage = config if is_last else config.stages[name]
        place = (
            config.run
            if is_last
            else replace(config.run, name=f"{config.run.name}/{name}", dir=f"{config.run.dir}/stages/{number}-{name}")
        )
        runs[name] = replace(
            stage,
            stages={},
            run=place,
            init_from=init_from,
            resume=config.resume,
            resume_force=config.resume_force,
            seed=config.seed,
            hub_id=config.hub_id if is_last else None,
            dist=config.dist,
            given=frozenset(key for key in stage.given if number == 1 or not sets_model(key)),
        )
        init_from = {"model": str(place.folder)}
    return runs
