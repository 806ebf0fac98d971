"""The answers that a report shows with their pictures, as its page takes them."""

from __future__ import annotations

import base64
import io
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from PIL.Image import Image

from vlmvqa.extras.report.calibration import confidence
from vlmvqa.metrics.registry import metric

Record = Mapping[str, Any]

# Longest side and JPEG quality: the first that makes a picture small enough, so that a page of noise stays small too.
FORMATS = ((320, 80), (320, 60), (240, 50))
ENOUGH = 32_000  # bytes
# The colours of `look.draw` from low to high: a legend in CSS.
HEAT = (
    "linear-gradient(to right, rgb(0 0 4 / 0%), rgb(87 16 110 / 19%), rgb(188 55 84 / 38%), rgb(249 142 9 / 56%), "
    "rgb(252 255 164 / 75%))"
)
MOST_STEPS = 6  # evaluations of a sample that are shown: the first, the last, and some between


def choose_gallery(
    predictions: Sequence[Record], name: str, most: int = 24, seed: int = 0
) -> tuple[list[Record], list[Record]]:
    """The answers to show, right and wrong: a random sample of at most so many of each, by confidence.

    Where no score means right, the better and the worse half.
    """
    scored = [record for record in predictions if record[name] is not None]
    limit = metric(name).correct_from
    if limit is None:
        limit = median(record[name] for record in scored) if scored else 0.0
    right = [record for record in scored if record[name] >= limit]
    wrong = [record for record in scored if record[name] < limit]
    draw = random.Random(seed)
    right, wrong = (draw.sample(records, min(most, len(records))) for records in (right, wrong))
    return sorted(right, key=sureness, reverse=True), sorted(wrong, key=sureness, reverse=True)


def words(limit: float | None, right: bool) -> tuple[str, str]:
    """A gallery's heading, and which answers it shows."""
    if limit is None:
        heading, which = (
            ("The better half", "the median or more") if right else ("The worse half", "less than the median")
        )
    else:
        heading = "Answered right" if right else "Answered wrong"
        which = f"{limit:.0f} or more" if right else f"less than {limit:.0f}"
    return heading, f"Scored {which}. A random sample, sorted by confidence."


def card(record: Record, images: Mapping[Any, Image], metric: str) -> dict[str, Any]:
    """A record with its picture, its references counted."""
    image = images.get(record["image_id"])
    return {
        **record,
        "score": record[metric],
        "probability": None if record["log_probability"] is None else sureness(record),
        "picture": None if image is None else data_uri(image),
        "counted": Counter(record["answers"]).most_common(),
    }


def over_training(samples: Sequence[Record], images: Mapping[Any, Image], name: str) -> list[dict[str, Any]]:
    """Each sampled question with the answers it got at the evaluations of a training, records of `samples.jsonl`.

    Args:
        name: the metric.
    """
    by_question: dict[Any, dict[int, Record]] = {}
    for sample in samples:  # a step made again after a resume counts as it was last
        by_question.setdefault(sample["question_id"], {})[sample["step"]] = sample
    steps = evenly(sorted({sample["step"] for sample in samples}), MOST_STEPS)
    shown = []
    for found in by_question.values():
        last = next(reversed(found.values()))
        image = images.get(last["image_id"])
        answers = [_at_a_step(found[step], name) for step in steps if step in found]
        references: list[str] = last["answers"]
        counted = Counter(references).most_common()
        picture = None if image is None else data_uri(image)
        shown.append({**last, "picture": picture, "counted": counted, "over_time": answers})
    return shown


def _at_a_step(sample: Record, name: str) -> dict[str, Any]:
    return {**sample, "probability": sureness(sample), "right": metric(name).is_correct(sample["score"])}


def evenly(items: Sequence[Any], most: int) -> list[Any]:
    """At most so many of them, the first and the last included, at equal distances."""
    if len(items) <= most or most < 2:
        return list(items)[:most]
    return [items[round(place * (len(items) - 1) / (most - 1))] for place in range(most)]


def sureness(record: Record) -> float:
    """The model's confidence in a record's answer."""
    return confidence(record["log_probability"])


def data_uri(image: Image) -> str:
    """A small copy of a picture as a text that a page can hold."""
    content = b""
    for side, quality in FORMATS:
        small = image.convert("RGB")
        small.thumbnail((side, side))
        buffer = io.BytesIO()
        small.save(buffer, "JPEG", quality=quality)
        content = buffer.getvalue()
        if len(content) <= ENOUGH:
            break
    return f"data:image/jpeg;base64,{base64.b64encode(content).decode('ascii')}"
