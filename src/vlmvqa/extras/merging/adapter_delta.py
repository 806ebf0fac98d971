"""Adapters as what they add to each weight of their base: never more of it in memory than a piece and their matrices.

delta = scale * B A                                      LoRA
delta = norm * (W + scale * B A) / |W + scale * B A| - W   DoRA, row by row
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from vlmvqa.errors import InputError
from vlmvqa.extras.adapters import peft_adapters
from vlmvqa.extras.adapters.peft_adapters import AdapterSettings
from vlmvqa.extras.merging.files import Weights, contents, read_rows

DOWN, UP, NORM = ".lora_A.weight", ".lora_B.weight", ".lora_magnitude_vector"


class Adapted:
    """A base with a saved adapter's deltas; where a part was trained whole beside them, with its weights.

    Raises:
        InputError: the adapter's file cannot be read, or is of another model.
    """

    def __init__(self, folder: Path, base: Weights, settings: AdapterSettings) -> None:
        self.folder, self.settings = folder, settings
        self.file = peft_adapters.weights_file(folder)
        self.keys: dict[str, str] = {}
        shapes: dict[str, tuple[int, ...]] = {}
        for key, shape, _ in contents(self.file):
            name = peft_adapters.peft_name(key).removeprefix(peft_adapters.PEFT_PREFIX)
            self.keys[name], shapes[name] = key, shape
        self.adapted = {key.removesuffix(DOWN) + ".weight" for key in shapes if key.endswith(DOWN)}
        self.whole = {key for key in shapes if ".lora_" not in key}
        for name in self.adapted:
            module = name.removesuffix(".weight")
            wanted = [shapes.get(module + UP, (0,))[0], shapes[module + DOWN][-1]]
            self._refuse_other(base, name, wanted)
        for name in self.whole:
            self._refuse_other(base, name, list(shapes[name]))

    def touches(self, name: str) -> bool:
        """As of `Weights`."""
        return name in self.adapted or name in self.whole

    def value(self, name: str, rows: slice, base: Tensor) -> Tensor:
        """As of `Weights`."""
        return base + self.delta(name, rows, base)

    def delta(self, name: str, rows: slice, base: Tensor) -> Tensor:
        """As of `Weights`."""
        if name in self.whole:
            return self._read(name, rows).flatten() - base
        if name not in self.adapted:
            return torch.zeros_like(base)
        module, settings = name.removesuffix(".weight"), self.settings
        added = settings.alpha / settings.rank * (self._read(module + UP, rows) @ self._read(module + DOWN))
        if settings.method == "dora":
            weight = base.view_as(added)
            turned = weight + added
            added = turned * (self._read(module + NORM, rows) / turned.norm(dim=1))[:, None] - weight
        return added.flatten()

    def _read(self, name: str, rows: slice = slice(None)) -> Tensor:
        return read_rows(self.file, self.keys[name], rows)

    def _refuse_other(self, base: Weights, name: str, shape: list[int]) -> None:
        entry = base.entries.get(name)
        if entry is None or list(entry.shape) != shape:
            there = "is not there" if entry is None else f"is {list(entry.shape)} there, {shape} here"
            raise InputError(f"{self.file} is of another model than {base.folder}: {name} {there}; name its own base")


class Dequantized(Weights):
    """A base as adapters over 4 bits saw it: its weights through 4 bits and back, the others in the model's type.

    Args:
        packed: the names of the weights that were kept in 4 bits.
        dtype: the model's.
    """

    def __init__(
        self,
        folder: Path,
        named: Callable[[str], str | None],
        packed: set[str],
        settings: AdapterSettings,
        dtype: torch.dtype,
    ) -> None:
        super().__init__(folder, named)
        self.packed, self.dtype = packed, dtype
        self.through = partial(peft_adapters.through_four_bits, settings=settings)
        self._kept: tuple[str, Tensor] = ("", torch.empty(0))  # blocks of 4 bits go across rows: a tensor at a time

    def read(self, name: str, rows: slice) -> Tensor:
        """As of `Weights`."""
        if name not in self.packed:
            piece = super().read(name, rows)
            return piece.to(self.dtype).float() if piece.is_floating_point() else piece
        if self._kept[0] != name:
            entry = self.entries[name]
            self._kept = name, self.through(read_rows(entry.file, entry.key).to(self.dtype))
        return self._kept[1][rows].float().flatten()
