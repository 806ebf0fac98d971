"""The exception for errors that a user can fix, and how their sentences are worded."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """Invalid input: one sentence with what is wrong, where (file, record), and what to do.

    The launch scripts print the sentence alone; a traceback is for our own mistakes.
    """


def suggest(name: str, known: Iterable[str]) -> str:
    """Return `; did you mean 'x'?` for the nearest of the `known` names, or the empty string."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean '{near[0]}'?" if near else ""


def counted(number: float, noun: str) -> str:
    """Format a number with its noun: `1 rank`, `1,234 ranks`, `5.36 questions`."""
    digits = f"{number:,}" if isinstance(number, int) else f"{number:g}"
    return f"{digits} {noun}{'' if number == 1 else 's'}"
