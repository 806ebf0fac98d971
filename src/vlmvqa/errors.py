"""The one exception for what a user can mend."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """Bad input: one sentence that says what is wrong, where (file, record), and what to do.

    The launch scripts print the sentence alone; a traceback is for our own mistakes.
    """


def suggest(name: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'?` for the nearest of the `known` names, or the empty string."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean '{near[0]}'?" if near else ""
