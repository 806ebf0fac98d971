"""Controls that a score is read against: how far one gets without the image, with the wrong one, with a blank one."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import NamedTuple

from PIL import Image

from vlmvqa.data.example import Example
from vlmvqa.errors import InputError

BLANK = 64  # pixels a side


class Control(NamedTuple):
    """A baseline that the model's score is compared with.

    Attributes:
        name: in tables and reports.
        about: how its answers are made.
    """

    name: str
    about: str


# By their keys in metrics.json.
CONTROLS = {
    "prior": Control("majority baseline", "the most frequent training answer of each question type"),
    "shuffled_images": Control("shuffled images", "the same questions, each about another image"),
    "blank_images": Control("blank images", "the same questions, each about an image of one grey"),  # on request
}


def prior_answers(train: Iterable[Example], evaluated: Iterable[Example]) -> dict[int | str, str]:
    """Answer each evaluated question with the most frequent training answer of its question type.

    A question type that training has not seen, or a question without one, gets the most frequent answer overall;
    of equally frequent answers the alphabetically first is taken, so that no order of the examples matters.

    Raises:
        InputError: no training question has an answer.
    """
    overall: Counter[str] = Counter()
    per_type: dict[str, Counter[str]] = {}
    for example in train:
        for question in example.questions:
            if question.target is None:
                continue
            overall[question.target] += 1
            if question.question_type is not None:
                per_type.setdefault(question.question_type, Counter())[question.target] += 1
    if not overall:
        raise InputError("No training question has an answer to take the prior from; use a split that has answers.")
    fallback = _most_frequent(overall)
    answers = {question_type: _most_frequent(counts) for question_type, counts in per_type.items()}
    return {
        question.id: fallback if question.question_type is None else answers.get(question.question_type, fallback)
        for example in evaluated
        for question in example.questions
    }


def shuffle_images(examples: Sequence[Example], seed: int) -> list[Example] | None:
    """The same questions in the same order, each asked about the image of another example.

    The images (told apart by `image_id`) are put on a ring in random order and each gives way to the next: none stays,
    and each is used for exactly one other. The `image_id` goes with the image, since errors and galleries name it.

    Returns:
        The examples, or None when there are fewer than two different images.
    """
    images = {example.image_id: example.image for example in examples}
    if len(images) < 2:
        return None
    ring = list(images)
    random.Random(seed).shuffle(ring)
    following = dict(zip(ring, ring[1:] + ring[:1], strict=True))
    return [
        replace(example, image=images[following[example.image_id]], image_id=following[example.image_id])
        for example in examples
    ]


def blank_images(examples: Sequence[Example]) -> list[Example]:
    """The same questions about an image of one grey."""
    grey = grey_image()
    return [replace(example, image=grey, image_id=f"grey for {example.image_id}") for example in examples]


def grey_image() -> Image.Image:
    """What is shown in place of an image."""
    return Image.new("RGB", (BLANK, BLANK), (128, 128, 128))


def _most_frequent(counts: Counter[str]) -> str:
    return min(counts, key=lambda answer: (-counts[answer], answer))
