"""A run's predictions with their pictures: what is right and wrong, by type and by the model's confidence."""

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
from vlmvqa.extras.serving.html import note, percent, words
from vlmvqa.metrics.registry import metric

PAGE = 12  # answers at a time
THUMBNAIL = (360, 300)  # pixels
WHICH = ("all", "right", "wrong")
EVERY = "every type"
# From, below; an answer of probability 1 is in the last.
CONFIDENCE = {"any": (0.0, 2.0), "under 50 %": (0.0, 0.5), "50 to 90 %": (0.5, 0.9), "over 90 %": (0.9, 2.0)}


@dataclass(frozen=True)
class Run:
    """A run's answers.

    Attributes:
        name: of its folder.
        records: of its predictions.jsonl.
        metric: by which they were scored.
        pictures: by image id, as far as the data is here.
    """

    name: str
    records: Sequence[Mapping[str, Any]]
    metric: str
    pictures: Mapping[Any, ImageSource] = field(default_factory=dict)

    @property
    def types(self) -> list[str]:
        """Question types, the most frequent first."""
        counts = Counter(_type(record) for record in self.records)
        return [name for name, _ in counts.most_common() if name]

    def choose(self, which: str, kind: str, confidence: str) -> list[Mapping[str, Any]]:
        """The records that pass all filters, in their order; what is no filter's choice passes all."""
        low, high = CONFIDENCE.get(confidence, (0.0, 2.0))
        types = set(self.types)
        return [
            record
            for record in self.records
            if (which not in ("right", "wrong") or self.right(record) == (which == "right"))
            and (kind not in types or _type(record) == kind)
            and low <= record_confidence(record) < high
        ]

    def right(self, record: Mapping[str, Any]) -> bool | None:
        """None: it has no score, or its metric knows no right and wrong."""
        return metric(self.metric).is_correct(record.get(self.metric))


def read(folder: Path) -> Run:
    """The answers that a run left, without their pictures.

    Raises:
        InputError: it left none, or they cannot be read.
    """
    paths = folder / "predictions.jsonl", folder / "metrics.json"
    for path in paths:
        if not path.is_file():
            raise InputError(f"browse={folder} has no {path.name}; score the run first with launch/eval.py")
    try:
        lines = paths[0].read_text(encoding="utf-8").split("\n")
        records = [json.loads(line) for line in lines if line]
        name = json.loads(paths[1].read_text(encoding="utf-8"))["metric"]
        metric(name)
        for record in records:
            if not {"image_id", "question", "answer", "log_probability", "answers"} <= record.keys():
                raise ValueError(f"a record has only {', '.join(record)}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"browse={folder} cannot be read ({error}); score the run again with launch/eval.py") from None
    return Run(folder.name, records, name)


def page(run: Run, which: str, kind: str, confidence: str, number: int) -> tuple[str, int, int]:
    """A page of the answers that pass, as HTML; its number as far as there is one, from 0; and how many there are."""
    chosen = run.choose(which, kind, confidence)
    pages = max(1, math.ceil(len(chosen) / PAGE))
    number = min(max(number, 0), pages - 1)
    if not chosen:
        return note("No answer passes these filters."), 0, 1
    shown = chosen[number * PAGE : (number + 1) * PAGE]
    first = number * PAGE + 1
    count = f"{first:,} to {first + len(shown) - 1:,} of {len(chosen):,} answers"
    tiles = "".join(_tile(run, record) for record in shown)
    return f'<p class="vq-count">{count}</p><div class="vq-grid">{tiles}</div>', number, pages


def thumbnail(source: ImageSource, name: str) -> str | None:
    """A picture as it stands in a page, a data URI; None where it cannot be read."""
    try:
        small = images.decode(source, name)
    except InputError:
        return None
    small.thumbnail(THUMBNAIL)
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=82)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"


def _tile(run: Run, record: Mapping[str, Any]) -> str:
    source = run.pictures.get(record["image_id"])
    uri = None if source is None else thumbnail(source, "a picture")
    right = run.right(record)
    word = "right" if right else "wrong"
    mark = "" if right is None else f'<span class="vq-mark vq-{word}">{word}</span>'
    counted = Counter(map(str, record["answers"])).most_common(4)
    references = ", ".join(escape(text) + (f" x {count}" if count > 1 else "") for text, count in counted)
    lines = {
        "References": references or "not known",
        "Confidence": "" if record["log_probability"] is None else percent(record_confidence(record)),
        "Type": escape(_type(record)),
        "Image": escape(str(record["image_id"])),
    }
    small = "".join(f'<p class="vq-small">{name}: {line}</p>' for name, line in lines.items() if line)
    return (
        '<article class="vq-tile">'
        + (f'<img src="{uri}" alt="image {escape(str(record["image_id"]))}">' if uri else "")
        + f"<div><p><small>Question:</small> {escape(str(record['question']))}</p>"
        f"<p><small>Answer:</small> <b>{words(str(record['answer']))}</b> {mark}</p>{small}</div></article>"
    )


def _type(record: Mapping[str, Any]) -> str:
    return str(record.get("question_type") or record.get("answer_type") or "")
