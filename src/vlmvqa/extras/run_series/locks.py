"""Locks that let several processes, also on several machines, work in one folder. A lock ends with its process."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from vlmvqa.errors import InputError


def try_lock(path: Path) -> IO[str] | None:
    """Lock a file, creating it; return it, or None if another process has locked it. Closing the file unlocks it.

    POSIX record locks: DataLoader workers, which are forked, do not inherit them and so don't outlive a killed process
    with a lock.
    """
    return _lock(path, fcntl.LOCK_EX | fcntl.LOCK_NB)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Wait until no other process reads or writes the folder's own files."""
    file = _lock(folder / ".lock", fcntl.LOCK_EX)
    assert file is not None, "it was waited for"
    with file:
        yield


def _lock(path: Path, operation: int) -> IO[str] | None:
    path.parent.mkdir(parents=True, exist_ok=True)
    file = path.open("w")
    try:
        fcntl.lockf(file, operation)
    except (BlockingIOError, PermissionError):
        file.close()
        return None
    except OSError as error:
        file.close()
        raise InputError(f"{path} cannot be locked ({error.strerror}); choose a run.dir that supports locks") from error
    return file
