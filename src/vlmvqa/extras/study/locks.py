"""Locks that let several processes, also on several machines, work on one study. A lock ends with its process."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vlmvqa import ranks


@contextmanager
def claimed(folder: Path) -> Iterator[bool]:
    """Claim a run for this process, with all its ranks; False if another process trains it."""
    path = folder.with_name(f".{folder.name}.lock")
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:

        def lock() -> bool:
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                return False
            return True

        yield ranks.broadcast_from_rank0(lock)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Wait until no other process reads or writes the study's own files."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as file:
        fcntl.lockf(file, fcntl.LOCK_EX)
        yield
