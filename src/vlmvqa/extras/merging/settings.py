"""Merge methods and their settings."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from math import isfinite
from typing import Any

from vlmvqa.errors import InputError, suggest

METHODS = {  # method: the settings it uses in addition to `weights` and `layers`
    "linear": (),
    "task_arithmetic": ("scale",),
    "ties": ("density", "scale", "trim"),
    "dare_linear": ("density", "scale", "seed"),
    "dare_ties": ("density", "scale", "seed"),
    "slerp": (),
}
WITHOUT_BASE = ("linear", "slerp")  # merge the weights themselves; the other methods merge differences from a base
SUMS = ("task_arithmetic", "dare_linear")  # add weighted differences, so weights may be negative


@dataclass(frozen=True)
class MergeSettings:
    """Settings of a merge; conf/merge.yaml documents the keys."""

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

    @property
    def needs_base(self) -> bool:
        """Whether the method merges differences from a base."""
        return self.method not in WITHOUT_BASE

    def model_weights(self, path: str, models: int) -> list[float]:
        """Return the weight of each model for a tensor; the first pattern of `layers` found in its path decides."""
        for pattern, weights in self.layers.items():
            if re.search(pattern, path):
                return list(weights)
        return list(self.weights) or [1.0] * models

    def record(self) -> dict[str, Any]:
        """Return the settings that the method uses, for `merge.json`."""
        used = ("method", "weights", "layers", *METHODS[self.method])
        return {key: value for key, value in asdict(self).items() if key in used}

    def check_model_count(self, models: int) -> None:
        """Raise InputError if the method merges another number of models, or weights are missing or not allowed."""
        minimum = 1 if self.method == "task_arithmetic" else 2
        if models < minimum or (self.method == "slerp" and models > 2):
            expected = "two models" if self.method == "slerp" else "two or more models"
            raise InputError(f"models names {models}; {self.method} merges {expected}: models=[runs/a,runs/b]")
        given = {"weights": self.weights or [1.0] * models, **{f"layers.{key}": v for key, v in self.layers.items()}}
        for key, weights in given.items():
            if len(weights) != models or not all(isfinite(one) for one in weights):
                raise InputError(f"{key}={list(weights)} should hold a number for each of the {models} models")
            if self.method not in SUMS and (min(weights) < 0 or sum(weights) <= 0):
                raise InputError(
                    f"{key}={list(weights)}: {self.method} needs non-negative weights, at least one of them above 0; "
                    f"use {' or '.join(SUMS)} to subtract a model"
                )

    def check_patterns(self, paths: Sequence[str]) -> None:
        """Raise InputError if a pattern of `layers` matches no tensor's path, or is not a regular expression."""
        for pattern in self.layers:
            try:
                matches = any(re.search(pattern, path) for path in paths)
            except re.error as error:
                raise InputError(f"layers: {pattern!r} is not a regular expression ({error})") from error
            if not matches:
                raise InputError(f"layers: {pattern!r} matches no tensor name, such as {paths[0]}")
