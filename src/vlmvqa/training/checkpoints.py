"""Which checkpoints of a run are whole, which is the newest, which is the best.

checkpoint-N.partial/   is being written; a kill leaves it, and it is never resumed from
checkpoint-N/           whole: renamed when all ranks have written, with sizes and checksums in files.json
latest, best            links to the newest checkpoint and to that of the highest VQA accuracy
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
    """A folder for all ranks to write the checkpoint of a step into; it gets its name when all have."""
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
        files = {path.relative_to(partial).as_posix(): _fingerprint(path) for path in paths}
        (partial / FILES).write_text(json.dumps(files, indent=2) + "\n")
        shutil.rmtree(final, ignore_errors=True)  # a damaged one, or of a step that is made again
        partial.replace(final)
        point(folder / LATEST, final)
    ranks.barrier()


def point(link: Path, checkpoint: Path) -> None:
    """Let the link point to the checkpoint, in one step, so that it always points to one."""
    partial = link.with_name(link.name + ".partial")
    partial.unlink(missing_ok=True)
    partial.symlink_to(checkpoint.name)
    partial.replace(link)


def rotate(folder: Path, keep: int | None, best: str | None) -> None:
    """Delete the oldest checkpoints but `keep` (None: all are kept); the newest and the best stay in any case."""
    whole = whole_checkpoints(folder)
    if keep is None or not whole:
        return
    kept = {whole[-1], *(checkpoint for checkpoint in whole if str(checkpoint) == best)}
    for checkpoint in reversed(whole):
        if checkpoint not in kept and len(kept) < keep:
            kept.add(checkpoint)
        elif checkpoint not in kept:
            shutil.rmtree(checkpoint)


def whole_checkpoints(folder: Path) -> list[Path]:
    """The whole checkpoints of a run's folder, oldest first."""
    found = [path for path in folder.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    whole = [path for path in found if (path / FILES).is_file()]
    return sorted(whole, key=step_of)


def step_of(checkpoint: Path) -> int:
    """After how many optimizer steps a checkpoint was written."""
    return int(checkpoint.name.removeprefix("checkpoint-"))


def remove_unfinished(folder: Path) -> list[Path]:
    """Delete what a kill or a full disk left half-written, so that it counts nowhere; returns what went."""
    unfinished = [path for path in folder.glob("checkpoint-*.partial") if path.is_dir()]
    for checkpoint in unfinished:
        shutil.rmtree(checkpoint)
    return unfinished


def newest_sound(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint whose files are as they were written, and a sentence about each newer one that is not."""
    complaints: list[str] = []
    for checkpoint in reversed(whole_checkpoints(folder)):
        problem = damage(checkpoint)
        if problem is None:
            return checkpoint, complaints
        complaints.append(f"{checkpoint} is damaged ({problem}), so the checkpoint before it is taken")
    return None, complaints


def damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint's files; None: nothing."""
    try:
        files = json.loads((checkpoint / FILES).read_text())
    except ValueError:
        return f"{FILES} is not readable"
    for name, expected in files.items():
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != expected[0] or _fingerprint(path) != expected:
            return f"{name} is not as it was written"
    return None


def _fingerprint(path: Path) -> list[int]:
    """Size and CRC-32: against cut and flipped bytes, not against malice. A gigabyte takes about a second."""
    checksum = 0
    with path.open("rb") as file:
        while block := file.read(2**24):
            checksum = zlib.crc32(block, checksum)
    return [os.path.getsize(path), checksum]
