"""Errors that a user can fix: the exception, its wording, and the policy for records that cannot be used."""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path


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


POLICIES = ("error", "skip")


@dataclass
class BadRecords:
    """Raise an error at a bad record (`policy="error"`), or skip, count and list it (`"skip"`).

    Attributes:
        listing: a JSONL file. Bad images are found in the DataLoader's worker processes, so each record is appended
            with one short write, and all processes share the file.
        seen: the bad records of this process.
        advice: appended to each error: the option that skips bad records.
    """

    policy: str = "error"
    listing: Path | None = None
    seen: list[str] = field(default_factory=list)
    advice: str = ", or set data.on_bad_record=skip to leave it out"

    def __post_init__(self) -> None:
        if self.policy not in POLICIES:
            raise InputError(f"data.on_bad_record={self.policy} is unknown; use one of {', '.join(POLICIES)}.")

    def add(self, where: str, problem: str, remedy: str = "fix it") -> None:
        """Report a bad record.

        Args:
            where: file and record.
            problem: what is wrong with it.
            remedy: what the user can do.

        Raises:
            InputError: under the policy "error".
        """
        self.add_error(InputError(f"{where}: {problem}; {remedy}"))

    def add_error(self, error: InputError) -> None:
        """Report a bad record by an error that names file, record and problem.

        Raises:
            InputError: under the policy "error".
        """
        if self.policy == "error":
            raise InputError(f"{str(error).rstrip('.')}{self.advice}") from error
        self.seen.append(str(error))
        self._append(str(error))

    def list_in(self, listing: Path) -> None:
        """Set the listing and write the records seen so far, for a run folder that is created after reading."""
        self.listing = listing
        for record in self.seen:
            self._append(record)

    def listed(self) -> list[str]:
        """Return the distinct bad records of all processes that share the listing, sorted."""
        records = list(self.seen)
        if self.listing is not None and self.listing.exists():
            records += [json.loads(line)["record"] for line in self.listing.read_text().splitlines()]
        return sorted(set(records))

    def _append(self, record: str) -> None:
        if self.listing is None:
            return
        self.listing.parent.mkdir(parents=True, exist_ok=True)
        line = (json.dumps({"record": record}) + "\n").encode()
        descriptor = os.open(self.listing, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            os.write(descriptor, line)
        finally:
            os.close(descriptor)
