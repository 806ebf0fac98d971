"""The dataset-independent form of the data: an image with the questions asked about it.

Each reader in `datasets/` parses its benchmark's files into `Example`s grouped by image; no later step depends on the
benchmark. Images are decoded late, in the DataLoader's workers (`images.py`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from io import BytesIO
from pathlib import Path
from typing import Any, Protocol

from PIL.Image import Image
from PIL.Image import new as new_image


class StoredImage(Protocol):
    """An encoded image file that is read on demand: a path, or a position in a shard (`extras/shards`)."""

    def read_bytes(self) -> bytes:
        """Return the bytes of the image file."""
        ...


@dataclass(frozen=True)
class NoImage:
    """A grey pixel in the place of the image of a text-only question, which takes no tokens in the row.

    The encoder computes it nevertheless: ranks that run different modules would wait for each other.
    """

    def read_bytes(self) -> bytes:
        """Return the bytes of the image file."""
        file = BytesIO()
        new_image("RGB", (1, 1), (128, 128, 128)).save(file, "png")
        return file.getvalue()


ImageSource = Path | bytes | Image | StoredImage


@dataclass(frozen=True, slots=True)
class Question:
    """One question about an image.

    Attributes:
        id: the benchmark's id, as its results file expects it.
        text: the question as in the dataset.
        prompt: the model's input: `text` in the task's template.
        target: the answer to train on (None: unknown, as in a test split).
        answers: all reference answers, for the metric (empty in a test split).
        question_type, answer_type: the benchmark's categories, for the tables of the report.
        details: further fields that the benchmark's metric needs, named as in the official files: set by GQA's
            evaluation splits, None elsewhere.
        history: the turns of the conversation before this one, whose targets are inputs, and supervised in training.
    """

    id: int | str
    text: str
    prompt: str
    target: str | None = None
    answers: tuple[str, ...] = ()
    question_type: str | None = None
    answer_type: str | None = None
    details: Mapping[str, Any] | None = field(default=None, hash=False)
    history: tuple[Question, ...] = ()


@dataclass(frozen=True, slots=True)
class Example:
    """An image and its questions; `image_id` is the benchmark's id, used for shuffling and in errors.

    Questions about several images have the others in `more_images`.
    """

    image: ImageSource
    image_id: int | str
    questions: tuple[Question, ...]
    more_images: tuple[ImageSource, ...] = ()

    def with_questions(self, first: int, end: int) -> Example:
        """Return the image with questions `first` to `end` (exclusive) only."""
        return replace(self, questions=self.questions[first:end])

    @property
    def named_images(self) -> list[tuple[ImageSource, str]]:
        """Return every image with its name in error messages."""
        images = (self.image, *self.more_images)
        return [(one, str(one) if isinstance(one, Path) else f"image {self.image_id}") for one in images]

    @property
    def name(self) -> str:
        """Return the name of the first image in error messages."""
        return self.named_images[0][1]


def count_questions(examples: Iterable[Example]) -> int:
    """Return the number of questions of all images."""
    return sum(len(example.questions) for example in examples)


def all_answered(examples: Iterable[Example]) -> bool:
    """Return whether all questions have reference answers to score against; a test split has none."""
    return all(question.answers for example in examples for question in example.questions)
