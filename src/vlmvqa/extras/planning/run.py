"""Plan a training run from its config: print and write its memory and speed under every strategy."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from math import ceil
from typing import Any

from vlmvqa.config.compose import build
from vlmvqa.config.overrides import compose
from vlmvqa.config.schema import DataSettings, TrainConfig
from vlmvqa.errors import InputError
from vlmvqa.extras.planning import report, verify
from vlmvqa.extras.planning.batches import Rows
from vlmvqa.extras.planning.gpus import gpu
from vlmvqa.extras.planning.planner import Planner, RunChoice, Training
from vlmvqa.extras.planning.published_sizes import Settings, known_settings
from vlmvqa.extras.planning.time import EFFICIENCY, OVERLAP, Assumptions, StepWork
from vlmvqa.extras.report.text_tables import aligned
from vlmvqa.extras.vision.tiles import tile_settings
from vlmvqa.models.vlm import ModelSettings
from vlmvqa.sequence.rows import SHAREABLE

# Questions per image: the datasets' published counts.
QUESTIONS = {"vqav2": 5.36, "gqa": 13.1, "coco_captions": 5.0, "docvqa": 3.9}
TEXT_TOKENS = {"vqav2": 13}  # mean tokens of a question with its answer


@dataclass(frozen=True)
class PlanSettings:
    """The `plan` group; conf/plan.yaml documents its keys."""

    gpu: str = "a10g"
    gpus: int = 4
    questions_per_image: float | None = None
    text_tokens: int | None = None
    answer_tokens: int = 4
    efficiency: float = EFFICIENCY
    overlap: float = OVERLAP
    link: float | None = None
    compare_with: str | None = "vlm_vqa_4xa10g"


@dataclass(frozen=True)
class PlanConfig(TrainConfig):
    """Config of launch/plan.py: a training run and the GPUs to plan it for."""

    plan: PlanSettings = field(default_factory=PlanSettings)
    verify: bool = False
    study: Any = None
    base: Sequence[str] = ()


def plan(config: PlanConfig) -> None:
    """Print the plan and write `plan.json` and `plan.md`; with `verify`, compare with a few real steps instead."""
    if config.study is not None:
        from vlmvqa.extras.study.plan import plan_study

        plan_study(config)
        return
    if config.base:
        raise InputError("base=... is for study=...; give settings of one training without base=")
    if config.stages:
        from vlmvqa.extras.stages.plan import stage_plans

        for name, stage in stage_plans(config).items():
            print(f"\nstage {name}")
            plan(stage)
        return
    planner = build_planner(config)
    chosen, checkpointing = chosen_run(config, planner)
    if config.verify:
        print(verify.verify(planner, checkpointing))
        return
    plans = planner.compare(checkpointing)
    print(report.headline(planner, checkpointing))
    if config.dist is None:
        print("dist is not set: assuming ddp")
    print(f"\n{report.table(plans, chosen)}\n\n{report.recommend(planner, plans, chosen)}")
    times = step_times(config, planner, chosen, checkpointing)
    for title, rows in times:
        print(f"\n{title}\n{aligned(rows, report.TEXTS)}")
    print(f"\n{report.LEGEND}")
    folder = config.run.folder
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "plan.json").write_text(json.dumps(report.record(planner, plans, chosen, times), indent=1) + "\n")
    (folder / "plan.md").write_text(report.markdown(planner, plans, chosen, checkpointing, times))
    print(f"\nplan: {folder / 'plan.md'}, {folder / 'plan.json'}")


def step_times(config: PlanConfig, planner: Planner, chosen: str, checkpointing: bool) -> report.Times:
    """Return the tables of a step's time, if the run fits, compared with `plan.compare_with`."""
    if not planner.memory(chosen, planner.rows.rows, checkpointing).fits:
        return []
    run = RunChoice(chosen, planner.rows.rows, checkpointing, planner.training.accumulation)
    return report.time_tables(planner, run, _compared(config, planner))


def _compared(config: PlanConfig, planner: Planner) -> tuple[str, StepWork] | None:
    """Return the step of another experiment on these GPUs, if it trains the same model."""
    name = config.plan.compare_with
    if name is None or not isinstance(planner.settings, ModelSettings):
        return None
    (job, *_) = compose([f"experiment={name}"], "plan").jobs
    other = build(PlanConfig, job.values, job.given)
    settings = known_settings(other.model)
    assert isinstance(settings, ModelSettings)
    language = replace(planner.settings.language, attention=settings.language.attention)
    if other.dist is None or replace(planner.settings, language=language) != settings:
        return None
    theirs = build_planner(replace(other, plan=replace(config.plan, text_tokens=None)))
    strategy, checkpointing = chosen_run(other, theirs)
    return name, theirs.work(RunChoice(strategy, theirs.rows.rows, checkpointing, theirs.training.accumulation))


def chosen_run(config: TrainConfig, planner: Planner) -> tuple[str, bool]:
    """Return the strategy of a run, ddp if none is set, and whether it recomputes activations."""
    strategy = planner.add(config.dist) if config.dist else "ddp"
    return strategy, bool(config.trainer.get("activation_checkpointing"))


def build_planner(config: PlanConfig) -> Planner:
    """Return the planner of a training run."""
    settings, trainer, data = known_settings(config.model), config.trainer, config.data.single
    questions, tokens = _questions(config.plan, data, settings, config.copy_images), _text_tokens(config.plan, data)
    mean = config.plan.text_tokens or TEXT_TOKENS.get(data.source)
    batch = trainer["per_device_train_batch_size"]
    tiles = 1 if data.tiles is None else tile_settings(data.tiles).inputs
    rows = Rows(batch, questions, tokens, config.plan.answer_tokens, data.row_tokens, mean, tiles)
    precision = "bf16" if trainer.get("bf16") else "fp16" if trainer.get("fp16") else "fp32"
    training = Training(precision, trainer["optim"], trainer["gradient_accumulation_steps"])
    planner = Planner(
        settings,
        config.trainable,
        rows,
        training,
        gpu(config.plan.gpu),
        config.plan.gpus,
        Assumptions(config.plan.efficiency, config.plan.overlap, config.plan.link),
        adapt=config.adapt,
    )
    return replace(planner, rows=_with_copies(planner)) if config.copy_images else planner


def _with_copies(planner: Planner) -> Rows:
    """Return the rows with a copy of the image for each question: one question per image, in longer rows."""
    copies = planner.images_per_row * planner.rows.max_questions
    tokens = ceil(copies * (planner.num_image_tokens + planner.rows.text_tokens) / 8) * 8
    return replace(planner.rows, questions=1.0, row_tokens=tokens)


def _questions(plan: PlanSettings, data: DataSettings, settings: Settings, copied: bool) -> float:
    """Return the mean number of questions that share an image's row."""
    if not isinstance(settings, ModelSettings):
        return 1.0
    count = plan.questions_per_image or data.options.get("questions_per_image") or QUESTIONS.get(data.source)
    if count is None:
        raise InputError(
            f"the number of questions per image of {data.source} is unknown; give plan.questions_per_image"
        )
    most = data.questions_per_row if copied else _most_questions(data, settings.attention_pattern)
    return float(count if most is None else min(count, most))  # more questions fill several rows


def _text_tokens(plan: PlanSettings, data: DataSettings) -> int:
    """Return the number of tokens of a question with its answer: the mean if rows are packed, otherwise the limit."""
    # Packed rows have nearly the same length, so the mean length of a question determines how many a row holds.
    usual = TEXT_TOKENS.get(data.source) if data.row_tokens else None
    tokens = plan.text_tokens or usual or data.max_text_tokens
    if tokens is None:
        raise InputError("data.max_text_tokens is null, so the length of a question is unknown; give plan.text_tokens")
    return tokens


def _most_questions(data: DataSettings, attention_pattern: str) -> int | None:
    """Return the limit on the questions of a row (None: no limit); it is 1 if the image attends to its question."""
    return data.questions_per_row if attention_pattern in SHAREABLE else 1
