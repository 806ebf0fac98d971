"""Plain mappings (a yaml node, a saved config) to frozen dataclasses; an unknown key is an error that suggests."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

from vlmvqa.errors import InputError, suggest

Settings = TypeVar("Settings")


def build_settings(kind: type[Settings], values: Mapping[str, Any], where: str) -> Settings:
    """A dataclass from a mapping, nested ones too.

    Args:
        where: how an error names the mapping ("model", "data").

    Raises:
        InputError: a key that the dataclass does not have, one it needs, or a mapping where it wants one.
    """
    types = typing.get_type_hints(kind)
    fields = {field.name: field for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    arguments: dict[str, Any] = {}
    for key, value in values.items():
        if key not in fields:
            raise InputError(f"{where} has no key '{key}'{suggest(str(key), fields)} (known: {', '.join(fields)})")
        if dataclasses.is_dataclass(types[key]):
            if not isinstance(value, Mapping):
                raise InputError(f"{where}.{key} must be a group of keys, not {value!r}")
            value = build_settings(types[key], value, f"{where}.{key}")
        elif typing.get_origin(types[key]) is Mapping and not isinstance(value, Mapping):
            raise InputError(
                f"{where}.{key} must be a group of keys, not {value!r}; give {where}.{key}.<name>=..., or quote the "
                f"braces, which the shell takes apart: '{where}.{key}={{name:value}}'"
            )
        arguments[str(key)] = tuple(value) if isinstance(value, list) else value
    for name, field in fields.items():
        missing = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if missing and name not in arguments:
            raise InputError(f"{where}.{name} is missing; give it a value")
    return kind(**arguments)
