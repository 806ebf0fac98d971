"""Plan each stage of a run: `launch/plan.py experiment=...`."""

from __future__ import annotations

from dataclasses import replace

from vlmvqa.extras.planning.run import PlanConfig


def stage_plans(config: PlanConfig) -> dict[str, PlanConfig]:
    """Return the config of each stage's plan; each is written to its own folder in the run's."""
    plans = {}
    for name, stage in config.stages.items():
        assert isinstance(stage, PlanConfig)
        where = replace(config.run, dir=f"{config.run.dir}/{name}")
        plans[name] = replace(stage, run=where, plan=config.plan, dist=config.dist, stages={})
    return plans
