"""The search space of a sweep: settings of launch/train.py with their ranges or choices. Imports no Optuna."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vlmvqa.config.overrides import quoted
from vlmvqa.errors import InputError, suggest

Value = str | float | bool | None
KEYS = ("low", "high", "log", "choices")


@dataclass(frozen=True)
class Parameter:
    """The values of a setting: choices, or a range of numbers (integers if both ends are; log: of logarithms)."""

    choices: Sequence[Value] = ()
    low: float = 0.0
    high: float = 0.0
    log: bool = False

    @property
    def checked(self) -> Sequence[Value]:
        """The values that are checked before the first trial: all choices, or both ends."""
        return self.choices or (self.low, self.high)


def read_space(space: Mapping[str, Any]) -> dict[str, Parameter]:
    """Return the parameters of `sweep.space` by the setting that they search.

    A key may be written with dots or as nested groups, so that the command line can change a part of the file's.

    Raises:
        InputError: a parameter is neither a range nor choices.
    """
    found: dict[str, dict[str, Any]] = {}
    _collect(space, "", found)
    if not found:
        raise InputError("sweep.space is empty; give a setting with its range, {low: .., high: ..}, or {choices: [..]}")
    return {key: _parameter(f"sweep.space.{key}", values) for key, values in found.items()}


def _collect(node: Mapping[str, Any], prefix: str, found: dict[str, dict[str, Any]]) -> None:
    for key, value in node.items():
        name = f"{prefix}{key}"
        if not isinstance(value, Mapping):
            raise InputError(f"sweep.space.{name}={value} should be a range {{low: .., high: ..}} or {{choices: [..]}}")
        if any(isinstance(inner, Mapping) for inner in value.values()):
            _collect(value, f"{name}.", found)
        else:
            before = found.get(name, {})  # choices replace a range
            found[name] = {**(before if ("choices" in value) == ("choices" in before) else {}), **value}


def _parameter(where: str, given: Mapping[str, Any]) -> Parameter:
    for name in given:
        if name not in KEYS:
            raise InputError(f"{where} has no key '{name}'{suggest(name, KEYS)} (known: {', '.join(KEYS)})")
    if "choices" in given:
        choices = given["choices"]
        if len(given) > 1:
            raise InputError(f"{where} has choices and a range; give one of them")
        if not isinstance(choices, list) or not choices or any(isinstance(one, list | Mapping) for one in choices):
            raise InputError(f"{where}.choices={choices} should be a list of texts, numbers, true, false or null")
        return Parameter(tuple(choices))
    low: Any = given.get("low")
    high: Any = given.get("high")
    log = bool(given.get("log"))
    for name, value in (("low", low), ("high", high)):
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise InputError(f"{where}.{name}={value} should be a number")
    if low >= high or (log and low <= 0):
        above = " and above 0, because of log=true" if log else ""
        raise InputError(f"{where}: low={low} must be below high={high}{above}")
    return Parameter(low=low, high=high, log=log)


def override(key: str, value: Value) -> str:
    """Return a setting in the grammar of the command line."""
    if isinstance(value, str):
        return f"{key}={value if value.replace('_', '').isalnum() else quoted(value)}"
    if isinstance(value, float):
        return f"{key}={float(value)!r}"
    return f"{key}={'null' if value is None else str(value).lower()}"
