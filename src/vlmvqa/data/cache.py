"""Disk cache of parsed splits, token ids and trained tokenizers, so that the second run starts at once.

The cache is optional and may be deleted at any time: an entry that is missing, damaged or of another version is made
again, and a folder that cannot be written prints one line. Entries hold arrays and UTF-8 text, never pickles, so that a
group may share a folder.

    Examples   <->  numbers and JSON with one table of all texts     read_once
    arrays     <->  ~/.cache/vlmvqa/v1/<kind>-<hash of the key>      Cache; $VLMVQA_CACHE sets another folder
"""

from __future__ import annotations

import gc
import io
import json
import os
import time
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields
from functools import cache as once
from hashlib import blake2b
from itertools import chain, islice
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from vlmvqa import ranks
from vlmvqa.data.example import Example, Question
from vlmvqa.errors import BadRecords

VERSION = 1  # of the entry format; entries of other versions are never read
MAX_BYTES = 5 * 2**30  # of all entries; beyond, the least recently used are deleted (VQAv2's train split: 50 MB)
ABANDONED = 24 * 3600  # seconds after which an unfinished entry is deleted
CHECKSUM = 32  # bytes at the end of an entry

Arrays = dict[str, NDArray[Any]]


def _folder() -> Path | None:
    try:
        return Path(os.environ.get("VLMVQA_CACHE") or "~/.cache/vlmvqa").expanduser() / f"v{VERSION}"
    except RuntimeError:  # a container's user without a home folder
        return None


@dataclass(frozen=True)
class Cache:
    """Arrays by key, in a folder that several processes may use at once (None: nothing is cached)."""

    folder: Path | None = field(default_factory=_folder)

    def load(self, kind: str, key: Any) -> Arrays | None:
        """Return the arrays saved under this key, or None."""
        if self.folder is None:
            return None
        path = self.folder / _name(kind, key)
        try:
            content = path.read_bytes()
        except OSError:
            return None
        body, checksum = content[:-CHECKSUM], content[-CHECKSUM:]
        if _checksum(body) != checksum:
            return None
        with suppress(OSError):  # time of last use, for `_delete_old`; a shared folder may be read-only
            os.utime(path)
        with np.load(io.BytesIO(body), allow_pickle=False) as entry:
            return {name: entry[name] for name in entry.files}

    def save(self, kind: str, key: Any, arrays: Arrays) -> None:
        """Save numeric arrays under a key that JSON can hold. A disk error prints one line per process."""
        if self.folder is None:
            return
        body = io.BytesIO()
        np.savez(body, **arrays)  # type: ignore[arg-type]  # the stub takes them for its option allow_pickle
        name = _name(kind, key)
        unfinished = self.folder / f".{name}.{uuid.uuid4().hex}"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with unfinished.open("wb") as file:
                file.write(body.getbuffer())
                file.write(_checksum(body.getbuffer()))
            os.replace(unfinished, self.folder / name)
        except OSError as error:
            _report_unwritable(self.folder, error.strerror or str(error))
        finally:
            with suppress(OSError):
                unfinished.unlink(missing_ok=True)
        self._delete_old()

    def _delete_old(self) -> None:
        """Delete unfinished entries of killed processes, and the entries beyond `MAX_BYTES`."""
        assert self.folder is not None
        total = 0
        with suppress(OSError):  # another process may be deleting the same files
            entries = [(entry.stat(), entry) for entry in os.scandir(self.folder) if entry.is_file()]
            for stat, entry in sorted(entries, key=lambda pair: -pair[0].st_mtime):
                finished = not entry.name.startswith(".")
                total += stat.st_size
                if total > MAX_BYTES if finished else time.time() - stat.st_mtime > ABANDONED:
                    os.unlink(entry)


def _name(kind: str, key: Any) -> str:
    return f"{kind}-{blake2b(json.dumps(key, sort_keys=True).encode(), digest_size=20).hexdigest()}"


def _checksum(body: bytes | memoryview) -> bytes:
    return blake2b(body, digest_size=CHECKSUM).digest()


@once
def _report_unwritable(folder: Path, reason: str) -> None:
    ranks.print_on_rank0(
        f"the cache {folder} cannot be written ({reason}), so the next run reads and tokenizes again; "
        "free space, or set VLMVQA_CACHE to another folder"
    )


# --- the examples of a split --------------------------------------------------------------------------


def read_once(
    read: Callable[[], list[Example]],
    files: Sequence[Path],
    root: Path,
    key: Mapping[str, Any],
    bad_records: BadRecords,
    cache: Cache | None = None,
) -> list[Example]:
    """Return the result of `read`, from the cache if the same files were read before.

    A result with bad records is not cached, so that every run stops at them or lists them.

    Args:
        read: the reader of a split; `key` are its arguments, and it reports to `bad_records`.
        files: all files and folders that `read` depends on. A folder of images counts as changed when files are added
            or removed.
        root: the folder of the images; the cache holds paths relative to it.
        cache: default: the cache of this user.
    """
    cache = cache or Cache()
    stamps = _stamps(files)
    if stamps is None:  # `read` names the missing file
        return read()
    full_key = {**key, "files": stamps, "root": str(root.absolute()), "code": code_fingerprint()}
    cached = cache.load("examples", full_key)
    if cached is not None:
        return _to_examples(cached, root)
    before = len(bad_records.seen)
    examples = read()
    if len(bad_records.seen) == before and _stamps(files) == stamps:
        arrays = _to_arrays(examples, root)
        if arrays is not None:
            cache.save("examples", full_key, arrays)
    return examples


def _stamps(files: Iterable[Path]) -> list[tuple[str, int, int]] | None:
    """Return path, size and modification time of each file; None if one is missing."""
    try:
        return [(str(path.absolute()), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    except OSError:
        return None


@once
def code_fingerprint() -> str:
    """Hash the source of `vlmvqa.data` and its subpackages, so that a change of the code invalidates the cache."""
    digest = blake2b(digest_size=20)
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


# --- examples as arrays -------------------------------------------------------------------------------

TEXTS = [field.name for field in fields(Question) if field.name not in ("id", "answers", "details", "history")]


def _to_arrays(examples: Sequence[Example], root: Path) -> Arrays | None:
    """Convert examples to arrays; None if one has no path below `root`, or holds a value that JSON cannot."""
    texts: dict[str | None, int] = {}  # number of each distinct text; the arrays hold these
    answers: dict[tuple[str, ...], int] = {}
    questions = [question for example in examples for question in example.questions]

    def numbers(values: Iterable[str | None]) -> NDArray[np.int32]:
        return np.array([texts.setdefault(text, len(texts)) for text in values], np.int32)

    if any(example.more_images for example in examples) or any(question.history for question in questions):
        return None
    try:
        arrays = {
            **{name: numbers(getattr(question, name) for question in questions) for name in TEXTS},
            "answers": np.array([answers.setdefault(question.answers, len(answers)) for question in questions], int),
            "answer_texts": numbers(chain.from_iterable(answers)),
            "answer_counts": np.array([len(some) for some in answers], int),
            "question_counts": np.array([len(example.questions) for example in examples], int),
        }
        images = [cast(Path, example.image).relative_to(root).as_posix() for example in examples]
        image_ids = [example.image_id for example in examples]
        others = [list(texts), images, image_ids, [q.id for q in questions], [q.details for q in questions]]
        return {**arrays, "json": as_array(json.dumps(others))}
    except (AttributeError, TypeError, ValueError):
        return None


def _to_examples(arrays: Arrays, root: Path) -> list[Example]:
    """Convert arrays back to examples; as from the reader, equal texts and equal answers are one object."""
    texts, images, image_ids, ids, details = json.loads(as_text(arrays["json"]))

    def values(name: str) -> list[Any]:
        return [texts[number] for number in arrays[name].tolist()]

    gc.disable()  # while a million objects are made that all stay, its scans take most of the time
    try:
        answer_texts = iter(values("answer_texts"))
        answers = [tuple(islice(answer_texts, count)) for count in arrays["answer_counts"].tolist()]
        columns = {"id": ids, "details": details, "answers": [answers[number] for number in arrays["answers"].tolist()]}
        columns |= {name: values(name) for name in TEXTS}
        questions = map(Question, *(columns[field.name] for field in fields(Question) if field.name in columns))
        return [
            Example(root / image, image_id, tuple(islice(questions, count)))
            for image, image_id, count in zip(images, image_ids, arrays["question_counts"].tolist(), strict=True)
        ]
    finally:
        gc.enable()


def as_array(text: str) -> NDArray[np.uint8]:
    """Return a text as an array."""
    return np.frombuffer(text.encode(), np.uint8)


def as_text(array: NDArray[np.uint8]) -> str:
    """Return the text of an array that `as_array` made."""
    return array.tobytes().decode()
