"""A scored run's predictions with their images, filtered by correctness, question type and confidence."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from vlmvqa.data import images
from vlmvqa.data.example import ImageSource
from vlmvqa.errors import InputError
from vlmvqa.extras.report.gallery import data_uri, record_confidence
from vlmvqa.metrics.registry import metric

PAGE_SIZE = 12
Correctness = Literal["all", "right", "wrong"]
Confidence = Literal["any", "under 50 %", "50 to 90 %", "over 90 %"]
# Inclusive lower and exclusive upper bound; a probability of 1 is in the last range.
RANGES = {"any": (0.0, 2.0), "under 50 %": (0.0, 0.5), "50 to 90 %": (0.5, 0.9), "over 90 %": (0.9, 2.0)}


@dataclass(frozen=True)
class Run:
    """A scored run.

    Attributes:
        records: lines of its predictions.jsonl.
        metric: name of the metric in the records.
        images: by image id, where the dataset is available.
    """

    records: Sequence[Mapping[str, Any]]
    metric: str
    images: Mapping[Any, ImageSource] = field(default_factory=dict)

    @property
    def types(self) -> list[str]:
        """Question types, the most frequent first."""
        return [name for name, _ in Counter(map(_type, self.records)).most_common() if name]

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
    return Run(records, name)


def page(run: Run, correctness: Correctness, kind: str, confidence: Confidence, index: int) -> dict[str, Any]:
    """Return the answers of one page, `first` being the number of the first one, and counts of answers and pages.

    Args:
        kind: a question type; empty: all types.
        index: of the page; clamped to the existing pages.
    """
    low, high = RANGES[confidence]
    selected = [
        record
        for record in run.records
        if (correctness == "all" or run.is_right(record) == (correctness == "right"))
        and kind in ("", _type(record))
        and low <= record_confidence(record) < high
    ]
    num_pages = max(1, math.ceil(len(selected) / PAGE_SIZE))
    index = min(index, num_pages - 1)
    first = index * PAGE_SIZE
    answers = [_answer(run, record) for record in selected[first : first + PAGE_SIZE]]
    return {"total": len(selected), "pages": num_pages, "page": index, "first": first + 1, "answers": answers}


def _answer(run: Run, record: Mapping[str, Any]) -> dict[str, Any]:
    thumbnail = None
    if record["image_id"] in run.images:
        with suppress(InputError):  # the image cannot be read
            thumbnail = data_uri(images.decode(run.images[record["image_id"]], "an image"))
    references = Counter(map(str, record["answers"])).most_common(4)
    return {
        "question": str(record["question"]),
        "text": str(record["answer"]),
        "probability": None if record["log_probability"] is None else record_confidence(record),
        "right": run.is_right(record),
        "references": [text + (f" x {count}" if count > 1 else "") for text, count in references],
        "type": _type(record),
        "image_id": record["image_id"],
        "thumbnail": thumbnail,
    }


def _type(record: Mapping[str, Any]) -> str:
    return str(record.get("question_type") or record.get("answer_type") or "")
