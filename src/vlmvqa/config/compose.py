"""Plain values to frozen, typed objects, and back to YAML.

`overrides.py` composes the values with Hydra, once. Nothing changes the object afterwards: a command that decides a
setting itself (a saved model's, a checkpoint's decoding) makes a copy with `dataclasses.replace`.
"""

from __future__ import annotations

import dataclasses
import importlib
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, TypeVar

import yaml

from vlmvqa.errors import InputError, suggest
from vlmvqa.paths import CONF

Config = TypeVar("Config")
# Groups that their own package builds, since it decides the class or checks more than types: module and function.
BUILDERS = {
    "data": ("vlmvqa.data.tasks", "data_settings"),
    "model": ("vlmvqa.models.checkpoint", "model_settings"),
    "init_from": ("vlmvqa.training.initial_model", "named_sources"),
    "stages": ("vlmvqa.extras.stages.settings", "build_stages"),
    "adapt": ("vlmvqa.extras.adapters.peft_adapters", "adapter_settings"),
}


def build(
    kind: type[Config], values: Mapping[str, Any], given: Iterable[str] = (), launcher: tuple[str, str] | None = None
) -> Config:
    """Return a command's configuration of class `kind` from the values that Hydra composed.

    Args:
        given: the keys that the command line sets.
        launcher: the strategy that the launcher implies, and the launcher's name.

    Raises:
        InputError: an unknown key, a missing value, or values that contradict each other.
    """
    values, keys = {**values, "given": frozenset(given)}, frozenset(given)
    names = {field.name for field in fields(kind)}  # type: ignore[arg-type]
    if "dist" in names:
        values["dist"] = with_launcher(values.get("dist"), launcher)
    if "launcher" in names:  # it starts trainings with their own configs
        values["launcher"] = launcher
    for name, (module, function) in BUILDERS.items():
        if values.get(name):
            values[name] = getattr(importlib.import_module(module), function)(values[name], keys)
    return build_settings(kind, values, "")


def with_launcher(dist: dict[str, Any] | None, launcher: tuple[str, str] | None) -> dict[str, Any] | None:
    """Return the given `dist` group or the one that the launcher implies; raise an InputError if they differ."""
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
    """Raise an InputError with the reason if the command line sets a key that the command would ignore."""
    for key in sorted(set(keys) & set(given)):
        raise InputError(f"{key} cannot be set here: it is {reason}; leave it out")


def to_dict(config: Any) -> dict[str, Any]:
    """Return a configuration as plain values that YAML and JSON can hold."""
    values: dict[str, Any] = _plain(asdict(config))
    for one in (values, *values.get("stages", {}).values()):
        one.pop("given")
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


def build_settings(kind: type[Config], values: Mapping[str, Any], where: str) -> Config:
    """Build a dataclass from a mapping, including nested dataclasses; `where` names the mapping in error messages.

    Raises:
        InputError: a key is unknown or missing, or a value should be a mapping.
    """
    _refuse_text(values, where)
    hints = typing.get_type_hints(kind)
    fields = {field.name: field for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    arguments: dict[str, Any] = {}
    for key, value in values.items():
        if key not in fields:
            raise InputError(f"{where} has no key '{key}'{suggest(str(key), fields)} (known: {', '.join(fields)})")
        inner, inside = _dataclass_in(hints[key]), f"{where}.{key}" if where else str(key)
        if inner is not None and value is not None and not isinstance(value, inner):
            value = build_settings(inner, value, inside)
        elif (inner := _dataclass_of_each(hints[key])) is not None:
            value = tuple(build_settings(inner, one, f"{inside}[{number}]") for number, one in enumerate(value))
        elif typing.get_origin(hints[key]) is Mapping:
            _refuse_text(value, inside)
        arguments[str(key)] = tuple(value) if isinstance(value, list) else value
    for name, field in fields.items():
        missing = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if missing and name not in arguments:
            raise InputError(f"{where}.{name} is missing; give it a value" if where else f"{name} must be given")
    return kind(**arguments)


def _dataclass_in(hint: Any) -> type | None:
    """Return the dataclass of a type hint `X` or `X | None`."""
    kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    return next((kind for kind in kinds if isinstance(kind, type) and dataclasses.is_dataclass(kind)), None)


def _dataclass_of_each(hint: Any) -> type | None:
    """Return the dataclass of a type hint `tuple[X, ...]`."""
    return _dataclass_in(typing.get_args(hint)[0]) if typing.get_origin(hint) is tuple else None


def _refuse_text(value: Any, where: str) -> None:
    """Raise if a value is not a group of keys, for example because a shell expanded unquoted braces."""
    if not isinstance(value, Mapping):
        raise InputError(
            f"{where} must be a group of keys, not {value!r}; give {where}.<name>=..., or quote the braces, which the "
            f"shell takes apart: '{where}={{name:value}}'"
        )
