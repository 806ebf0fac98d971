"""One policy for records that cannot be used: stop at the first, or leave them out and say so."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path

from vlmvqa.errors import InputError

POLICIES = ("error", "skip")


@dataclass
class BadRecords:
    """Stops at a bad record (`policy="error"`) or leaves it out, counted and listed (`"skip"`).

    The listing is a file of JSON lines, one short append a record, because bad images are met in
    the DataLoader's worker processes, which share nothing else with the run.
    """

    policy: str = "error"
    listing: Path | None = None
    seen: list[str] = field(default_factory=list)
    advice: str = ", or set data.on_bad_record=skip to leave it out"  # where that can be set

    def __post_init__(self) -> None:
        if self.policy not in POLICIES:
            raise InputError(f"data.on_bad_record={self.policy} is unknown; use one of {', '.join(POLICIES)}.")

    def add(self, where: str, problem: str, remedy: str = "fix it") -> None:
        """Report a record: `where` names file and record, `problem` what is wrong with it.

        Raises:
            InputError: under the policy "error".
        """
        self.add_error(InputError(f"{where}: {problem}; {remedy}"))

    def add_error(self, error: InputError) -> None:
        """The same, for a record whose sentence is already written."""
        if self.policy == "error":
            raise InputError(f"{str(error).rstrip('.')}{self.advice}") from error
        self.seen.append(str(error))
        self._list(str(error))

    def list_in(self, listing: Path) -> None:
        """List here from now on, and what was left out so far: for a folder that is made once all input was read."""
        self.listing = listing
        for record in self.seen:
            self._list(record)

    def _list(self, record: str) -> None:
        if self.listing is None:
            return
        self.listing.parent.mkdir(parents=True, exist_ok=True)
        line = (json.dumps({"record": record}) + "\n").encode()
        descriptor = os.open(self.listing, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            os.write(descriptor, line)
        finally:
            os.close(descriptor)

    def listed(self) -> list[str]:
        """The records left out so far, each once, by this process and by all that share the listing; sorted, because
        in which order they were met depends on the processes."""
        records = list(self.seen)
        if self.listing is not None and self.listing.exists():
            records += [json.loads(line)["record"] for line in self.listing.read_text().splitlines()]
        return sorted(set(records))
