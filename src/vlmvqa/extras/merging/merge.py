"""Merge models file by file: what is refused, what each tensor becomes, what is counted on the way."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from math import isfinite, sqrt
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vlmvqa import fingerprint
from vlmvqa.errors import InputError, suggest
from vlmvqa.extras.adapters.peft_adapters import AdapterSettings
from vlmvqa.extras.merging import files, methods, validation
from vlmvqa.extras.merging.adapter_delta import Adapted, Dequantized
from vlmvqa.extras.merging.files import FLOATS, Weights
from vlmvqa.extras.merging.tensor_names import Layout
from vlmvqa.extras.merging.validation import read_config
from vlmvqa.extras.pretrained.hf_processor import load_processor
from vlmvqa.models import model_folder
from vlmvqa.models.vlm import DTYPES
from vlmvqa.progress import bar

METHODS = {  # and which settings each uses, besides the weights of the models
    "linear": (),
    "task_arithmetic": ("scale",),
    "ties": ("density", "scale", "trim"),
    "dare_linear": ("density", "scale", "seed"),
    "dare_ties": ("density", "scale", "seed"),
    "slerp": (),
}
ALONE = ("linear", "slerp")  # of the models themselves; the others merge what was added to a base
SUMS = ("task_arithmetic", "dare_linear")  # of what was added; the others take a mean, or go between models
CARD = "README.md"  # of the base, which tells of its scores
PROCESSOR = ("processor_config.json", "preprocessor_config.json")


@dataclass(frozen=True)
class MergeSettings:
    """How models are merged; keys are explained in conf/merge.yaml."""

    method: str = "ties"
    density: float = 0.3
    scale: float = 1.0
    weights: Sequence[float] = ()
    layers: Mapping[str, Sequence[float]] = field(default_factory=dict)
    trim: str = "tensor"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            near = suggest(self.method, METHODS)
            raise InputError(f"method={self.method} is unknown; use {', '.join(METHODS)}{near}")
        if not 0 < self.density <= 1:
            raise InputError(f"density={self.density} should be above 0 and at most 1, the share of entries to keep")
        if self.trim not in ("tensor", "model"):
            raise InputError(f"trim={self.trim} is unknown; use tensor or model")

    def of(self, name: str, models: int) -> list[float]:
        """The models' weights in a tensor: the first pattern that is found in its name decides."""
        for pattern, weights in self.layers.items():
            if re.search(pattern, name):
                return list(weights)
        return list(self.weights) or [1.0] * models

    def record(self) -> dict[str, Any]:
        """For `merge.json`: what the method uses."""
        used = ("method", "weights", "layers", *METHODS[self.method])
        return {key: value for key, value in asdict(self).items() if key in used}


@dataclass
class Counts:
    """What was counted over a part of the model; lists have an entry a model."""

    entries: int = 0
    base: float = 0.0  # sum of squares
    deltas: list[float] = field(default_factory=list)  # sums of squares
    moved: list[int] = field(default_factory=list)  # entries whose delta is not 0
    kept: list[int] = field(default_factory=list)  # of these
    conflicts: int = 0  # entries that two models move in opposite directions, by what was kept of their deltas
    touched: int = 0  # entries that any model moves, by what was kept

    def add_base(self, base: Tensor, models: int) -> None:
        """A piece that no model moves."""
        if not self.deltas:
            self.deltas, self.moved, self.kept = [0.0] * models, [0] * models, [0] * models
        self.entries += base.numel()
        self.base += float(base.double().square().sum())

    def add(self, base: Tensor, deltas: Tensor, kept: Tensor) -> None:
        self.add_base(base, len(deltas))
        for model in range(len(deltas)):
            self.deltas[model] += float(deltas[model].double().square().sum())
            self.moved[model] += int(deltas[model].count_nonzero())
            self.kept[model] += int(kept[model].count_nonzero())
        up, down = (kept > 0).any(0), (kept < 0).any(0)
        self.conflicts += int((up & down).sum())
        self.touched += int((up | down).sum())

    def record(self) -> dict[str, Any]:
        """For `merge.json`."""
        return {
            "entries": self.entries,
            "norm_of_base": sqrt(self.base),
            "norms_of_deltas": [sqrt(one) for one in self.deltas],
            "kept": [kept / moved if moved else None for kept, moved in zip(self.kept, self.moved, strict=True)],
            "sign_conflicts": self.conflicts / max(1, self.touched),
        }


class Merge:
    """Models to be merged, found to fit together.

    Args:
        base: what all were tuned from; None: what the adapters among them say. `linear` and `slerp` of full models
            need not know it: without it, nothing is counted.
        models: folders of full models and of adapters.
        into: what adapters that were trained over 4 bits are added to: "full" (the base's own weights) or
            "dequantized" (these through 4 bits and back, as they were trained over).

    Raises:
        InputError: they do not fit.
    """

    def __init__(self, base: Path | None, models: Sequence[Path], settings: MergeSettings, into: str = "full") -> None:
        self.settings, self.into = settings, into
        self.counts: dict[str, Counts] = {}
        self.adapters = {folder: own for folder in models if (own := validation.adapter_settings(folder)) is not None}
        self._refuse_settings(len(models))
        found = validation.base_of_adapters(base, models)
        self.knows_base = found is not None
        if found is None:
            if settings.method not in ALONE:
                raise InputError(f"base=... must be given: {settings.method} merges what was added to it")
            found = models[0]
        self.layout = Layout.of(found)
        self.base = self._base(found)
        validation.refuse_quantised(self.base)
        self.models = [self._model(folder) for folder in models]
        full = [model for model in self.models if isinstance(model, Weights)]
        for other in full:
            validation.refuse_quantised(other)
            validation.refuse_different(self.base, other)
        self._refuse_patterns()
        if settings.method not in ALONE:
            validation.refuse_other_bases(found, [model.folder for model in full])
        self.config = validation.merged_config(self.base, models, self._started_from())
        self.thresholds: list[float] = []

    def run(self, folder: Path) -> None:
        """Write the merged model: its weights, then all else that the base's folder holds, `config.json` last."""
        entries, settings = self.base.entries, self.settings
        if settings.method == "ties" and settings.trim == "model":
            self.thresholds = self._thresholds([name for name, entry in entries.items() if entry.type in FLOATS])
        folder.mkdir(parents=True, exist_ok=True)
        (folder / model_folder.CONFIG).unlink(missing_ok=True)
        size = sum(entry.size for entry in entries.values())
        with bar(doing="merging", unit="entries", total=size, unit_scale=True) as done:
            files.write(folder / model_folder.WEIGHTS, {one.key: one for one in entries.values()}, self._pieces(done))
        self._copy_rest(folder)

    @property
    def over_four_bits(self) -> list[Path]:
        """The adapters that were trained over weights in 4 bits."""
        return [folder for folder, settings in self.adapters.items() if settings.bits]

    def _base(self, folder: Path) -> Weights:
        """The base's weights: as they are, or through 4 bits."""
        if self.into == "full":
            return Weights(folder, self.layout.name)
        if self.into != "dequantized":
            raise InputError(
                f"into={self.into} is unknown; use full (the base's own weights) or dequantized (as adapters over 4 "
                "bits saw them): a merged model has whole weights"
            )
        given = list(self.adapters.values())
        if not given or not all(settings.bits for settings in given) or len(set(map(_bits, given))) > 1:
            raise InputError(
                "into=dequantized: not all of these are adapters over the same weights in 4 bits; use into=full"
            )
        types = {read_config(one)["model"]["dtype"] for one in self.adapters}
        if len(types) > 1:
            raise InputError(f"into=dequantized: the adapters' models were of {' and '.join(types)}; use into=full")
        return Dequantized(folder, self.layout.name, self.layout.in_four_bits(), given[0], DTYPES[types.pop()])

    def _model(self, folder: Path) -> Weights | Adapted:
        if folder in self.adapters:
            return Adapted(folder, self.base, self.adapters[folder])
        return Weights(folder, self.layout.name)

    def _started_from(self) -> dict[str, str] | None:
        """What the merged model says that it was trained on from: the base, or of `linear` and `slerp` what all say."""
        if self.settings.method not in ALONE or self.adapters:
            folder = self.base.folder
            return {"model": str(folder), "weights": fingerprint.weights_in(folder)}
        said = [validation.ours(read_config(model.folder)).get("started_from") for model in self.models]
        return said[0] if all(one == said[0] for one in said) else None

    def _copy_rest(self, folder: Path) -> None:
        """What the base's folder holds besides the weights, `config.json` last: a folder that has it is whole."""
        weights = {model_folder.CONFIG, files.INDEX, CARD, *(entry.file.name for entry in self.base.entries.values())}
        for path in self.base.folder.iterdir():
            if path.is_dir():
                shutil.copytree(path, folder / path.name, dirs_exist_ok=True)
            elif path.name not in weights and not (self.layout.model and path.name in PROCESSOR):
                shutil.copy2(path, folder)
        if self.layout.model is not None:  # as the models' own training set it
            load_processor(str(self.models[0].folder)).save_pretrained(folder)
        partial = folder / (model_folder.CONFIG + ".partial")
        partial.write_text(json.dumps(self.config, indent=2) + "\n", encoding="utf-8")
        partial.replace(folder / model_folder.CONFIG)

    def _pieces(self, bar: Any) -> Iterator[tuple[str, Tensor]]:
        for name, entry in self.base.entries.items():
            merged = self._merged(name) if entry.type in FLOATS else self.base.pieces(name)
            for piece in merged:
                bar.update(piece.numel())
                yield entry.key, piece

    def _merged(self, name: str) -> Iterator[Tensor]:
        """A tensor's pieces, float32."""
        settings, path = self.settings, self.layout.path(name)
        weights = torch.tensor(settings.of(path, len(self.models)))
        counts = self.counts.setdefault(path.partition(".")[0], Counts()) if self.knows_base else None
        if settings.method == "linear":
            for values in self._values(name, counts):
                yield methods.linear(values, weights)
        elif settings.method == "slerp":
            first, second = self._slerp_shares(name, float(weights[1] / weights.sum()))
            for values in self._values(name, counts):
                yield first * values[0] + second * values[1]
        else:
            assert counts is not None
            yield from self._with_deltas(name, weights, counts)

    def _with_deltas(self, name: str, weights: Tensor, counts: Counts) -> Iterator[Tensor]:
        settings = self.settings
        if not any(model.touches(name) for model in self.models):
            for piece in self.base.pieces(name):
                counts.add_base(piece, len(self.models))
                yield piece
            return
        thresholds = None
        if settings.method == "ties":
            thresholds = torch.tensor(self.thresholds or self._thresholds([name]))
        drawn = [_generator(settings.seed, name, number) for number in range(len(self.models))]
        for rows in self.base.rows(name):
            base = self.base.read(name, rows)
            deltas = torch.stack([model.delta(name, rows, base) for model in self.models])
            kept = deltas
            if thresholds is not None:
                kept = methods.trim(deltas, thresholds)
            elif settings.method.startswith("dare"):
                kept = methods.drop_and_rescale(deltas, settings.density, drawn)
            join = methods.ties if settings.method.endswith("ties") else methods.task_arithmetic
            counts.add(base, deltas, kept)
            yield base + settings.scale * join(kept, weights)

    def _values(self, name: str, counts: Counts | None = None) -> Iterator[Tensor]:
        """Pieces of every model, float32[M, n]; their distance from the base is counted, if that is given a place."""
        for rows in self.base.rows(name):
            base = self.base.read(name, rows)
            values = torch.stack([model.value(name, rows, base) for model in self.models])
            if counts is not None:
                counts.add(base, values - base, values - base)
            yield values

    def _thresholds(self, names: Sequence[str]) -> list[float]:
        """Of each model: the magnitude of the smallest delta that is kept, over these tensors."""
        kept = max(1, int(self.settings.density * sum(self.base.entries[name].size for name in names)))

        def deltas(model: Weights | Adapted) -> Iterator[Tensor]:
            for name in names:
                for rows in self.base.rows(name):
                    yield model.delta(name, rows, self.base.read(name, rows))

        return [
            methods.kth_magnitude(lambda model=model: deltas(model), kept)  # type: ignore[misc]
            if any(map(model.touches, names))
            else 0.0
            for model in self.models
        ]

    def _slerp_shares(self, name: str, share: float) -> tuple[float, float]:
        dot = first = second = 0.0
        for values in self._values(name):
            one, other = values.double()
            dot += float(one @ other)
            first += float(one @ one)
            second += float(other @ other)
        return methods.slerp_shares(dot, (sqrt(first), sqrt(second)), share)

    def _refuse_settings(self, models: int) -> None:
        settings = self.settings
        least = 1 if settings.method == "task_arithmetic" else 2
        if models < least or (settings.method == "slerp" and models > 2):
            wanted = "two models" if settings.method == "slerp" else "two or more models"
            raise InputError(f"models names {models}; {settings.method} merges {wanted}: models=[runs/a,runs/b]")
        given = {"weights": settings.weights} if settings.weights else {}
        for where, weights in {**given, **{f"layers.{key}": value for key, value in settings.layers.items()}}.items():
            if len(weights) != models or not all(isfinite(one) for one in weights):
                raise InputError(f"{where}={list(weights)} should hold a number for each of the {models} models")
            if settings.method not in SUMS and (min(weights) < 0 or sum(weights) <= 0):
                raise InputError(
                    f"{where}={list(weights)}: {settings.method} takes no negative weights, and one above 0 at least; "
                    f"use {' or '.join(SUMS)} to subtract a model"
                )

    def _refuse_patterns(self) -> None:
        paths = [self.layout.path(name) for name in self.base.entries]
        for pattern in self.settings.layers:
            try:
                found = any(re.search(pattern, path) for path in paths)
            except re.error as error:
                raise InputError(f"layers: {pattern!r} is no regular expression ({error})") from error
            if not found:
                raise InputError(f"layers: {pattern!r} is found in no tensor's name, such as {paths[0]}")


def _bits(settings: AdapterSettings) -> tuple[Any, ...]:
    """How the weights below adapters were kept."""
    return settings.bits, settings.quantization, settings.double_quantization


def _generator(seed: int, name: str, model: int) -> torch.Generator:
    """Of a model's draws in a tensor: the same whatever else is merged."""
    digest = hashlib.blake2b(f"{seed} {name} {model}".encode(), digest_size=7).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little"))
