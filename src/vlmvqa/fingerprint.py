"""Short hashes that tell whether two runs used the same weights or the same data."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from PIL.Image import Image
from torch import nn

from vlmvqa.errors import InputError

if TYPE_CHECKING:
    from vlmvqa.data.example import Example, ImageSource

BLOCK, BLOCKS = 1 << 14, 8  # bytes of a block, and about how many of a tensor


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


def weights_in(folder: Path) -> str:
    """Of the weights in a folder's safetensors files, whatever their number: names, types, shapes, and of each tensor
    some blocks of its bytes, evenly spread. Of a model of any size it takes seconds.

    Raises:
        InputError: there are none.
    """
    tensors: dict[str, bytes] = {}
    for path in sorted(folder.glob("*.safetensors")):
        if path.name == "optimizer.safetensors":  # in a training checkpoint
            continue
        with path.open("rb") as opened:
            begin = 8 + int.from_bytes(opened.read(8), "little")
            header = json.loads(opened.read(begin - 8))
            header.pop("__metadata__", None)
            for name, about in header.items():
                start, end = about["data_offsets"]
                digest = hashlib.sha256(f"{about['dtype']} {about['shape']}".encode())
                for place in range(start, end, max(BLOCK, (end - start) // BLOCKS)):
                    opened.seek(begin + place)
                    digest.update(opened.read(min(BLOCK, end - place)))
                tensors[name] = digest.digest()
    if not tensors:
        raise InputError(f"{folder} holds no weights in safetensors files; put them back, or save the model as such")
    whole = hashlib.sha256()
    for name, digested in sorted(tensors.items()):
        whole.update(name.encode() + b"\0" + digested)
    return whole.hexdigest()


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
