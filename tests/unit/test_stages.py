"""The settings of a run's stages, the configs that they train with, their logs, cost and plan; without training."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from tests.configs import config, train_config
from tests.unit.test_study import study
from vlmvqa.config import early_checks
from vlmvqa.config.compose import build
from vlmvqa.config.overrides import compose
from vlmvqa.config.schema import TrainConfig
from vlmvqa.errors import InputError
from vlmvqa.extras.planning.run import PlanConfig
from vlmvqa.extras.report import curves
from vlmvqa.extras.stages.log import join, stage_logs
from vlmvqa.extras.stages.plan import stage_plans
from vlmvqa.extras.stages.settings import stage_runs
from vlmvqa.extras.study.cost import arm_costs, with_equal_flops
from vlmvqa.extras.study.settings import build_arms

SHAPES = ("data.options.train_images=40", "data.options.val_images=12", "data.options.questions_per_image=4")


def test_llava_in_two_stages(tmp_path: Path) -> None:
    """The projector alone on captions at 1e-3; then the language model too, on questions, at 2e-5; encoder frozen."""
    for name in ("coco", "vqa"):
        (tmp_path / name).mkdir()
    roots = [f"stages.align.data.root={tmp_path / 'coco'}", f"stages.tune.data.root={tmp_path / 'vqa'}"]
    found = train_config("experiment=llava_two_stage", *roots, f"run.dir={tmp_path}/run", "seed=3", "hub_id=a/b")
    align, tune = stage_runs(found).values()
    assert (align.data.source, tune.data.source) == ("coco_captions", "vqav2")
    assert (align.data.root, tune.data.root) == (str(tmp_path / "coco"), str(tmp_path / "vqa"))
    assert align.trainable == {"vision": "none", "projector": "all", "language": "none"}
    assert tune.trainable == {"vision": "none", "projector": "all", "language": "all"}
    assert (align.trainer["learning_rate"], tune.trainer["learning_rate"]) == (1e-3, 2e-5)
    questions = align.trainer["per_device_train_batch_size"] * align.trainer["gradient_accumulation_steps"]
    assert questions == 256 and align.data.questions_per_row == 1
    assert align.init_from is None and tune.init_from == {"model": f"{tmp_path}/run/stages/1-align"}
    assert tune.run == found.run and (align.seed, tune.seed) == (3, 3)
    assert (align.hub_id, tune.hub_id) == (None, "a/b")  # what is uploaded is the last model
    assert found.data == tune.data and found.trainer == tune.trainer  # the run's settings are the last stage's


def test_prismatic_in_one_stage(tmp_path: Path) -> None:
    found = train_config("experiment=prismatic_one_stage", f"data.root={tmp_path}")
    assert not found.stages and found.trainable == {"vision": "none", "projector": "all", "language": "all"}


def test_the_command_line_comes_after_the_stages_settings(tmp_path: Path) -> None:
    """For all of them; then what is given for one alone."""
    given = ["experiment=llava_two_stage", f"data.root={tmp_path}", "trainer.learning_rate=5e-4"]
    found = train_config(*given, "stages.tune.trainer.learning_rate=3e-4", "stages.tune.data=docvqa")
    assert [stage.trainer["learning_rate"] for stage in found.stages.values()] == [5e-4, 3e-4]
    assert [stage.data.source for stage in found.stages.values()] == ["coco_captions", "docvqa"]


def test_settings_before_the_stages_are_their_defaults() -> None:
    """As `base=...` of a study, whose arm sets the stages."""
    stages = "stages={one: ['trainer.max_steps=4', 'trainer.learning_rate=1e-3'], two: []}"
    found = train_config("trainer.max_steps=9", stages, "trainer.learning_rate=2e-3")
    assert [stage.trainer["max_steps"] for stage in found.stages.values()] == [4, 9]
    assert [stage.trainer["learning_rate"] for stage in found.stages.values()] == [2e-3, 2e-3]


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        (["stages.aling.seed=1"], "stages.aling: there is no such stage; did you mean 'align'"),
        (["stages.align.seed=1"], "stages.align: seed cannot be set in a stage"),
        (["stages.tune.model.projector.kind=linear"], "the model is that of the stage before"),
        (["stages.tune.trainer.lerning_rate=1"], "stages.tune: there is no key 'trainer.lerning_rate'; did you mean"),
        (["stages.tune.data.root=nowhere"], "stages.tune: data.root=nowhere does not exist"),
        (["stages.tune=3"], "stages.tune: 3 should be a list of settings"),
        (["stages.align.adapt=lora"], "stages.align: adapters can be trained in the last stage only"),
    ],
)
def test_mistakes_are_named_before_the_first_stage(given: list[str], problem: str, tmp_path: Path) -> None:
    with pytest.raises(InputError) as refused:
        (job,) = compose(["experiment=llava_two_stage", f"data.root={tmp_path}", *given], "train").jobs
        early_checks.refuse_mistakes(job.values, "train")
        build(TrainConfig, job.values, job.given)
    assert problem in str(refused.value)


def test_each_stage_is_planned(tmp_path: Path) -> None:
    found = config(PlanConfig, "plan", "experiment=llava_two_stage", "plan.gpus=2", f"run.dir={tmp_path}")
    align, tune = stage_plans(found).values()
    assert (align.data.source, tune.data.source) == ("coco_captions", "vqav2") and tune.plan.gpus == 2
    assert align.run.folder == tmp_path / "align" and align.trainable["language"] == "none"


def test_the_logs_of_the_stages_as_one(tmp_path: Path) -> None:
    (tmp_path / "stages" / "1-one").mkdir(parents=True)
    (tmp_path / "stages.json").write_text('{"one": "stages/1-one", "two": "."}')
    for folder, steps in ((tmp_path / "stages" / "1-one", 2), (tmp_path, 3)):
        records = [{"step": step, "epoch": step / 2, "loss": 1.0} for step in range(1, steps + 1)]
        (folder / "log.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    joined, starts = join(stage_logs(tmp_path))
    assert [record["step"] for record in joined] == [1, 2, 3, 4, 5] and joined[-1]["epoch"] == 2.5
    assert starts == {"one": 0, "two": 2}
    drawn = curves.draw_loss(curves.points(joined, "loss"), [], starts)
    assert "one" in drawn and "two" in drawn
    (tmp_path / "stages.json").unlink()
    assert [record["step"] for record in join(stage_logs(tmp_path))[0]] == [1, 2, 3]  # of a run without stages


@pytest.mark.slow
def test_stages_count_in_a_study_of_equal_operations(tmp_path: Path) -> None:
    """The last stage gets the operations that the first one leaves."""
    base = [f"base={setting}" for setting in (f"data.root={tmp_path / 'shapes'}", *SHAPES)]
    configs = build_arms(study("study=stages", f"run.dir={tmp_path}", *base))
    costs = arm_costs(configs)
    arm, tune = costs["align_then_tune"], costs["tune"]
    assert arm.before is not None and arm.steps == arm.before.steps + tune.steps and tune.tera_flop
    first = arm.before.tera_flop or 0.0
    assert arm.tera_flop == pytest.approx(first + tune.tera_flop)
    last = stage_runs(with_equal_flops(configs, costs)["align_then_tune"])["tune"]
    changed = costs["align_then_tune"]
    assert changed.tera_flop == pytest.approx(tune.tera_flop, rel=0.5 / tune.steps)
    assert last.trainer["max_steps"] == changed.steps - arm.before.steps < tune.steps
    costs |= {"align_then_tune": replace(arm, before=replace(arm.before, tera_flop=2 * tune.tera_flop))}
    with pytest.raises(InputError, match="the first stages of align_then_tune cost more than the baseline"):
        with_equal_flops(configs, costs)
