"""What every source yields: an image with the questions asked about it.

A source (one file in this folder) reads its benchmark's files into `Example`s grouped by image;
nothing after it knows which benchmark they came from. Images are decoded late, in the
DataLoader's workers (`images.py`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from PIL.Image import Image


class StoredPicture(Protocol):
    """What gives the bytes of a picture's file when asked: a path, a place in a shard (`packed.py`)."""

    def read_bytes(self) -> bytes: ...


ImageSource = Path | bytes | Image | StoredPicture


@dataclass(frozen=True, slots=True)
class Question:
    """One question about an image.

    Attributes:
        id: the benchmark's own id, as its result file wants it.
        text: the question as the data set has it.
        prompt: what the model reads: `text` in the task's template.
        target: the answer to train on (None: no answers are known, as in a test split).
        answers: all reference answers, as the metric takes them (empty in a test split).
        question_type, answer_type: the benchmark's categories, for the tables of the report.
        details: what the benchmark's metric needs besides, in the words of its official files; of GQA's evaluation
            splits, None elsewhere.
    """

    id: int | str
    text: str
    prompt: str
    target: str | None = None
    answers: tuple[str, ...] = ()
    question_type: str | None = None
    answer_type: str | None = None
    details: Mapping[str, Any] | None = field(default=None, hash=False)


@dataclass(frozen=True, slots=True)
class Example:
    """An image and its questions; `image_id` is the benchmark's, for shuffling and for errors."""

    image: ImageSource
    image_id: int | str
    questions: tuple[Question, ...]

    def part(self, first: int, end: int) -> Example:
        """The same image with some of its questions."""
        return replace(self, questions=self.questions[first:end])

    @property
    def name(self) -> str:
        """How an error names this record's image."""
        return str(self.image) if isinstance(self.image, Path) else f"image {self.image_id}"


def count_questions(examples: Iterable[Example]) -> int:
    """Number of questions over all images."""
    return sum(len(example.questions) for example in examples)


def all_answered(examples: Iterable[Example]) -> bool:
    """Whether there are references to score against; a test split has none."""
    return all(question.answers for example in examples for question in example.questions)
