"""The first word of prepare.py's command line: its job."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from vlmvqa.config.early_checks import PREPARE
from vlmvqa.errors import InputError, suggest


def prepare_job(words: Sequence[str]) -> str:
    """Return the first word of prepare.py's command line, which names its job.

    Raises:
        InputError: it names none, or another word follows.
    """
    known, word = ", ".join(PREPARE), words[0] if words else ""
    if word not in PREPARE:
        said = f"unknown job '{word}'" if word and "=" not in word else "no job given"
        near = suggest(word, PREPARE) or "."
        raise InputError(f"prepare.py: {said}; its first word is one of {known}{near}")
    for before, after in pairwise(words):
        if "=" not in after and not after.startswith("-") and not before.startswith("-"):
            raise InputError(f"prepare.py {word}: '{after}' is not a setting; give settings as key=value")
    return word
