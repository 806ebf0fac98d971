"""Plain mappings (a yaml node, a saved config) to frozen dataclasses; an unknown key is an error that suggests."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

from vlmvqa.errors import InputError, suggest

Settings = TypeVar("Settings")


def build_settings(kind: type[Settings], values: Mapping[str, Any], where: str) -> Settings:
    """Build a dataclass from a mapping, including nested dataclasses.

    Args:
        where: the name of the mapping in error messages ("model", "data").

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


def _refuse_text(value: Any, where: str) -> None:
    """Raise if a value is not a group of keys, for example because a shell expanded unquoted braces."""
    if not isinstance(value, Mapping):
        raise InputError(
            f"{where} must be a group of keys, not {value!r}; give {where}.<name>=..., or quote the braces, which the "
            f"shell takes apart: '{where}={{name:value}}'"
        )
