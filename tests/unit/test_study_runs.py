"""What a study's arms cost, locks between processes, progress, and the plan of all arms."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.configs import config
from tests.unit.test_study import build_runs, study
from vlmvqa.errors import InputError
from vlmvqa.extras.planning.run import PlanConfig, plan
from vlmvqa.extras.run_series.locks import try_lock
from vlmvqa.extras.run_series.training import duration
from vlmvqa.extras.study import cost
from vlmvqa.extras.study.cost import ArmCost, arm_costs, with_equal_flops
from vlmvqa.extras.study.progress import Progress, StudyBar
from vlmvqa.extras.study.run import Claims, failure
from vlmvqa.extras.study.settings import StudyRun, build_arms

SHAPES = ("data.options.train_images=40", "data.options.val_images=12", "data.options.questions_per_image=4")


def test_arms_are_given_equal_operations(tmp_path: Path) -> None:
    """An arm without copies of the image and with a frozen language model has cheaper steps, and gets more of them."""
    frozen = "study.arms.causal=['copy_images=false','trainable.language=none']"
    base = [f"base={setting}" for setting in (f"data.root={tmp_path / 'shapes'}", *SHAPES)]
    given = study("study=mask", "study.equal=flops", f"run.dir={tmp_path}", "arms=[causal]", frozen, *base)
    configs = build_arms(given)
    costs = arm_costs(configs)
    before = costs["blockwise_prefix"]
    assert before.steps == costs["causal"].steps > 1  # the same batches
    assert (before.tera_flop or 0) > 1.5 * (costs["causal"].tera_flop or 0) > 0
    assert all(one.memory_gib and 0.8 < one.memory_gib < 3 for one in costs.values())
    changed = with_equal_flops(configs, costs)
    steps = {name: one.trainer["max_steps"] for name, one in changed.items()}
    assert costs["blockwise_prefix"] == before and steps["blockwise_prefix"] == before.steps
    assert steps["causal"] == costs["causal"].steps > 1.5 * before.steps
    assert costs["causal"].tera_flop == pytest.approx(before.tera_flop, rel=0.5 / steps["causal"])
    assert f"{steps['causal']}" in cost.table(costs)
    costs["causal"] = ArmCost(3, None, None)
    with pytest.raises(InputError, match="the operations of causal cannot be counted"):
        with_equal_flops(configs, costs)


def locked_by_another(path: Path) -> bool:
    """Whether a process of its own finds the lock taken: locks are of processes."""
    child = os.fork()
    if child == 0:
        os._exit(1 if try_lock(path) is None else 0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 1


def test_a_run_is_claimed_by_one_process(tmp_path: Path) -> None:
    lock = try_lock(tmp_path / "arm" / ".lock")
    assert lock is not None and locked_by_another(tmp_path / "arm" / ".lock")
    lock.close()
    assert not locked_by_another(tmp_path / "arm" / ".lock")


def finish(run: StudyRun) -> None:
    run.folder.mkdir(parents=True)
    for name in ("metrics.json", "predictions.jsonl"):
        (run.folder / name).write_text("{}")


def test_a_process_takes_the_runs_that_nobody_else_has(tmp_path: Path) -> None:
    """Neither finished ones, nor those that failed meanwhile; what failed before comes last, and nothing twice."""
    runs = build_runs(study("study=mask", f"run.dir={tmp_path}", "arms=[causal,image_prefix]", "seeds=[0,1]"))
    finish(runs[1])
    for number in (0, 4):
        runs[number].folder.parent.mkdir(parents=True, exist_ok=True)
    failure(runs[0].folder).write_text("failed")
    claims = Claims(runs)
    failure(runs[4].folder).write_text("failed in another process")
    taken = []
    while (number := claims.take()) is not None:
        taken.append(number)
        assert locked_by_another(runs[number].folder.with_name(f".{runs[number].folder.name}.lock"))
        claims.release()
    assert taken == [2, 3, 5, 0]


def test_a_bar_counts_all_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In operations: the second arm's runs take three times as long. The runs of other processes count too."""
    runs = build_runs(study("study=mask", f"run.dir={tmp_path}", "arms=[causal]", "seeds=[0,1]"))
    costs = {"blockwise_prefix": ArmCost(10, 1.0, None), "causal": ArmCost(10, 3.0, None)}
    finish(runs[0])
    progress = Progress(runs, costs)
    assert progress.heading(runs[1]) == "run 2 of 4: causal/seed-0"
    finish(runs[1])
    assert progress.heading(runs[2]).startswith("run 3 of 4: blockwise_prefix/seed-1, about 1 min left")
    bar = StudyBar(progress, runs[2])
    state = SimpleNamespace(global_step=5, max_steps=10, is_world_process_zero=True)
    bar.on_train_begin(None, state, None)
    assert (bar.training_bar.total, bar.training_bar.n) == (7.0, 3.5)
    state.global_step = 6
    bar.on_step_end(None, state, None)
    assert bar.training_bar.n == pytest.approx(3.6)
    bar.on_train_end(None, state, None)
    assert "run 3 of 4: blockwise_prefix/seed-1" in capsys.readouterr().err
    assert [duration(seconds) for seconds in (3, 600, 7500)] == ["1 min", "10 min", "2 h 05 min"]


def test_all_arms_are_planned(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["plan.gpus=1", f"run.dir={tmp_path}", "study=projector", "base=trainer.per_device_train_batch_size=16"]
    given += [f"base=model.{layers}=1" for layers in ("vision.overrides.depth", "language.overrides.num_hidden_layers")]
    plan(config(PlanConfig, "plan", *given))
    printed = capsys.readouterr().out
    assert "Projectors, on 1 x a10g" in printed
    planned = json.loads((tmp_path / "plan.json").read_text())["arms"]
    reduced = {"linear_64", "pixel_shuffle_64", "pool_64", "resampler_64"}
    assert planned.keys() == {"linear", "mlp", "linear_frozen", "mlp_frozen", "normed", *reduced}
    assert planned["linear"]["rows"] == 16 and planned["linear"]["fits"]
    assert planned["linear_frozen"]["optimizer"] < planned["linear"]["optimizer"] < planned["mlp"]["optimizer"]
    with pytest.raises(InputError, match="with study=, dist must be given for all arms, as base=dist="):
        plan(config(PlanConfig, "plan", *given, "dist=fsdp"))
