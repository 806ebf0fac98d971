"""Merge models file by file: what is refused, what each tensor becomes, what is counted on the way."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import isfinite, sqrt
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from vlmvqa import fingerprint
from vlmvqa.errors import InputError, suggest
from vlmvqa.merging import files, methods
from vlmvqa.merging.files import FLOATS, TYPES, Weights
from vlmvqa.models import saved

METHODS = ("linear", "task_arithmetic", "ties", "dare_linear", "dare_ties", "slerp")
ALONE = ("linear", "slerp")  # of the models themselves; the others merge what was added to a base


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


@dataclass
class Counts:
    """What was counted over a part of the model; lists have an entry a model."""

    entries: int = 0
    base: float = 0.0  # sum of squares
    deltas: list[float] = field(default_factory=list)  # sums of squares
    kept: list[int] = field(default_factory=list)
    conflicts: int = 0  # entries that two models want to move in opposite directions
    touched: int = 0  # entries that any model moves

    def add(self, base: Tensor, deltas: Tensor, kept: Tensor) -> None:
        if not self.deltas:
            self.deltas, self.kept = [0.0] * len(deltas), [0] * len(deltas)
        self.entries += base.numel()
        self.base += float(base.double().square().sum())
        for model in range(len(deltas)):
            self.deltas[model] += float(deltas[model].double().square().sum())
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
            "kept": [one / self.entries for one in self.kept],
            "sign_conflicts": self.conflicts / max(1, self.touched),
        }


class Merge:
    """Models to be merged, found to fit together.

    Raises:
        InputError: they do not.
    """

    def __init__(self, base: Path | None, models: Sequence[Path], settings: MergeSettings) -> None:
        self.settings = settings
        self.counts: dict[str, Counts] = {}
        self.models = [Weights(folder) for folder in models]
        if settings.method in ALONE:
            base = models[0] if models else None
        elif base is None:
            raise InputError(f"base=... must be given: {settings.method} merges what was added to it")
        self._refuse_settings()
        assert base is not None
        self.base = Weights(base)
        for other in self.models:
            _refuse_different(self.base, other)
        self._refuse_patterns()
        if settings.method not in ALONE:
            self._refuse_other_bases()
        self.config = _merged_config(self.base.folder, [model.folder for model in self.models])
        self.thresholds: list[float] = []

    def run(self, folder: Path) -> None:
        """Write the merged model: its weights, then all else that the base's folder holds, `config.json` last."""
        entries, settings = self.base.entries, self.settings
        if settings.method == "ties" and settings.trim == "model":
            self.thresholds = self._thresholds([name for name, entry in entries.items() if entry.type in FLOATS])
        folder.mkdir(parents=True, exist_ok=True)
        (folder / saved.CONFIG).unlink(missing_ok=True)
        with tqdm(total=sum(entry.size for entry in entries.values()), unit=" entries", unit_scale=True) as bar:
            bar.set_description("merging")
            files.write(folder / saved.WEIGHTS, entries, self._pieces(bar))
        self._copy_rest(folder)

    def _copy_rest(self, folder: Path) -> None:
        """What the base's folder holds besides the weights, `config.json` last: a folder that has it is whole."""
        weights = {saved.CONFIG, files.INDEX, *(entry.file.name for entry in self.base.entries.values())}
        for path in self.base.folder.iterdir():
            if path.is_dir():
                shutil.copytree(path, folder / path.name, dirs_exist_ok=True)
            elif path.name not in weights:
                shutil.copy2(path, folder)
        partial = folder / (saved.CONFIG + ".partial")
        partial.write_text(json.dumps(self.config, indent=2) + "\n", encoding="utf-8")
        partial.replace(folder / saved.CONFIG)

    def _pieces(self, bar: Any) -> Iterator[tuple[str, Tensor]]:
        for name, entry in self.base.entries.items():
            merged = self._merged(name) if entry.type in FLOATS else self.base.pieces(name)
            for piece in merged:
                bar.update(piece.numel())
                yield name, piece

    def _merged(self, name: str) -> Iterator[Tensor]:
        """A tensor's pieces, float32."""
        settings, weights = self.settings, torch.tensor(self.settings.of(name, len(self.models)))
        if settings.method == "linear":
            for _, values in self._aligned(name):
                yield methods.linear(values, weights)
        elif settings.method == "slerp":
            first, second = self._slerp_shares(name, float(weights[1] / weights.sum()))
            for _, values in self._aligned(name):
                yield first * values[0] + second * values[1]
        else:
            yield from self._with_deltas(name, weights)

    def _with_deltas(self, name: str, weights: Tensor) -> Iterator[Tensor]:
        settings, counts = self.settings, self.counts.setdefault(name.partition(".")[0], Counts())
        thresholds = None
        if settings.method == "ties":
            thresholds = torch.tensor(self.thresholds or self._thresholds([name]))
        drawn = [_generator(settings.seed, name, number) for number in range(len(self.models))]
        for base, values in self._aligned(name):
            deltas = values - base
            kept = deltas
            if thresholds is not None:
                kept = methods.trim(deltas, thresholds)
            elif settings.method.startswith("dare"):
                kept = methods.drop_and_rescale(deltas, settings.density, drawn)
            join = methods.ties if settings.method.endswith("ties") else methods.task_arithmetic
            counts.add(base, deltas, kept)
            yield base + settings.scale * join(kept, weights)

    def _aligned(self, name: str) -> Iterator[tuple[Tensor, Tensor]]:
        """Pieces of the base, float32[n], with the same of every model, float32[M, n]."""
        for base, *values in zip(self.base.pieces(name), *(one.pieces(name) for one in self.models), strict=True):
            yield base, torch.stack(values)

    def _thresholds(self, names: Sequence[str]) -> list[float]:
        """Of each model: the magnitude of the smallest delta that is kept, over these tensors."""
        kept = max(1, int(self.settings.density * sum(self.base.entries[name].size for name in names)))

        def deltas(model: Weights) -> Iterator[Tensor]:
            for name in names:
                for base, value in zip(self.base.pieces(name), model.pieces(name), strict=True):
                    yield value - base

        return [methods.kth_magnitude(lambda model=model: deltas(model), kept) for model in self.models]  # type: ignore[misc]

    def _slerp_shares(self, name: str, share: float) -> tuple[float, float]:
        dot = first = second = 0.0
        for _, values in self._aligned(name):
            one, other = values.double()
            dot += float(one @ other)
            first += float(one @ one)
            second += float(other @ other)
        return methods.slerp_shares(dot, (sqrt(first), sqrt(second)), share)

    def _refuse_settings(self) -> None:
        settings, models = self.settings, len(self.models)
        if models < 2 or (settings.method == "slerp" and models > 2):
            wanted = "two models" if settings.method == "slerp" else "two or more models"
            raise InputError(f"models names {models}; {settings.method} merges {wanted}: models=[runs/a,runs/b]")
        given = {"weights": settings.weights} if settings.weights else {}
        for where, weights in {**given, **{f"layers.{key}": value for key, value in settings.layers.items()}}.items():
            if len(weights) != models or not all(isfinite(one) for one in weights):
                raise InputError(f"{where}={list(weights)} should hold a number for each of the {models} models")
            if settings.method != "task_arithmetic" and sum(weights) <= 0:
                raise InputError(f"{where}={list(weights)} should add up to more than 0")

    def _refuse_other_bases(self) -> None:
        """Stop where a model says that it was trained on from another one."""
        started = {model.folder: _started_from(model.folder) for model in self.models}
        if not any(started.values()) or not (self.base.folder / saved.WEIGHTS).is_file():
            return
        own = fingerprint.weights_in(self.base.folder)
        for folder, one in started.items():
            if one and one["weights"] != own:
                raise InputError(
                    f"{folder} was trained on from {one['model']}, not from {self.base.folder}; give that as base"
                )

    def _refuse_patterns(self) -> None:
        for pattern in self.settings.layers:
            try:
                found = any(re.search(pattern, name) for name in self.base.entries)
            except re.error as error:
                raise InputError(f"layers: {pattern!r} is no regular expression ({error})") from error
            if not found:
                like = next(iter(self.base.entries))
                raise InputError(f"layers: {pattern!r} is found in no tensor's name, such as {like}")


def _started_from(folder: Path) -> Mapping[str, str] | None:
    """What the model was trained on from, if it says so."""
    found: Mapping[str, str] | None = _config(folder).get("started_from")
    return found


def _config(folder: Path) -> dict[str, Any]:
    path = folder / saved.CONFIG
    if not path.exists():
        raise InputError(f"{folder} holds no {saved.CONFIG}; copy or save the model again")
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def _merged_config(base: Path, models: Sequence[Path]) -> dict[str, Any]:
    """The base's, with what the models have learned to be asked: the prompt of each source, the longest text."""
    config, others = _config(base), [_config(folder) for folder in models]
    if "prompts" not in config:  # another library's model
        return config
    for key in ("model", "images"):
        for folder, other in zip(models, others, strict=True):
            if other[key] != config[key]:
                raise InputError(
                    f"{folder} and {base} differ in the settings of their {key}; merge models alike in them"
                )
    tokens = saved.TOKENIZER + "/tokenizer.json"
    for folder in models:
        if (folder / tokens).read_bytes() != (base / tokens).read_bytes():
            raise InputError(f"{folder} and {base} have different tokenizers; merge models tuned from the same")
    prompts: dict[str, str] = dict(config["prompts"])
    for folder, other in zip(models, others, strict=True):
        for source, prompt in other["prompts"].items():
            if prompts.setdefault(source, prompt) != prompt:
                raise InputError(f"{folder} asks {source} with {prompt!r}, another with {prompts[source]!r}; which?")
    longest = [one["max_text_tokens"] for one in (config, *others)]
    return {**config, "prompts": prompts, "max_text_tokens": None if None in longest else max(longest)}


def _refuse_different(base: Weights, other: Weights) -> None:
    """Stop unless two models have the same tensors, and these can be merged."""
    for one in (base, other):
        for name, entry in one.entries.items():
            if entry.type not in TYPES:
                kind = f"{name} is of type {entry.type}, as quantised weights are"
                raise InputError(f"{one.folder}: {kind}; merge the dequantised model")
    differ = [_difference(base, other, name) for name in dict.fromkeys([*base.entries, *other.entries])]
    found = [one for one in differ if one]
    if found:
        more = f" (and {len(found) - 1} more differ)" if len(found) > 1 else ""
        raise InputError(
            f"{other.folder} and {base.folder} are not of one base: {found[0]}{more}; merge models tuned from the same"
        )


def _difference(base: Weights, other: Weights, name: str) -> str | None:
    """What tells the models apart in a tensor, besides its values."""
    one, two = base.entries.get(name), other.entries.get(name)
    if one is None or two is None:
        return f"{name} is in {(other if one is None else base).folder} alone"
    if one.shape != two.shape:
        return f"{name} is {list(one.shape)} in the one, {list(two.shape)} in the other"
    if (one.type in FLOATS) != (two.type in FLOATS):
        return f"{name} is of type {one.type} in the one, {two.type} in the other"
    if one.type not in FLOATS and not _equal(base, other, name):
        return f"{name} holds other whole numbers"
    return None


def _equal(base: Weights, other: Weights, name: str) -> bool:
    return all(torch.equal(one, two) for one, two in zip(base.pieces(name), other.pieces(name), strict=True))


def _generator(seed: int, name: str, model: int) -> torch.Generator:
    """Of a model's draws in a tensor: the same whatever else is merged."""
    digest = hashlib.blake2b(f"{seed} {name} {model}".encode(), digest_size=7).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little"))
