"""Refusal of questions about several images."""

from __future__ import annotations

from collections.abc import Iterable

from vlmvqa.data.example import Example
from vlmvqa.errors import InputError


def refuse_several_images(examples: Iterable[Example], feature: str) -> None:
    """Raise an InputError if questions are about several images, where `feature` supports one."""
    for example in examples:
        if example.more_images:
            raise InputError(f"{feature} supports one image per question, but {example.name} is one of several")
