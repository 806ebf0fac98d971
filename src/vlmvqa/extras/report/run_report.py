"""The report of a scored run: collect its log, sample answers, images and attribution maps, and write the page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image

from vlmvqa.data import images
from vlmvqa.data.example import Example
from vlmvqa.errors import InputError
from vlmvqa.extras.report.attribution import attribute, draw
from vlmvqa.extras.report.gallery import Record, choose_gallery, evenly
from vlmvqa.extras.report.report import write_report
from vlmvqa.inference.predictor import Predictor
from vlmvqa.ranks import bar
from vlmvqa.training.log import SAMPLES, read_log


def attributions(
    predictor: Predictor, prompt: str, examples: Sequence[Example], predictions: Sequence[Record], name: str, most: int
) -> Sequence[tuple[Record, Image]] | str:
    """Return answers with the image under their attribution map, or the reason why attribution failed.

    Args:
        prompt: the template of these questions: each task of a mixture has its own.
        name: the metric, by which answers are right or wrong.
        most: how many answers at most, half of them correct if possible; each costs a forward pass.
    """
    if most < 1:
        return []
    predictor = replace(predictor, prompt=prompt)
    chosen = [record for group in choose_gallery(predictions, name) for record in evenly(group, -(-most // 2))]
    questions = {question.id: (example, question) for example in examples for question in example.questions}
    overlays: list[tuple[Record, Image]] = []
    try:
        for record in bar(chosen[:most], doing="attribution", unit="answers"):
            example, question = questions[record["question_id"]]
            image = images.decode(example.image, example.name)
            # Captions have no question text, and their prompt has no place for one.
            attribution = attribute(predictor, image, question.text or "caption", record["answer"])
            overlays.append((record, draw(image, attribution)))
    except InputError as error:
        return str(error).rstrip(".")
    except torch.OutOfMemoryError:  # must not lose the answers
        return "the GPU has too little memory for eager attention"
    return overlays


def write_run_report(
    run: Path,
    task: str,
    title: str,
    config_yaml: str,
    metrics: Mapping[str, Any],
    predictions: Sequence[Record],
    examples: Sequence[Example],
    maps: Sequence[tuple[Record, Image]] | str,
) -> None:
    """Write `report.html`.

    Args:
        run: the run's folder; the page of a mixture's task is written to a folder of its name in it.
        task: that name; "" for a single task.
        maps: `attributions`.
    """
    prefix = f"eval_{task}_" if task else "eval_"
    log = [
        {key.replace(prefix, "eval_", 1): value for key, value in record.items()}
        for record in read_log(run / "log.jsonl")
    ]
    samples = [record for record in read_log(run / SAMPLES) if record["task"] == task]
    right, wrong = choose_gallery(predictions, metrics["metric"])
    shown, pictures = {record["image_id"] for record in (*right, *wrong, *samples)}, {}
    for example in examples:
        with suppress(InputError):  # another program may have answered about an unreadable image
            if example.image_id in shown:
                pictures[example.image_id] = images.decode(example.image, example.name)
    write_report(
        run / task / "report.html",
        title=title,
        metrics=metrics,
        log=log,
        predictions=predictions,
        images=pictures,
        config_yaml=config_yaml,
        samples=samples,
        attributions=maps,
    )
