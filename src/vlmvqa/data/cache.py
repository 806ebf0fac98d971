"""Disk cache of parsed splits, token ids and trained tokenizers, so that the second run starts at once.

The cache is optional and may be deleted at any time: an entry that is missing, damaged or of another version is made
again, and a folder that cannot be written prints one line. Entries hold arrays and UTF-8 text, never pickles, so that a
group may share a folder.

    Examples  <->  numeric columns and one table of all strings     read_once
    columns   <->  ~/.cache/vlmvqa/v1/<kind>-<hash of the key>      Cache; $VLMVQA_CACHE sets another folder
"""

from __future__ import annotations

import gc
import io
import json
import os
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, fields
from functools import cache as once
from hashlib import blake2b
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlmvqa import ranks
from vlmvqa.data.example import Example, Question
from vlmvqa.errors import BadRecords

VERSION = 1  # of the entry format; entries of other versions are never read
MAX_BYTES = 5 * 2**30  # of all entries; beyond, the least recently used are deleted (VQAv2's train split: 50 MB)
ABANDONED = 24 * 3600  # seconds after which an unfinished entry is deleted
CHECKSUM = 32  # bytes at the end of an entry

Columns = dict[str, NDArray[Any]]


def _folder() -> Path | None:
    try:
        return Path(os.environ.get("VLMVQA_CACHE") or "~/.cache/vlmvqa").expanduser() / f"v{VERSION}"
    except RuntimeError:  # a container's user without a home folder
        return None


@dataclass(frozen=True)
class Cache:
    """Arrays by key, in a folder that several processes may use at once (None: nothing is cached)."""

    folder: Path | None = field(default_factory=_folder)

    def load(self, kind: str, key: Any) -> Columns | None:
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

    def save(self, kind: str, key: Any, columns: Columns) -> None:
        """Save numeric arrays under a key that JSON can hold. A disk error prints one line per process."""
        if self.folder is None:
            return
        body = io.BytesIO()
        np.savez(body, **columns)  # type: ignore[arg-type]  # the stub takes them for its option allow_pickle
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
        read: the reader of a split.
        files: all files and folders that `read` depends on. A folder of images counts as changed when files are added
            or removed.
        root: the folder of the images; the cache holds paths relative to it.
        key: the arguments of `read`.
        bad_records: where `read` reports the records that it leaves out.
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
        columns = _to_columns(examples, root)
        if columns is not None:
            cache.save("examples", full_key, columns)
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


# --- examples as columns ------------------------------------------------------------------------------

TEXTS = [field.name for field in fields(Question) if field.name not in ("id", "answers", "details")]


def _to_columns(examples: Sequence[Example], root: Path) -> Columns | None:
    """Convert examples to arrays; None if one holds a value that these cannot (an image in memory, a non-text)."""
    numbers: dict[str, int] = {}  # number of each distinct string; the columns hold these
    answers: dict[tuple[str, ...], int] = {}
    questions = [question for example in examples for question in example.questions]

    def column(values: Iterable[str | None]) -> NDArray[np.int32]:
        return np.array([-1 if text is None else numbers.setdefault(text, len(numbers)) for text in values], np.int32)

    try:
        columns = {
            "ids": column([json.dumps([question.id for question in questions])]),
            **{name: column(getattr(question, name) for question in questions) for name in TEXTS},
            "details": column(None if q.details is None else json.dumps(q.details) for q in questions),
            "answers": np.array([answers.setdefault(q.answers, len(answers)) for q in questions], np.int32),
            "answer_texts": column(text for texts in answers for text in texts),
            "answer_counts": np.array([len(texts) for texts in answers], np.int32),
            "images": column(_relative_path(example, root) for example in examples),
            "image_ids": column([json.dumps([example.image_id for example in examples])]),
            "question_counts": np.array([len(example.questions) for example in examples], np.int32),
        }
        return {**columns, **pack_strings(list(numbers))}
    except (TypeError, ValueError):
        return None


def _relative_path(example: Example, root: Path) -> str:
    if not isinstance(example.image, Path):
        raise TypeError(f"{example.name} is no file")
    return example.image.relative_to(root).as_posix()


def _to_examples(columns: Columns, root: Path) -> list[Example]:
    """Convert columns back to examples; as from the reader, equal strings and equal answers are one object."""
    strings: list[Any] = [*unpack_strings(columns), None]  # number -1 is None

    def values(name: str) -> list[Any]:
        return [strings[number] for number in columns[name].tolist()]

    with _no_garbage_collection():
        answers = _cut(values("answer_texts"), columns["answer_counts"])
        given = {name: values(name) for name in TEXTS}
        given["id"] = json.loads(*values("ids"))
        given["answers"] = [answers[number] for number in columns["answers"].tolist()]
        given["details"] = [None if text is None else json.loads(text) for text in values("details")]
        questions = list(map(Question, *(given[field.name] for field in fields(Question))))
        images = [root / name for name in values("images")]
        image_ids = json.loads(*values("image_ids"))
        return list(map(Example, images, image_ids, _cut(questions, columns["question_counts"])))


def _cut(values: Sequence[Any], lengths: NDArray[Any]) -> list[tuple[Any, ...]]:
    """Cut a sequence into consecutive tuples of these lengths."""
    ends = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]).tolist()
    return [tuple(values[start:end]) for start, end in pairwise(ends)]


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Pause the collector: while a million objects are made that all stay, its scans take most of the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


# --- strings as arrays --------------------------------------------------------------------------------


def pack_strings(strings: Sequence[str]) -> Columns:
    """Pack strings into an array of UTF-8 bytes and an array of their lengths in characters."""
    if not all(isinstance(string, str) for string in strings):
        raise TypeError("only strings can be packed")
    joined = "".join(strings).encode("utf-8", "surrogatepass")  # JSON may hold half a surrogate pair: "\ud83d"
    lengths = np.array([len(string) for string in strings], np.int32)
    return {"utf8": np.frombuffer(joined, np.uint8), "characters": lengths}


def unpack_strings(columns: Columns) -> list[str]:
    """Return the strings that `pack_strings` packed."""
    joined = columns["utf8"].tobytes().decode("utf-8", "surrogatepass")
    ends = np.concatenate([[0], np.cumsum(columns["characters"], dtype=np.int64)]).tolist()
    return [joined[start:end] for start, end in pairwise(ends)]
