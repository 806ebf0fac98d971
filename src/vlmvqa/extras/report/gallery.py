"""Samples of answers with their images, in the form that the report's template takes."""

from __future__ import annotations

import base64
import io
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from PIL import Image as pillow
from PIL.Image import Image

from vlmvqa.data.example import Example
from vlmvqa.data.images import decode
from vlmvqa.inference.predictor import confidence
from vlmvqa.metrics.registry import metric

Record = Mapping[str, Any]

# Longest side and JPEG quality; the first that gives at most `MAX_IMAGE_BYTES` is used, so noisy images stay small too.
FORMATS = ((320, 80), (320, 60), (240, 50))
MAX_IMAGE_BYTES = 32_000
# Colours of `attribution.draw` from low to high, as a CSS legend.
HEAT = (
    "linear-gradient(to right, rgb(0 0 4 / 0%), rgb(87 16 110 / 19%), rgb(188 55 84 / 38%), rgb(249 142 9 / 56%), "
    "rgb(252 255 164 / 75%))"
)
MAX_STEPS = 6  # evaluations shown per sample, the first and the last included


def choose_gallery(
    predictions: Sequence[Record], name: str, most: int = 24, seed: int = 0
) -> tuple[list[Record], list[Record]]:
    """Sample correct and wrong answers, sorted by confidence.

    For metrics that define no correct answer, the better and the worse half.

    Args:
        predictions: records of `predictions.jsonl`.
        name: the metric.
        most: maximum number of answers in each sample.
    """
    scored = [record for record in predictions if record[name] is not None]
    limit = metric(name).correct_from
    if limit is None:
        limit = median(record[name] for record in scored) if scored else 0.0
    right = [record for record in scored if record[name] >= limit]
    wrong = [record for record in scored if record[name] < limit]
    generator = random.Random(seed)
    right, wrong = (generator.sample(records, min(most, len(records))) for records in (right, wrong))
    return sorted(right, key=record_confidence, reverse=True), sorted(wrong, key=record_confidence, reverse=True)


def picture(example: Example) -> Image:
    """Return the image of an example, or its images side by side; raise an InputError if one cannot be read."""
    images = [decode(*one) for one in example.named_images]
    if len(images) == 1:
        return images[0]
    joined = pillow.new("RGB", (sum(one.width for one in images), max(one.height for one in images)), "white")
    left = 0
    for one in images:
        joined.paste(one, (left, 0))
        left += one.width
    return joined


def heading(limit: float | None, right: bool) -> tuple[str, str]:
    """Return the title and description of the gallery of right or wrong answers; `limit` is a right answer's score."""
    if limit is None:
        title = "The better half" if right else "The worse half"
        which = "the median or more" if right else "less than the median"
    else:
        title = "Answered right" if right else "Answered wrong"
        which = f"{limit:.0f} or more" if right else f"less than {limit:.0f}"
    return title, f"Scored {which}. A random sample, sorted by confidence."


def card(record: Record, thumbnails: Mapping[Any, str], metric: str) -> dict[str, Any]:
    """Return a record with its image as a data URI, score, confidence and counted references."""
    probability = None if record["log_probability"] is None else record_confidence(record)
    return {**_with_image(record, thumbnails), "score": record[metric], "probability": probability}


def _with_image(record: Record, thumbnails: Mapping[Any, str]) -> dict[str, Any]:
    image = thumbnails.get(record["image_id"])
    return {**record, "image": image, "counted": Counter(record["answers"]).most_common()}


def answer_history(samples: Sequence[Record], thumbnails: Mapping[Any, str], name: str) -> list[dict[str, Any]]:
    """Return each question of `samples.jsonl` with its answers at the evaluations during training."""
    by_question: dict[Any, dict[int, Record]] = {}
    for sample in samples:  # the last record of a step counts: a resumed run repeats steps
        by_question.setdefault(sample["question_id"], {})[sample["step"]] = sample
    steps = evenly(sorted({sample["step"] for sample in samples}), MAX_STEPS)
    questions = []
    for by_step in by_question.values():
        answers = []
        for sample in (by_step[step] for step in steps if step in by_step):
            right = metric(name).is_correct(sample["score"])
            answers.append({**sample, "probability": record_confidence(sample), "right": right})
        questions.append({**_with_image(next(reversed(by_step.values())), thumbnails), "history": answers})
    return questions


def evenly(items: Sequence[Any], most: int) -> list[Any]:
    """Return at most `most` evenly spaced items, the first and the last included."""
    if len(items) <= most or most < 2:
        return list(items)[:most]
    return [items[round(index * (len(items) - 1) / (most - 1))] for index in range(most)]


def record_confidence(record: Record) -> float:
    """Return the model's confidence in a record's answer."""
    return confidence(record["log_probability"])


def data_uri(image: Image) -> str:
    """Return a thumbnail as a data URI."""
    for side, quality in FORMATS:
        small = image.convert("RGB")
        small.thumbnail((side, side))
        buffer = io.BytesIO()
        small.save(buffer, "JPEG", quality=quality)
        content = buffer.getvalue()
        if len(content) <= MAX_IMAGE_BYTES:
            break
    return f"data:image/jpeg;base64,{base64.b64encode(content).decode('ascii')}"
