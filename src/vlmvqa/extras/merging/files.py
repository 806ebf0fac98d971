"""Weights in safetensors files, a piece of a tensor at a time: whatever a model's size, a piece of it is in memory."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from vlmvqa.errors import InputError
from vlmvqa.models import model_folder

PIECE = 1 << 20  # entries in memory at a time: 4 MB in float32, which stays in the processor's cache
INDEX = model_folder.WEIGHTS + ".index.json"  # of weights in several files, as transformers writes them
# safetensors' names of types; the others are of quantised weights, or no weights.
FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
WHOLE = {"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "BOOL": torch.bool}
TYPES = {**FLOATS, **WHOLE}


@dataclass(frozen=True)
class Entry:
    """A tensor in a file; `key` is its name there."""

    file: Path
    key: str
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

    Args:
        named: a tensor's name in the model, of that in the file; None: the model has none, and it is left out.

    Raises:
        InputError: the folder holds no weights, or a file cannot be read.
    """

    def __init__(self, folder: Path, named: Callable[[str], str | None] = str) -> None:
        self.folder = folder
        self.entries: dict[str, Entry] = {}
        for path in _files(folder):
            for key, shape, kind in contents(path):
                name = named(key)
                if name is not None:
                    self.entries[name] = Entry(path, key, shape, kind)

    def rows(self, name: str) -> Iterator[slice]:
        """Which rows of a tensor make a piece, from the first to the last."""
        entry = self.entries[name]
        if entry.size == 0:
            return
        rows = entry.shape[0] if entry.shape else 1
        step = max(1, PIECE * rows // entry.size)
        for start in range(0, rows, step):
            yield slice(start, start + step)

    def read(self, name: str, rows: slice) -> Tensor:
        """A piece's entries, flat and in float32, or in its own whole numbers."""
        entry = self.entries[name]
        return read_rows(entry.file, entry.key, rows, bool(entry.shape)).flatten()

    def pieces(self, name: str) -> Iterator[Tensor]:
        """All pieces of a tensor, one at a time."""
        return (self.read(name, rows) for rows in self.rows(name))

    def touches(self, name: str) -> bool:
        """Whether a tensor may be another one than the base's."""
        return True

    def value(self, name: str, rows: slice, base: Tensor) -> Tensor:
        """A piece, float32[n]; `base` is the same of the base."""
        return self.read(name, rows)

    def delta(self, name: str, rows: slice, base: Tensor) -> Tensor:
        """What tuning added to a piece of the base, float32[n]."""
        return self.read(name, rows) - base


def contents(path: Path) -> list[tuple[str, tuple[int, ...], str]]:
    """Name, shape and type of every tensor in a file.

    Raises:
        InputError: it cannot be read.
    """
    try:
        with safe_open(path, framework="pt") as file:
            slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118  # it is no mapping
            return [(key, tuple(one.get_shape()), one.get_dtype()) for key, one in slices.items()]
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path} cannot be read ({error}); copy the model again") from error


def read_rows(path: Path, key: str, rows: slice = slice(None), sliced: bool = True) -> Tensor:
    """Some rows of a tensor, in float32 (or in its own whole numbers).

    The file is opened anew for each, because what was read of an open one stays in memory.
    """
    with safe_open(path, framework="pt") as file:
        piece: Tensor = file.get_slice(key)[rows] if sliced else file.get_tensor(key)
        return piece.float() if piece.is_floating_point() else piece


def _files(folder: Path) -> list[Path]:
    if (folder / model_folder.WEIGHTS).is_file():
        return [folder / model_folder.WEIGHTS]
    if (folder / INDEX).is_file():
        places = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
        return [folder / name for name in dict.fromkeys(places.values())]
    raise InputError(f"{folder} holds neither {model_folder.WEIGHTS} nor {INDEX}; name a saved model's folder")


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
