"""A scored run's predictions with their images, filtered by correctness, question type and confidence."""

from __future__ import annotations

import base64
import io
import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

from vlmvqa.data import images
from vlmvqa.data.example import ImageSource
from vlmvqa.errors import InputError
from vlmvqa.extras.report.gallery import record_confidence
from vlmvqa.extras.serving.html import answer_text, note, percent
from vlmvqa.metrics.registry import metric

PAGE_SIZE = 12
THUMBNAIL = (360, 300)  # pixels
CORRECTNESS = ("all", "right", "wrong")
ANY_TYPE = "every type"
# Inclusive lower and exclusive upper bound; a probability of 1 is in the last range.
CONFIDENCE = {"any": (0.0, 2.0), "under 50 %": (0.0, 0.5), "50 to 90 %": (0.5, 0.9), "over 90 %": (0.9, 2.0)}


@dataclass(frozen=True)
class Run:
    """A scored run.

    Attributes:
        name: name of its folder.
        records: lines of its predictions.jsonl.
        metric: name of the metric in the records.
        images: by image id, where the dataset is available.
    """

    name: str
    records: Sequence[Mapping[str, Any]]
    metric: str
    images: Mapping[Any, ImageSource] = field(default_factory=dict)

    @property
    def types(self) -> list[str]:
        """Question types, the most frequent first."""
        counts = Counter(_type(record) for record in self.records)
        return [name for name, _ in counts.most_common() if name]

    def select(self, correctness: str, kind: str, confidence: str) -> list[Mapping[str, Any]]:
        """Return the records that pass all filters, in their order; an unknown filter value passes all."""
        low, high = CONFIDENCE.get(confidence, (0.0, 2.0))
        types = set(self.types)
        return [
            record
            for record in self.records
            if (correctness not in ("right", "wrong") or self.is_right(record) == (correctness == "right"))
            and (kind not in types or _type(record) == kind)
            and low <= record_confidence(record) < high
        ]

    def is_right(self, record: Mapping[str, Any]) -> bool | None:
        """Return whether an answer is right; None without a score, or if the metric has no threshold for it."""
        return metric(self.metric).is_correct(record.get(self.metric))


def read(folder: Path) -> Run:
    """Read a scored run, without its images.

    Raises:
        InputError: the folder has no predictions, or they cannot be read.
    """
    predictions, metrics = folder / "predictions.jsonl", folder / "metrics.json"
    for path in (predictions, metrics):
        if not path.is_file():
            raise InputError(f"browse={folder} has no {path.name}; score the run first with launch/eval.py")
    try:
        records = [json.loads(line) for line in predictions.read_text(encoding="utf-8").split("\n") if line]
        name = json.loads(metrics.read_text(encoding="utf-8"))["metric"]
        metric(name)
        for record in records:
            if not {"image_id", "question", "answer", "log_probability", "answers"} <= record.keys():
                raise ValueError(f"a record has only {', '.join(record)}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"browse={folder} cannot be read ({error}); score the run again with launch/eval.py") from None
    return Run(folder.name, records, name)


def page(run: Run, correctness: str, kind: str, confidence: str, index: int) -> tuple[str, int, int]:
    """Return one page of the selected answers as HTML, its index clamped to the existing pages, and their number."""
    selected = run.select(correctness, kind, confidence)
    num_pages = max(1, math.ceil(len(selected) / PAGE_SIZE))
    index = min(max(index, 0), num_pages - 1)
    if not selected:
        return note("No answer passes these filters."), 0, 1
    shown = selected[index * PAGE_SIZE : (index + 1) * PAGE_SIZE]
    first = index * PAGE_SIZE + 1
    count = f"{first:,} to {first + len(shown) - 1:,} of {len(selected):,} answers"
    tiles = "".join(_tile(run, record) for record in shown)
    return f'<p class="vq-count">{count}</p><div class="vq-grid">{tiles}</div>', index, num_pages


def thumbnail(source: ImageSource, name: str) -> str | None:
    """Return a small JPEG as a data URI; None if the image cannot be read.

    Args:
        name: name of the image in error messages.
    """
    try:
        small = images.decode(source, name)
    except InputError:
        return None
    small.thumbnail(THUMBNAIL)
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=82)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"


def _tile(run: Run, record: Mapping[str, Any]) -> str:
    image_id = escape(str(record["image_id"]))
    source = run.images.get(record["image_id"])
    uri = None if source is None else thumbnail(source, "an image")
    right = run.is_right(record)
    word = "right" if right else "wrong"
    mark = "" if right is None else f'<span class="vq-mark vq-{word}">{word}</span>'
    counts = Counter(map(str, record["answers"])).most_common(4)
    references = ", ".join(escape(text) + (f" x {count}" if count > 1 else "") for text, count in counts)
    details = {
        "References": references or "not known",
        "Confidence": "" if record["log_probability"] is None else percent(record_confidence(record)),
        "Type": escape(_type(record)),
        "Image": image_id,
    }
    lines = "".join(f'<p class="vq-small">{name}: {text}</p>' for name, text in details.items() if text)
    return (
        '<article class="vq-tile">'
        + (f'<img src="{uri}" alt="image {image_id}">' if uri else "")
        + f"<div><p><small>Question:</small> {escape(str(record['question']))}</p>"
        f"<p><small>Answer:</small> <b>{answer_text(str(record['answer']))}</b> {mark}</p>{lines}</div></article>"
    )


def _type(record: Mapping[str, Any]) -> str:
    return str(record.get("question_type") or record.get("answer_type") or "")
