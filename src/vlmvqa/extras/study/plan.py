"""Memory and speed of a study's arms on planned GPUs: `launch/plan.py study=mask`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from vlmvqa.config.compose import build
from vlmvqa.errors import InputError
from vlmvqa.extras.planning.gpus import GIB
from vlmvqa.extras.planning.planner import Plan
from vlmvqa.extras.planning.run import PlanConfig, build_planner, chosen_run
from vlmvqa.extras.report.text_tables import aligned
from vlmvqa.extras.stages.plan import stage_plans
from vlmvqa.extras.study.command_line import compose_arms, refuse_arms
from vlmvqa.paths import replace_file


def plan_study(config: PlanConfig) -> None:
    """Print a table of the arms and write `plan.json`.

    Raises:
        InputError: arms cannot be planned; with the reason for each.
    """
    other = sorted(key for key in config.given if key.split(".")[0] not in ("study", "base", "plan", "run", "verify"))
    if config.verify:
        raise InputError("verify=true measures one training; leave study= out")
    if other:
        raise InputError(f"with study=, {other[0]} must be given for all arms, as base={other[0]}=...")
    plans: dict[str, Plan] = {}
    problems: dict[str, str] = {}
    jobs = compose_arms({"study": config.study, "base": config.base}, "plan")
    for name, job in jobs.items():
        try:
            arm = build(PlanConfig, job.values, job.given)
            stages = stage_plans(arm).values() if arm.stages else [arm]
            planned = [_plan(replace(stage, plan=config.plan)) for stage in stages]
            plans[name] = max(planned, key=lambda plan: plan.needed)
        except InputError as error:
            problems[name] = str(error)
    refuse_arms(problems, len(jobs))
    print(f"{config.study['title']}, on {config.plan.gpus} x {config.plan.gpu}\n\n{table(plans)}")
    folder = config.run.folder
    folder.mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = {name: vars(plan) | {"fits": plan.fits} for name, plan in plans.items()}
    replace_file(folder / "plan.json", json.dumps({"arms": found}, indent=1) + "\n")
    print(f"\nplan: {folder / 'plan.json'}")


def _plan(config: PlanConfig) -> Plan:
    planner = build_planner(config)
    return planner.plan(*chosen_run(config, planner))


def table(plans: Mapping[str, Plan]) -> str:
    """Return the arms' plans as text."""
    rows = [["arm", "strategy", "rows", "needed GiB", "fits", "questions/s", "most rows"]]
    for name, plan in plans.items():
        speed = "-" if plan.questions_per_second is None else f"{plan.questions_per_second:,.1f}"
        needed, fits = f"{plan.needed / GIB:.1f}", "yes" if plan.fits else "no"
        rows.append([name, plan.strategy, str(plan.rows), needed, fits, speed, str(plan.largest[plan.checkpointing])])
    return aligned(rows)
