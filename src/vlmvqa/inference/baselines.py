"""Controls for a score: the answer prior, shuffled images and blank images."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import NamedTuple

from PIL import Image

from vlmvqa.data.example import Example, NoImage
from vlmvqa.errors import InputError

BLANK_SIDE = 64  # pixels


class Control(NamedTuple):
    """A control score that the model's score is compared with.

    Attributes:
        name: column heading.
        description: how its answers are produced.
    """

    name: str
    description: str


# By key in metrics.json.
CONTROLS = {
    "prior": Control("majority baseline", "the most frequent training answer of each question type"),
    "shuffled_images": Control("shuffled images", "the same questions with another question's image"),
    "blank_images": Control("blank images", "the same questions with a uniform grey image"),  # optional
}


def prior_answers(train: Iterable[Example], evaluated: Iterable[Example]) -> dict[int | str, str]:
    """Answer each evaluated question with the most frequent training answer of its question type.

    A question without a type, or of a type that is not in the training split, gets the most frequent answer overall. In
    a tie the alphabetically first answer is used, so the order of the examples does not matter.

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
        raise InputError("No training question has an answer to compute the prior from; use a split with answers.")
    fallback = _most_frequent(overall)
    answers = {question_type: _most_frequent(counts) for question_type, counts in per_type.items()}
    return {
        question.id: fallback if question.question_type is None else answers.get(question.question_type, fallback)
        for example in evaluated
        for question in example.questions
    }


def shuffle_images(examples: Sequence[Example], seed: int) -> list[Example] | None:
    """Replace each example's images by another example's; the questions and their order stay the same.

    The images (identified by `image_id`) are cyclically shifted in random order: none keeps its place, and each is used
    exactly once. Several images of a question are exchanged with as many (a single one of its number stays), and
    text-only questions stay as they are. The `image_id` moves with the image, because errors and galleries name it.

    Returns:
        The examples, or None if there are fewer than two images.
    """
    images = {example.image_id: example for example in examples}
    by_count: dict[int, list[int | str]] = {}
    for example in images.values():
        count = 0 if isinstance(example.image, NoImage) else len(example.named_images)
        by_count.setdefault(count, []).append(example.image_id)
    if all(len(same) < 2 for count, same in by_count.items() if count):
        return None
    generator, shifted = random.Random(seed), {image: image for image in by_count.pop(0, [])}
    for order in by_count.values():
        generator.shuffle(order)
        shifted |= zip(order, order[1:] + order[:1], strict=True)
    return [replace(images[shifted[example.image_id]], questions=example.questions) for example in examples]


def blank_images(examples: Sequence[Example]) -> list[Example]:
    """Replace each example's images by uniform grey ones; text-only questions stay as they are."""
    grey = grey_image()
    return [
        one
        if isinstance(one.image, NoImage)
        else replace(one, image=grey, image_id=f"grey for {one.image_id}", more_images=(grey,) * len(one.more_images))
        for one in examples
    ]


def grey_image() -> Image.Image:
    """Return the blank image."""
    return Image.new("RGB", (BLANK_SIDE, BLANK_SIDE), (128, 128, 128))


def _most_frequent(counts: Counter[str]) -> str:
    return min(counts, key=lambda answer: (-counts[answer], answer))
