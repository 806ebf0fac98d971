"""Will it fit, and what should be set? Memory and speed under every strategy, without the GPUs, data or weights.

python launch/plan.py experiment=vlm_vqa_4xa10g
python launch/plan.py model=dinov2_gemma2_2b data=vqav2 dist=zero3 plan.gpu=a100_80 plan.gpus=2
python launch/plan.py model=paligemma_3b adapt=qlora data=docvqa plan.gpu=a4000 plan.gpus=1
python launch/plan.py experiment=vlm_vqa_4xa10g verify=true    three steps on the GPU that is here, planned and measured
"""

from __future__ import annotations

import usage  # noqa: F401 - first: it answers -h without PyTorch

import json
from dataclasses import dataclass

from omegaconf import DictConfig

import from_config
from vlmvqa.cli import group, run
from vlmvqa.data.tasks import DataSettings, one_task
from vlmvqa.errors import InputError
from vlmvqa.extras.adapters.peft_adapters import AdapterSettings
from vlmvqa.extras.planning import report, verify
from vlmvqa.extras.planning.gpus import gpu
from vlmvqa.extras.planning.planner import Planner, Rows, Settings, Training
from vlmvqa.extras.planning.published_sizes import known_architecture, known_config
from vlmvqa.inference import build
from vlmvqa.models.vlm import ModelSettings
from vlmvqa.settings import build_settings
from vlmvqa.training.distributed import DistSettings

# Questions an image: the data sets' published counts.
QUESTIONS = {"vqav2": 5.36, "gqa": 13.1, "coco_captions": 5.0, "docvqa": 3.9}
TEXT_TOKENS = {"vqav2": 13}  # of a question with its answer, on average


@dataclass(frozen=True)
class PlanSettings:
    """The `plan` node; its keys are explained in conf/plan.yaml."""

    gpu: str = "a10g"
    gpus: int = 4
    questions_per_image: float | None = None
    text_tokens: int | None = None
    answer_tokens: int = 4
    utilisation: float = 0.35


def main(config: DictConfig) -> None:
    planner = build_planner(config)
    checkpointing = bool(config.trainer.get("activation_checkpointing"))
    if config.verify:
        print(verify.verify(planner, checkpointing))
        return
    dist = build_settings(DistSettings, group(config, "dist"), "dist") if config.get("dist") else None
    chosen = planner.add(dist) if dist else "ddp"
    plans = planner.compare(checkpointing)
    print(report.headline(planner, checkpointing))
    if dist is None:
        print("dist is not set: ddp is taken as chosen")
    print(f"\n{report.table(plans, chosen)}\n\n{report.recommend(planner, plans, chosen)}")
    print(f"\n{report.LEGEND}")
    folder = from_config.run_folder(config)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "plan.json").write_text(json.dumps(report.record(planner, plans, chosen), indent=1) + "\n")
    (folder / "plan.md").write_text(report.markdown(planner, plans, chosen, checkpointing))
    print(f"\nplan: {folder / 'plan.md'}, {folder / 'plan.json'}")


def build_planner(config: DictConfig) -> Planner:
    """The planner of a training run's config."""
    plan = build_settings(PlanSettings, group(config, "plan"), "plan")
    settings, trainer, adapt = planned_model(config), group(config, "trainer"), None
    if config.get("adapt") is not None:
        adapt = build_settings(AdapterSettings, group(config, "adapt"), "adapt")
    data = one_task(config)
    asked, text = questions(plan, data, settings), text_tokens(plan, data)
    rows = Rows(trainer["per_device_train_batch_size"], asked, text, plan.answer_tokens, data.row_tokens)
    precision = "bf16" if trainer.get("bf16") else "fp16" if trainer.get("fp16") else "fp32"
    training = Training(precision, trainer["optim"], trainer["gradient_accumulation_steps"])
    trainable = group(config, "trainable")
    return Planner(settings, trainable, rows, training, gpu(plan.gpu), plan.gpus, plan.utilisation, adapt=adapt)


def planned_model(config: DictConfig) -> Settings:
    """The `model` group, refused where its sizes cannot be told without the hub."""
    settings, _ = build.model_settings(config)
    if isinstance(settings, ModelSettings):
        return known_architecture(settings)
    known_config(settings)
    return settings


def questions(plan: PlanSettings, data: DataSettings, settings: Settings) -> float:
    """Questions that share an image's row, on average."""
    if not isinstance(settings, ModelSettings):
        return 1.0
    asked = plan.questions_per_image or data.options.get("questions_per_image") or QUESTIONS.get(data.source)
    if asked is None:
        raise InputError(
            f"how many questions {data.source} asks of an image is not known; give plan.questions_per_image"
        )
    most = from_config.most_questions(data, settings.mode)
    return float(asked if most is None else min(asked, most))  # an image asked more is repeated


def text_tokens(plan: PlanSettings, data: DataSettings) -> int:
    # A packed row is as long whatever its questions are: how many of them it holds goes by the usual ones.
    usual = TEXT_TOKENS.get(data.source) if data.row_tokens else None
    tokens = plan.text_tokens or usual or data.max_text_tokens
    if tokens is None:
        raise InputError("data.max_text_tokens is null, so a question's length is not known; give plan.text_tokens")
    return tokens


if __name__ == "__main__":
    run(main, "plan")
