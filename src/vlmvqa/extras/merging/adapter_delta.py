"""The change that an adapter makes to each base weight, computed one chunk of rows at a time.

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
from vlmvqa.extras.merging.files import Entry, Weights, list_entries, read_rows

DOWN, UP, NORM = ".lora_A.weight", ".lora_B.weight", ".lora_magnitude_vector"


class AdapterDelta:
    """A saved adapter with the interface of `Weights`: values and deltas of the base's tensors.

    An adapter file may also contain full weights, of parts that were trained without adapters.

    Raises:
        InputError: The adapter file cannot be read, or belongs to another base.
    """

    def __init__(self, folder: Path, base: Weights, settings: AdapterSettings) -> None:
        self.folder, self.settings = folder, settings
        self.file = peft_adapters.weights_file(folder)
        self.entries: dict[str, Entry] = {}
        for entry in list_entries(self.file):
            self.entries[peft_adapters.peft_name(entry.key).removeprefix(peft_adapters.PEFT_PREFIX)] = entry
        self.adapted = {key.removesuffix(DOWN) + ".weight" for key in self.entries if key.endswith(DOWN)}
        self.full = {key for key in self.entries if ".lora_" not in key}
        shapes = {name: list(self.entries[name].shape) for name in self.full}
        for name in self.adapted:
            module = name.removesuffix(".weight")
            rows = self.entries[module + UP].shape[0] if module + UP in self.entries else 0
            shapes[name] = [rows, self.entries[module + DOWN].shape[-1]]
        for name, shape in shapes.items():
            there = base.entries.get(name)
            if there is None or list(there.shape) != shape:
                reason = "does not exist there" if there is None else f"is {list(there.shape)} there, {shape} here"
                raise InputError(
                    f"{self.file} belongs to another model than {base.folder}: {name} {reason}; name its base"
                )

    def changes(self, name: str) -> bool:
        """See `Weights.changes`."""
        return name in self.adapted or name in self.full

    def value(self, name: str, rows: slice, base: Tensor) -> Tensor:
        """See `Weights.value`."""
        return base + self.delta(name, rows, base)

    def delta(self, name: str, rows: slice, base: Tensor) -> Tensor:
        """See `Weights.delta`."""
        if name in self.full:
            return self._read(name, rows).flatten() - base
        if name not in self.adapted:
            return torch.zeros_like(base)
        module, settings = name.removesuffix(".weight"), self.settings
        delta = settings.alpha / settings.rank * (self._read(module + UP, rows) @ self._read(module + DOWN))
        if settings.method == "dora":
            weight = base.view_as(delta)
            direction = weight + delta
            delta = direction * (self._read(module + NORM, rows) / direction.norm(dim=1))[:, None] - weight
        return delta.flatten()

    def _read(self, name: str, rows: slice = slice(None)) -> Tensor:
        return read_rows(self.file, self.entries[name].key, rows)


class DequantizedWeights(Weights):
    """Base weights as seen by adapters trained over 4 bits: quantized and dequantized; the others in the model's dtype.

    Args:
        quantized: Names of the weights that were quantized to 4 bits.
        settings: Settings of the adapters.
        dtype: Dtype of the model that the adapters were trained with.
    """

    def __init__(
        self,
        folder: Path,
        model_name: Callable[[str], str | None],
        quantized: set[str],
        settings: AdapterSettings,
        dtype: torch.dtype,
    ) -> None:
        super().__init__(folder, model_name)
        self.quantized, self.dtype = quantized, dtype
        self.round_trip = partial(peft_adapters.through_four_bits, settings=settings)
        self._cached: tuple[str, Tensor] = ("", torch.empty(0))  # quantization blocks span rows: keep a full tensor

    def read(self, name: str, rows: slice) -> Tensor:
        """See `Weights.read`."""
        if name not in self.quantized:
            chunk = super().read(name, rows)
            return chunk.to(self.dtype).float() if chunk.is_floating_point() else chunk
        if self._cached[0] != name:
            entry = self.entries[name]
            self._cached = name, self.round_trip(read_rows(entry.file, entry.key).to(self.dtype))
        return self._cached[1][rows].float().flatten()
