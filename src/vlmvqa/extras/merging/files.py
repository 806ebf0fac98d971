"""Read and write safetensors files in chunks, so that memory use does not depend on model size."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from vlmvqa.errors import InputError
from vlmvqa.models import checkpoint

CHUNK_SIZE = 1 << 20  # elements in memory at a time: 4 MB in float32, which fits the processor's cache
INDEX = checkpoint.WEIGHTS + ".index.json"  # index of sharded weights, as written by transformers
# safetensors' names of dtypes. Other dtypes are of quantized weights or not of weights.
FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
DTYPES = {**FLOATS, "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "BOOL": torch.bool}


@dataclass(frozen=True)
class Entry:
    """Location, shape and dtype of a tensor in a safetensors file; `key` is its name in the file."""

    file: Path
    key: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def numel(self) -> int:
        """Number of elements."""
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return self.numel * DTYPES[self.dtype].itemsize


class Weights:
    """The tensors of a saved model by name, in file order.

    Args:
        model_name: Maps a tensor's name in the file to its name in the model, or to None to skip it.

    Raises:
        InputError: The folder contains no weights, or a file cannot be read.
    """

    def __init__(self, folder: Path, model_name: Callable[[str], str | None] = str) -> None:
        self.folder = folder
        self.entries: dict[str, Entry] = {}
        for path in _weight_files(folder):
            for entry in list_entries(path):
                name = model_name(entry.key)
                if name is not None:
                    self.entries[name] = entry

    def row_slices(self, name: str) -> Iterator[slice]:
        """Yield the row ranges that split a tensor into chunks."""
        entry = self.entries[name]
        if entry.numel == 0:
            return
        rows = entry.shape[0] if entry.shape else 1
        step = max(1, CHUNK_SIZE * rows // entry.numel)
        for start in range(0, rows, step):
            yield slice(start, start + step)

    def read(self, name: str, rows: slice) -> Tensor:
        """Return a chunk, flattened, as float32 (integer tensors keep their dtype)."""
        entry = self.entries[name]
        return read_rows(entry.file, entry.key, rows, bool(entry.shape)).flatten()

    def chunks(self, name: str) -> Iterator[Tensor]:
        """Yield all chunks of a tensor."""
        return (self.read(name, rows) for rows in self.row_slices(name))

    def changes(self, name: str) -> bool:
        """Return whether a tensor may differ from the base's."""
        return True

    def value(self, name: str, rows: slice, base: Tensor) -> Tensor:
        """Return this model's chunk, float32[n]; `base` is the base's chunk, float32[n]."""
        return self.read(name, rows)

    def delta(self, name: str, rows: slice, base: Tensor) -> Tensor:
        """Return the difference from the base's chunk, float32[n]."""
        return self.read(name, rows) - base


def list_entries(path: Path) -> list[Entry]:
    """List all tensors in a safetensors file.

    Raises:
        InputError: The file cannot be read.
    """
    try:
        with safe_open(path, framework="pt") as file:
            slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118  # not a mapping
            return [Entry(path, key, tuple(one.get_shape()), one.get_dtype()) for key, one in slices.items()]
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path} cannot be read ({error}); copy the model again") from error


def read_rows(path: Path, key: str, rows: slice = slice(None), sliced: bool = True) -> Tensor:
    """Read rows of a tensor as float32 (integer tensors keep their dtype).

    The file is reopened for each call because an open file keeps the pages read from it in memory.
    """
    with safe_open(path, framework="pt") as file:
        chunk: Tensor = file.get_slice(key)[rows] if sliced else file.get_tensor(key)
        return chunk.float() if chunk.is_floating_point() else chunk


def _weight_files(folder: Path) -> list[Path]:
    if (folder / checkpoint.WEIGHTS).is_file():
        return [folder / checkpoint.WEIGHTS]
    if (folder / INDEX).is_file():
        weight_map = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
        return [folder / name for name in dict.fromkeys(weight_map.values())]
    raise InputError(f"{folder} contains neither {checkpoint.WEIGHTS} nor {INDEX}; name the folder of a saved model")


def write(path: Path, entries: Mapping[str, Entry], chunks: Iterable[tuple[str, Tensor]]) -> None:
    """Write a safetensors file chunk by chunk; the chunks arrive in the order of the entries.

    The file is written under a temporary name and then renamed, so that a file of this name is complete. Format: 8
    bytes with the header's length, the header (JSON with the dtype, shape and offsets of each tensor), the tensors'
    bytes (https://github.com/huggingface/safetensors).
    """
    tensors, end = {}, 0
    for name, entry in entries.items():
        tensors[name] = {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": [end, end + entry.nbytes]}
        end += entry.nbytes
    header = json.dumps({"__metadata__": {"format": "pt"}, **tensors}, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb") as file:
        file.write(len(header).to_bytes(8, "little"))
        file.write(header)
        written = 0
        for name, chunk in chunks:
            chunk = chunk.to(DTYPES[entries[name].dtype]).contiguous()
            written += file.write(chunk.view(torch.uint8).numpy().data)
        file.flush()
    if written != end:
        raise AssertionError(f"wrote {written} bytes of tensors, the header declares {end}")
    partial.replace(path)
