"""Plain values to one frozen, typed object, and back to YAML.

`overrides.py` composes the values with Hydra, once. Nothing changes the object afterwards: a command that decides a
setting itself (a saved model's, a checkpoint's decoding) makes a copy with `dataclasses.replace`.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, TypeVar

import yaml

from vlmvqa.errors import InputError
from vlmvqa.paths import CONF
from vlmvqa.settings import build_settings

Config = TypeVar("Config")
# Groups that their own package builds, since it decides the class or checks more than types: module and function.
BUILDERS = {
    "data": ("vlmvqa.data.tasks", "data_settings"),
    "model": ("vlmvqa.inference.build", "model_settings"),
    "adapt": ("vlmvqa.extras.adapters.peft_adapters", "adapter_settings"),
}


def build(
    kind: type[Config], values: Mapping[str, Any], given: Iterable[str] = (), launcher: tuple[str, str] | None = None
) -> Config:
    """Return a command's configuration.

    Args:
        kind: its class, `TrainConfig` for example.
        values: resolved values, as Hydra composed them.
        given: the keys that the command line sets.
        launcher: the strategy that the launcher implies, and the launcher's name (`config.launcher`).

    Raises:
        InputError: an unknown key, a missing value, or values that contradict each other.
    """
    values, keys = {**values, "given": frozenset(given)}, frozenset(given)
    if "dist" in (field.name for field in fields(kind)):  # type: ignore[arg-type]
        values["dist"] = with_launcher(values.get("dist"), launcher)
    for name, (module, function) in BUILDERS.items():
        if values.get(name) is not None:
            values[name] = getattr(importlib.import_module(module), function)(values[name], keys)
    return build_settings(kind, values, "")


def with_launcher(dist: dict[str, Any] | None, launcher: tuple[str, str] | None) -> dict[str, Any] | None:
    """Return the `dist` group: the given one, or else the one that the launcher implies.

    Raises:
        InputError: they contradict each other, or there is no such group.
    """
    if launcher is None:
        return dist
    choice, name = launcher
    if dist is None:
        path = CONF / "dist" / f"{choice}.yaml"
        if not path.exists():
            raise InputError(f"{name} sets {choice}, which is not in conf/dist; change it, or add dist=...")
        found: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
        return found
    chosen = dist["strategy"] + ("_offload" if dist.get("offload") else "")
    if name != "the deepspeed launcher" and chosen != choice:
        raise InputError(f"{name} sets {choice}, the command sets {chosen}; change one of them")
    return dist


def refuse_overrides(given: Iterable[str], reason: str, *keys: str) -> None:
    """Raise if the command line sets a key that the command would ignore.

    Raises:
        InputError: with the reason.
    """
    for key in sorted(set(keys) & set(given)):
        raise InputError(f"{key} cannot be set here: it is {reason}; leave it out")


def to_dict(config: Any) -> dict[str, Any]:
    """Return a configuration as plain values that YAML and JSON can hold."""
    values: dict[str, Any] = _plain(asdict(config))
    values.pop("given")
    return values


def to_yaml(config: Any) -> str:
    """Return a configuration as the text of its `config.yaml`."""
    text: str = yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True, width=120)
    return text


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return str(value) if isinstance(value, Path) else value
