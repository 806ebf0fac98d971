"""The checkpoint folders of a run: which are complete, which is the newest, which is the best.

checkpoint-N.partial/   is being written; remains after a kill, and is never resumed from
checkpoint-N/           complete: renamed when all ranks have written, with sizes and checksums in files.json
latest, best            links to the newest checkpoint and to the one with the highest VQA accuracy
"""

from __future__ import annotations

import json
import os
import re
import shutil
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vlmvqa import ranks

FILES, LATEST, BEST = "files.json", "latest", "best"


@contextmanager
def writing(folder: Path, step: int) -> Iterator[Path]:
    """Yield a folder that all ranks write a step's checkpoint into, and rename it when all are done."""
    final = folder / f"checkpoint-{step}"
    partial = final.with_name(final.name + ".partial")
    if ranks.is_first():
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    ranks.barrier()
    yield partial
    ranks.barrier()
    if ranks.is_first():
        paths = sorted(path for path in partial.rglob("*") if path.is_file())
        files = {path.relative_to(partial).as_posix(): _size_and_checksum(path) for path in paths}
        (partial / FILES).write_text(json.dumps(files, indent=2) + "\n")
        shutil.rmtree(final, ignore_errors=True)  # damaged, or of a step that is repeated
        partial.replace(final)
        point(folder / LATEST, final)
    ranks.barrier()


def point(link: Path, checkpoint: Path) -> None:
    """Let a link point to a checkpoint, atomically."""
    partial = link.with_name(link.name + ".partial")
    partial.unlink(missing_ok=True)
    partial.symlink_to(checkpoint.name)
    partial.replace(link)


def rotate(folder: Path, limit: int | None, best: str | None) -> None:
    """Delete the oldest checkpoints beyond `limit` (None: no limit), but never the newest and the best."""
    complete = complete_checkpoints(folder)
    if limit is None or not complete:
        return
    kept = {complete[-1], *(checkpoint for checkpoint in complete if str(checkpoint) == best)}
    for checkpoint in reversed(complete):
        if checkpoint not in kept and len(kept) < limit:
            kept.add(checkpoint)
        elif checkpoint not in kept:
            shutil.rmtree(checkpoint)


def complete_checkpoints(folder: Path) -> list[Path]:
    """Return the complete checkpoints of a run's folder, oldest first."""
    found = [path for path in folder.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted((path for path in found if (path / FILES).is_file()), key=step_of)


def step_of(checkpoint: Path) -> int:
    """Return the number of optimizer steps before a checkpoint."""
    return int(checkpoint.name.removeprefix("checkpoint-"))


def remove_incomplete(folder: Path) -> list[Path]:
    """Delete checkpoints that a kill or a full disk left incomplete; return the deleted folders."""
    incomplete = [path for path in folder.glob("checkpoint-*.partial") if path.is_dir()]
    for checkpoint in incomplete:
        shutil.rmtree(checkpoint)
    return incomplete


def newest_intact(folder: Path) -> tuple[Path | None, list[str]]:
    """Return the newest checkpoint without damage, and a warning for each newer one that is damaged."""
    warnings: list[str] = []
    for checkpoint in reversed(complete_checkpoints(folder)):
        problem = damage(checkpoint)
        if problem is None:
            return checkpoint, warnings
        warnings.append(f"{checkpoint} is damaged ({problem}), so the checkpoint before it is used")
    return None, warnings


def damage(checkpoint: Path) -> str | None:
    """Return what is wrong with a checkpoint's files, or None."""
    try:
        files = json.loads((checkpoint / FILES).read_text())
    except ValueError:
        return f"{FILES} is not readable"
    for name, expected in files.items():
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != expected[0] or _size_and_checksum(path) != expected:
            return f"{name} has changed since it was written"
    return None


def _size_and_checksum(path: Path) -> list[int]:
    """Return size and CRC-32, which detect truncation and flipped bits, not tampering; about a second per gigabyte."""
    checksum = 0
    with path.open("rb") as file:
        while block := file.read(2**24):
            checksum = zlib.crc32(block, checksum)
    return [os.path.getsize(path), checksum]
