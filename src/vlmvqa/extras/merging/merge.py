"""Merge models: check them, merge them tensor by tensor, write the merged folder."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator, Sequence
from math import sqrt
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vlmvqa import fingerprint
from vlmvqa.errors import InputError
from vlmvqa.extras.merging import files, methods, validation
from vlmvqa.extras.merging.adapter_delta import AdapterDelta, DequantizedWeights
from vlmvqa.extras.merging.files import FLOATS, Weights
from vlmvqa.extras.merging.settings import MergeSettings
from vlmvqa.extras.merging.statistics import MergeStatistics
from vlmvqa.extras.merging.tensor_names import TensorNames
from vlmvqa.extras.pretrained.hf_processor import load_processor
from vlmvqa.models import checkpoint
from vlmvqa.models.interface import DTYPES
from vlmvqa.models.loading import read_config
from vlmvqa.paths import replace_file
from vlmvqa.ranks import bar

CARD = "README.md"  # the base's model card, whose scores aren't those of the merged model
PROCESSOR = ("processor_config.json", "preprocessor_config.json")
COMBINE = {  # what each method does with the models' weights or kept changes
    "linear": methods.linear,
    "slerp": methods.weighted_sum,
    "task_arithmetic": methods.weighted_sum,
    "dare_linear": methods.weighted_sum,
    "ties": methods.ties,
    "dare_ties": methods.ties,
}


class Merge:
    """A merge of models that were checked to be compatible.

    Args:
        base: Folder of the model that all models were fine-tuned from; None: the base recorded by the adapters.
            `linear` and `slerp` of full models need no base; without it, no statistics are computed.
        models: Folders of full models and of adapters.
        settings: Method and its settings.
        into: Base weights that adapters trained over 4 bits are added to: "full" (the original weights) or
            "dequantized" (quantized and dequantized, as in the adapters' training).

    Raises:
        InputError: The models cannot be merged.
    """

    def __init__(self, base: Path | None, models: Sequence[Path], settings: MergeSettings, into: str = "full") -> None:
        settings.check_model_count(len(models))
        self.settings, self.into = settings, into
        self.statistics: dict[str, MergeStatistics] = {}
        self.adapters = {folder: own for folder in models if (own := validation.adapter_settings(folder)) is not None}
        found = validation.resolve_base(base, models)
        self.knows_base = found is not None
        if found is None:
            if settings.needs_base:
                raise InputError(f"base=... must be set: {settings.method} merges differences from a base")
            found = models[0]
        self.names = TensorNames.read(found)
        self.base = self._load_base(found)
        validation.check_not_quantized(self.base)
        self.models = [
            AdapterDelta(folder, self.base, self.adapters[folder])
            if folder in self.adapters
            else Weights(folder, self.names.model_name)
            for folder in models
        ]
        full_models = [model for model in self.models if isinstance(model, Weights)]
        for model in full_models:
            validation.check_not_quantized(model)
            validation.check_same_tensors(self.base, model)
        settings.check_patterns([self.names.path(name) for name in self.base.entries])
        if settings.needs_base:
            validation.check_started_from(found, [model.folder for model in full_models])
        self.config = validation.merged_config(self.base, models, self._started_from())
        self.thresholds: list[float] = []

    def run(self, folder: Path) -> None:
        """Write the merged model: weights, then the other files of the base's folder, `config.json` last."""
        entries, settings = self.base.entries, self.settings
        if settings.method == "ties" and settings.trim == "model":
            self.thresholds = self._thresholds([name for name, entry in entries.items() if entry.dtype in FLOATS])
        folder.mkdir(parents=True, exist_ok=True)
        (folder / checkpoint.CONFIG).unlink(missing_ok=True)
        total = sum(entry.numel for entry in entries.values())
        with bar(doing="merging", unit="entries", total=total, unit_scale=True) as progress:
            by_key = {entry.key: entry for entry in entries.values()}
            files.write(folder / checkpoint.WEIGHTS, by_key, self._all_chunks(progress))
        self._copy_other_files(folder)

    @property
    def over_four_bits(self) -> list[Path]:
        """Folders of the adapters that were trained over 4-bit weights."""
        return [folder for folder, settings in self.adapters.items() if settings.bits]

    def _load_base(self, folder: Path) -> Weights:
        if self.into == "full":
            return Weights(folder, self.names.model_name)
        if self.into != "dequantized":
            raise InputError(
                f"into={self.into} is unknown; use full (the base's own weights) or dequantized (the 4-bit weights of "
                "the adapters' training, dequantized): a merged model has full weights"
            )
        settings = list(self.adapters.values())
        kinds = {(one.bits, one.quantization, one.double_quantization) for one in settings}
        if len(kinds) != 1 or not settings[0].bits:
            raise InputError("into=dequantized: not all models are adapters over the same 4-bit weights; use into=full")
        dtypes = {read_config(one)["model"]["dtype"] for one in self.adapters}
        if len(dtypes) > 1:
            raise InputError(
                f"into=dequantized: the adapters' models have dtypes {' and '.join(dtypes)}; use into=full"
            )
        quantized = self.names.quantizable()
        return DequantizedWeights(folder, self.names.model_name, quantized, settings[0], DTYPES[dtypes.pop()])

    def _started_from(self) -> dict[str, str] | None:
        """Return the base to record in the merged config; without a base, the one that all models record."""
        if self.settings.needs_base or self.adapters:
            folder = self.base.folder
            return {"model": str(folder), "weights": fingerprint.weights_in(folder)}
        first, *others = (validation.own_config(model.folder).get("started_from") for model in self.models)
        return first if all(other == first for other in others) else None

    def _copy_other_files(self, folder: Path) -> None:
        """Copy the base's other files, then write `config.json`: a folder with `config.json` is complete."""
        skipped = {checkpoint.CONFIG, files.INDEX, CARD, *(entry.file.name for entry in self.base.entries.values())}
        if self.names.model is not None:
            skipped.update(PROCESSOR)
        for path in self.base.folder.iterdir():
            if path.is_dir():
                shutil.copytree(path, folder / path.name, dirs_exist_ok=True)
            elif path.name not in skipped:
                shutil.copy2(path, folder)
        if self.names.model is not None:  # training may have changed the processor's settings
            load_processor(str(self.models[0].folder)).save_pretrained(folder)
        replace_file(folder / checkpoint.CONFIG, json.dumps(self.config, indent=2) + "\n")

    def _all_chunks(self, progress: Any) -> Iterator[tuple[str, Tensor]]:
        for name, entry in self.base.entries.items():
            for chunk in self._merged(name) if entry.dtype in FLOATS else self.base.chunks(name):
                progress.update(chunk.numel())
                yield entry.key, chunk

    def _merged(self, name: str) -> Iterator[Tensor]:
        """Yield the chunks of a merged tensor, float32[n]."""
        settings, path = self.settings, self.names.path(name)
        weights = torch.tensor(settings.model_weights(path, len(self.models)))
        statistics = MergeStatistics(len(self.models))
        if self.knows_base:
            statistics = self.statistics.setdefault(path.partition(".")[0], statistics)
        thresholds = None
        if settings.method == "ties":
            thresholds = torch.tensor(self.thresholds or self._thresholds([name]))
        elif settings.method == "slerp":
            weights = torch.tensor(self._slerp_shares(name, float(weights[1] / weights.sum())))
        combine = COMBINE[settings.method]
        generators = [_generator(settings.seed, name, number) for number in range(len(self.models))]
        unchanged = settings.needs_base and not any(model.changes(name) for model in self.models)
        for rows in self.base.row_slices(name):
            base = self.base.read(name, rows)
            if unchanged:
                statistics.add(base)
                yield base
                continue
            if not settings.needs_base:
                values = torch.stack([model.value(name, rows, base) for model in self.models])
                kept = deltas = values - base
                merged = combine(values, weights)
            else:
                kept = deltas = torch.stack([model.delta(name, rows, base) for model in self.models])
                if thresholds is not None:
                    kept = methods.trim(deltas, thresholds)
                elif settings.method.startswith("dare"):
                    kept = methods.drop_and_rescale(deltas, settings.density, generators)
                merged = base + settings.scale * combine(kept, weights)
            if self.knows_base:
                statistics.add(base, deltas, kept)
            yield merged

    def _thresholds(self, names: Sequence[str]) -> list[float]:
        """Return the smallest kept magnitude of each model's deltas over these tensors."""
        kept = max(1, int(self.settings.density * sum(self.base.entries[name].numel for name in names)))

        def deltas(model: Weights | AdapterDelta) -> Iterator[Tensor]:
            for name in names:
                for rows in self.base.row_slices(name):
                    yield model.delta(name, rows, self.base.read(name, rows))

        return [
            methods.kth_magnitude(lambda model=model: deltas(model), kept)  # type: ignore[misc]
            if any(map(model.changes, names))
            else 0.0
            for model in self.models
        ]

    def _slerp_shares(self, name: str, share: float) -> tuple[float, float]:
        dot = first = second = 0.0
        for rows in self.base.row_slices(name):
            base = self.base.read(name, rows)
            one, other = (model.value(name, rows, base).double() for model in self.models)
            dot += float(one @ other)
            first += float(one @ one)
            second += float(other @ other)
        return methods.slerp_shares(dot, (sqrt(first), sqrt(second)), share)


def _generator(seed: int, name: str, model: int) -> torch.Generator:
    """Return the random generator of a model's tensor, independent of the other tensors and models."""
    digest = hashlib.blake2b(f"{seed} {name} {model}".encode(), digest_size=7).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little"))
