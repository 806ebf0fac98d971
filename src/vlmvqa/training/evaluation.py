"""Scores of a training run: at each evaluation, and of the saved model at the end; and their publication."""

from __future__ import annotations

import gc
import time
from collections.abc import Sequence
from typing import Any

import torch

from vlmvqa import ranks
from vlmvqa.config.compose import to_yaml
from vlmvqa.inference.evaluate import EvalSpec
from vlmvqa.inference.predictor import Predictor, load
from vlmvqa.inference.scoring import Output, ScoredTask, score_and_report
from vlmvqa.metrics.registry import score
from vlmvqa.models.trained_model import TrainedModel
from vlmvqa.training.log import rounded
from vlmvqa.training.run import Session


def score_now(session: Session, trained: TrainedModel, step: int) -> dict[str, float]:
    """Score each task during training; return each score, the mean of several, and the speed."""
    arguments, tracking = session.arguments, session.tracking
    found: dict[str, float] = {}
    answered, began = 0, time.perf_counter()
    for task in session.tasks:
        if not task.answered:
            continue
        answers = Predictor.of(trained).answer_examples(
            task.evaluated,
            batch_size=arguments.per_device_eval_batch_size,
            workers=arguments.dataloader_num_workers,
            bad_records=session.bad_records,
            progress=True,
        )
        answered += len(answers)
        texts = {name: answer.text for name, answer in answers.items()}
        scored = score(task.evaluated, texts, task.data.metric, **task.metric_options)
        if scored.overall is not None:
            found[f"{task.prefix}{task.data.metric}"] = scored.overall
        if ranks.is_first() and tracking is not None:
            tracking.sample(task, answers, scored.per_question)
    if ranks.is_first() and tracking is not None:
        tracking.log_samples(step)
    if len(session.tasks) > 1 and found:
        found["mean"] = sum(found.values()) / len(found)
    if answered:
        found["questions_per_second"] = rounded(answered / (time.perf_counter() - began))
    return found


def score_tasks(session: Session) -> list[dict[str, Any]]:
    """Score the saved model on each task and write the results; return the content of each `metrics.json`."""
    config, arguments = session.config, session.arguments
    gc.collect()  # the trained model is freed before the saved one is loaded
    torch.cuda.empty_cache()
    predictor = load(session.folder / "model", str(arguments.device))
    output = Output(session.folder, str(config.run.name), to_yaml(config), config.report, config.attributions)
    found = []
    for task in session.tasks:
        spec = EvalSpec(
            task.evaluated,
            task.train,
            task.data.metric,
            config.seed,
            options=task.metric_options,
            extra_metrics=task.data.extra,
        )
        found.append(
            score_and_report(
                predictor,
                str(session.folder / "model"),
                ScoredTask(spec, task.data, task.data.eval_split, task.name),
                output,
                session.bad_records,
                batch_size=arguments.per_device_eval_batch_size,
                workers=arguments.dataloader_num_workers,
            )
        )
    return found


def publish(session: Session, metrics: Sequence[dict[str, Any]]) -> None:
    """Report the final scores to the loggers, write the model card, and upload the model if `hub_id` asks for it."""
    from vlmvqa.extras.report.model_card import write_card

    config, model = session.config, session.folder / "model"
    if session.tracking is not None:
        session.tracking.finish(
            {
                f"{task.name or one['data']}_{name}": values["overall"]
                for task, one in zip(session.tasks, metrics, strict=True)
                for name, values in one["metrics"].items()
            }
        )
    write_card(model, config.hub_id or config.run.dir, metrics, to_yaml(config))
    print(f"model:  {model}")
    if config.hub_id:
        from vlmvqa.extras.hub.upload import upload

        print(f"hub:    {upload(model, config.hub_id)}")
