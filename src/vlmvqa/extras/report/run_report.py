"""The report of a scored run: collect its log, sample answers, images and attribution maps, and write the page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from PIL.Image import Image

from vlmvqa.data import images
from vlmvqa.data.example import Example
from vlmvqa.errors import InputError
from vlmvqa.extras.report.attribution import report_attributions
from vlmvqa.extras.report.gallery import Record
from vlmvqa.extras.report.report import shown_images, write_report
from vlmvqa.inference.predictor import Predictor
from vlmvqa.training.log import SAMPLES, read_log


def attributions(
    predictor: Predictor, prompt: str, examples: Sequence[Example], predictions: Sequence[Record], name: str, most: int
) -> Sequence[tuple[Record, Image]] | str:
    """Return answers with their attribution maps, or the reason why there are none.

    Args:
        prompt: the template of these questions: each task of a mixture has its own.
        name: the metric, by which answers are right or wrong.
        most: how many answers at most.
    """
    return report_attributions(replace(predictor, prompt=prompt), examples, predictions, name, most)


def write_run_report(
    run: Path,
    task: str,
    title: str,
    config_yaml: str,
    metrics: Mapping[str, Any],
    predictions: Sequence[Record],
    examples: Sequence[Example],
    maps: Sequence[tuple[Record, Image]] | str,
) -> Path:
    """Write `report.html` and return its path.

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
    shown, pictures = shown_images(predictions, metrics["metric"], samples), {}
    for example in examples:
        with suppress(InputError):  # another program may have answered about an unreadable image
            if example.image_id in shown:
                pictures[example.image_id] = images.decode(example.image, example.name)
    path = run / task / "report.html"
    write_report(
        path,
        title=title,
        metrics=metrics,
        log=log,
        predictions=predictions,
        images=pictures,
        config_yaml=config_yaml,
        samples=samples,
        attributions=maps,
    )
    return path
