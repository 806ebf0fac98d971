"""Plan a training run from its config: print and write its memory and speed under every strategy."""

from __future__ import annotations

import json
from dataclasses import dataclass, field

from vlmvqa.config.schema import DataSettings, TrainConfig
from vlmvqa.errors import InputError
from vlmvqa.extras.planning import report, verify
from vlmvqa.extras.planning.batches import Rows
from vlmvqa.extras.planning.gpus import gpu
from vlmvqa.extras.planning.planner import Planner, Training
from vlmvqa.extras.planning.published_sizes import Settings, known_settings
from vlmvqa.models.vlm import ModelSettings
from vlmvqa.sequence.masks import SHAREABLE

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
    utilisation: float = 0.35


@dataclass(frozen=True)
class PlanConfig(TrainConfig):
    """Config of launch/plan.py: a training run and the GPUs to plan it for."""

    plan: PlanSettings = field(default_factory=PlanSettings)
    verify: bool = False


def plan(config: PlanConfig) -> None:
    """Print the plan and write `plan.json` and `plan.md`; with `verify`, compare with a few real steps instead."""
    planner = build_planner(config)
    checkpointing = bool(config.trainer.get("activation_checkpointing"))
    if config.verify:
        print(verify.verify(planner, checkpointing))
        return
    chosen = planner.add(config.dist) if config.dist else "ddp"
    plans = planner.compare(checkpointing)
    print(report.headline(planner, checkpointing))
    if config.dist is None:
        print("dist is not set: assuming ddp")
    print(f"\n{report.table(plans, chosen)}\n\n{report.recommend(planner, plans, chosen)}")
    print(f"\n{report.LEGEND}")
    folder = config.run.folder
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "plan.json").write_text(json.dumps(report.record(planner, plans, chosen), indent=1) + "\n")
    (folder / "plan.md").write_text(report.markdown(planner, plans, chosen, checkpointing))
    print(f"\nplan: {folder / 'plan.md'}, {folder / 'plan.json'}")


def build_planner(config: PlanConfig) -> Planner:
    """Return the planner of a training run."""
    settings, trainer, data = known_settings(config.model), config.trainer, config.data.single
    questions, tokens = _questions(config.plan, data, settings), _text_tokens(config.plan, data)
    rows = Rows(trainer["per_device_train_batch_size"], questions, tokens, config.plan.answer_tokens, data.row_tokens)
    precision = "bf16" if trainer.get("bf16") else "fp16" if trainer.get("fp16") else "fp32"
    training = Training(precision, trainer["optim"], trainer["gradient_accumulation_steps"])
    return Planner(
        settings,
        config.trainable,
        rows,
        training,
        gpu(config.plan.gpu),
        config.plan.gpus,
        config.plan.utilisation,
        adapt=config.adapt,
    )


def _questions(plan: PlanSettings, data: DataSettings, settings: Settings) -> float:
    """Return the mean number of questions that share an image's row."""
    if not isinstance(settings, ModelSettings):
        return 1.0
    count = plan.questions_per_image or data.options.get("questions_per_image") or QUESTIONS.get(data.source)
    if count is None:
        raise InputError(
            f"the number of questions per image of {data.source} is unknown; give plan.questions_per_image"
        )
    most = _most_questions(data, settings.attention_pattern)
    return float(count if most is None else min(count, most))  # an image with more questions fills several rows


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
