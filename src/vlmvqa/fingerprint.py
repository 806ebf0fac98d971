"""SHA-256 hashes of weights and data, to check whether two runs used the same."""

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


BLOCK, BLOCKS = 1 << 14, 8  # size of a block in bytes, and about the number of blocks read from a tensor


def weights(module: nn.Module, *more: str) -> str:
    """Return the hash of all names, dtypes, shapes and values in a module's state dict, and of more texts."""
    digest = hashlib.sha256(" ".join(more).encode())
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def image_files(given: Iterable[Example], most: int = 64) -> str:
    """Return the hash of the image files of at most `most` examples, evenly spread."""
    images = list({example.image_id: example for example in given}.values())
    digest = hashlib.sha256()
    for example in images[:: -(-len(images) // most) or 1]:
        for image, _ in example.named_images:
            digest.update(hashlib.sha256(file_of(image) or b"").digest())
    return digest.hexdigest()


def weights_in(folder: Path) -> str:
    """Return the hash of the weights in a folder's safetensors files, however they are split into files.

    It includes names, dtypes, shapes, and some evenly spread blocks of each tensor's bytes, so it takes seconds for a
    model of any size.

    Raises:
        InputError: the folder has no weights.
    """
    tensors: dict[str, bytes] = {}
    for path in sorted(folder.glob("*.safetensors")):
        if path.name == "optimizer.safetensors":  # of a training checkpoint
            continue
        with path.open("rb") as stream:
            data_start = 8 + int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(data_start - 8))
            header.pop("__metadata__", None)
            for name, entry in header.items():
                start, end = entry["data_offsets"]
                digest = hashlib.sha256(f"{entry['dtype']} {entry['shape']}".encode())
                for offset in range(start, end, max(BLOCK, (end - start) // BLOCKS)):
                    stream.seek(data_start + offset)
                    digest.update(stream.read(min(BLOCK, end - offset)))
                tensors[name] = digest.digest()
    if not tensors:
        raise InputError(
            f"{folder} has no weights in safetensors files; restore them, or save the model in this format"
        )
    total = hashlib.sha256()
    for name, tensor_digest in sorted(tensors.items()):
        total.update(name.encode() + b"\0" + tensor_digest)
    return total.hexdigest()


def file(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def file_of(image: ImageSource) -> bytes | None:
    """Return the bytes of an image file; None if there is no file (any more)."""
    if isinstance(image, Image):
        return None
    try:
        return (image if isinstance(image, bytes) else image.read_bytes()) or None
    except OSError:
        return None


def examples(given: Iterable[Example]) -> str:
    """Return the hash of every question's id, prompt and references, and of the image ids but not the images."""
    digest = hashlib.sha256()
    for example in given:
        digest.update(f"{example.image_id!r}\n".encode())
        for question in example.questions:
            digest.update(f"{question.id!r} {question.prompt!r} {question.answers!r}\n".encode())
            for turn in question.history:
                digest.update(f"{turn.prompt!r} {turn.target!r}\n".encode())
    return digest.hexdigest()
