"""The settings of a mixture: several datasets that one run trains on."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from vlmvqa.config.compose import build_settings, refuse_overrides
from vlmvqa.config.schema import DataSettings
from vlmvqa.data.tasks import checked
from vlmvqa.errors import InputError, suggest

# Keys that all tasks of a mixture share, because they share the model's input and its rows.
SHARED = (
    "target",
    "resize",
    "reduced_decoding",
    "tiles",
    "max_text_tokens",
    "max_new_tokens",
    "questions_per_row",
    "row_tokens",
    "length_window",
    "feature_cache",
    "on_bad_record",
)


def mixture_settings(values: Mapping[str, Any], given: Iterable[str]) -> DataSettings:
    """Return the `data` group of a mixture, checked; `given` are the keys that the command line sets."""
    mixture = build_settings(DataSettings, {"root": None, **values}, "data")
    nodes: Mapping[str, Any] = mixture.parts
    own = [f"data.parts.{name}.{key}" for name in nodes for key in SHARED]
    refuse_overrides(given, "the same for all parts of a mixture, as data.<key>", *own)
    parts = {name: build_settings(DataSettings, node, f"data.parts.{name}") for name, node in nodes.items()}
    for name in mixture.weights:
        if name not in parts:
            raise InputError(
                f"data.weights.{name}: there is no such part{suggest(name, parts)} (only {', '.join(parts)})"
            )
    if mixture.feature_cache is not None:
        raise InputError("data.feature_cache holds one dataset's images, so a mixture cannot use it; leave it out")
    shared = {key: getattr(mixture, key) for key in SHARED}
    parts = {name: checked(replace(part, **shared), f"data.parts.{name}") for name, part in parts.items()}
    if len(parts) < 2:
        raise InputError(f"data.parts holds {len(parts)} datasets; name two or more, or choose the one as data=...")
    weights = {name: mixture.weights.get(name, 1.0) for name in parts}
    for name, weight in weights.items():
        if not isinstance(weight, int | float) or not 0 < weight < math.inf:
            raise InputError(f"data.weights.{name}={weight} should be above 0: how often an epoch sees each image")
    found = replace(mixture, parts=parts, weights=weights)
    found.prompts  # noqa: B018  # raises if two parts contradict each other
    return found
