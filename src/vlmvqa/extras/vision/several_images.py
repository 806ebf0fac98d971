"""Refusal of questions about several images or none, and of conversations."""

from __future__ import annotations

from collections.abc import Iterable

from vlmvqa.data.example import Example, NoImage
from vlmvqa.errors import InputError


def refuse_several_images(examples: Iterable[Example], feature: str) -> None:
    """Raise an InputError at several images, none, or a conversation, where `feature` supports single questions."""
    for example in examples:
        if example.more_images:
            raise InputError(f"{feature} supports one image per question, but {example.name} is one of several")
        if isinstance(example.image, NoImage) or any(question.history for question in example.questions):
            raise InputError(f"{feature} supports questions about an image, not conversations such as {example.name}")
