"""Short hashes that tell whether two runs used the same weights or the same data."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

import torch
from PIL.Image import Image
from torch import nn

from vlmvqa.data.example import Example, ImageSource


def weights(module: nn.Module, *more: str) -> str:
    """Of every name, type, shape and value of a module's state, and of what else is given."""
    digest = hashlib.sha256(" ".join(more).encode())
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def pictures(given: Iterable[Example], most: int = 64) -> str:
    """Of the files of at most so many pictures, evenly spread."""
    once = list({example.image_id: example for example in given}.values())
    digest = hashlib.sha256()
    for example in once[:: -(-len(once) // most) or 1]:
        content = file_of(example.image)
        digest.update(hashlib.sha256(content or b"").digest())
    return digest.hexdigest()


def file(path: Path) -> str:
    """Of a file's bytes."""
    with path.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def file_of(image: ImageSource) -> bytes | None:
    """The bytes of a picture's file; None where there is none (any more)."""
    if isinstance(image, Image):
        return None
    try:
        return (image if isinstance(image, bytes) else image.read_bytes()) or None
    except OSError:
        return None


def examples(given: Iterable[Example]) -> str:
    """Of every question with its id, image, prompt and references; of the pictures, only their names."""
    digest = hashlib.sha256()
    for example in given:
        digest.update(f"{example.image_id!r}\n".encode())
        for question in example.questions:
            digest.update(f"{question.id!r} {question.prompt!r} {question.answers!r}\n".encode())
    return digest.hexdigest()
