"""Weights in safetensors files, a piece of a tensor at a time: whatever a model's size, a piece of it is in memory."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from vlmvqa.errors import InputError
from vlmvqa.models import saved

PIECE = 1 << 20  # entries in memory at a time: 4 MB in float32, which stays in the processor's cache
INDEX = saved.WEIGHTS + ".index.json"  # of weights in several files, as transformers writes them
# safetensors' names of types; the others are of quantised weights, or no weights.
FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
WHOLE = {"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "BOOL": torch.bool}
TYPES = {**FLOATS, **WHOLE}


@dataclass(frozen=True)
class Entry:
    """A tensor in a file."""

    file: Path
    shape: tuple[int, ...]
    type: str

    @property
    def size(self) -> int:
        """Entries."""
        return prod(self.shape)

    @property
    def bytes(self) -> int:
        return self.size * TYPES[self.type].itemsize


class Weights:
    """A model's tensors by name, in the order of their files.

    Raises:
        InputError: the folder holds no weights, or a file cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.entries: dict[str, Entry] = {}
        for path in _files(folder):
            try:
                with safe_open(path, framework="pt") as file:
                    for name in file.keys():  # noqa: SIM118  # it is no mapping
                        tensor = file.get_slice(name)
                        self.entries[name] = Entry(path, tuple(tensor.get_shape()), tensor.get_dtype())
            except (OSError, SafetensorError) as error:
                raise InputError(f"{path} cannot be read ({error}); copy the model again") from error

    def pieces(self, name: str) -> Iterator[Tensor]:
        """A tensor's entries, flat and in float32 (or its own whole numbers), a piece at a time.

        The file is opened anew for each, because what was read of an open one stays in memory.
        """
        entry = self.entries[name]
        if entry.size == 0:
            return
        rows = entry.shape[0] if entry.shape else 1
        step = max(1, PIECE * rows // entry.size)
        for start in range(0, rows, step):
            with safe_open(entry.file, framework="pt") as file:
                piece = file.get_slice(name)[start : start + step] if entry.shape else file.get_tensor(name)
                yield piece.float().flatten() if entry.type in FLOATS else piece.flatten()


def _files(folder: Path) -> list[Path]:
    if (folder / saved.WEIGHTS).is_file():
        return [folder / saved.WEIGHTS]
    if (folder / INDEX).is_file():
        places = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
        return [folder / name for name in dict.fromkeys(places.values())]
    raise InputError(f"{folder} holds neither {saved.WEIGHTS} nor {INDEX}; name a saved model's folder")


def write(path: Path, entries: Mapping[str, Entry], pieces: Iterable[tuple[str, Tensor]]) -> None:
    """Write a safetensors file as its tensors come, all of one before the next, in the order of the entries.

    A name on the way, so that a file of this name is whole. The format: 8 bytes with the header's length, the header
    (JSON: each tensor's type, shape and place), the tensors' bytes (https://github.com/huggingface/safetensors).
    """
    places, end = {}, 0
    for name, entry in entries.items():
        places[name] = {"dtype": entry.type, "shape": list(entry.shape), "data_offsets": [end, end + entry.bytes]}
        end += entry.bytes
    header = json.dumps({"__metadata__": {"format": "pt"}, **places}, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb") as file:
        file.write(len(header).to_bytes(8, "little"))
        file.write(header)
        written = 0
        for name, piece in pieces:
            written += _write(file, piece.to(TYPES[entries[name].type]))
        file.flush()
    if written != end:
        raise AssertionError(f"{written} bytes were written, {end} were announced")
    partial.replace(path)


def _write(file: BinaryIO, piece: Tensor) -> int:
    return file.write(piece.contiguous().view(torch.uint8).numpy().data)
