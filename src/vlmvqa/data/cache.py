"""What was read or tokenised before, kept on disk: the second run starts at once.

A cache is never needed: an entry that is missing, damaged or of another version is made anew, and a folder that cannot
be written costs a sentence, not the run. Entries hold arrays and UTF-8 text, nothing that Python would execute, so that
a group may share a folder. It may be deleted at any time.

    Examples  <->  columns of numbers, one table of all strings     read_once
    columns   <->  ~/.cache/vlmvqa/v1/<kind>-<hash of the key>      Cache; $VLMVQA_CACHE names another folder
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
from vlmvqa.data.bad_records import BadRecords
from vlmvqa.data.example import Example, Question

VERSION = 1  # of how an entry is written; another version's are never read
LARGEST = 5 * 2**30  # bytes of all entries; above, those not used for the longest time go (VQAv2's train split: 50 MB)
ABANDONED = 24 * 3600  # seconds after which an unfinished entry is nobody's
CHECKSUM = 32  # bytes at the end of an entry

Columns = dict[str, NDArray[Any]]


def _folder() -> Path | None:
    try:
        return Path(os.environ.get("VLMVQA_CACHE") or "~/.cache/vlmvqa").expanduser() / f"v{VERSION}"
    except RuntimeError:  # a container's user without a home
        return None


@dataclass(frozen=True)
class Cache:
    """Arrays by key, in a folder that several processes may use at once (None: nothing is kept)."""

    folder: Path | None = field(default_factory=_folder)

    def load(self, kind: str, key: Any) -> Columns | None:
        """The arrays saved under this key, or None."""
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
        with suppress(OSError):  # its last use, for `_make_room`; a shared folder may be read-only
            os.utime(path)
        with np.load(io.BytesIO(body), allow_pickle=False) as entry:
            return {name: entry[name] for name in entry.files}

    def save(self, kind: str, key: Any, columns: Columns) -> None:
        """Keep numeric arrays under a key that JSON can hold. What goes wrong with the disk is said, once."""
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
            _say_unwritable(self.folder, error.strerror or str(error))
        finally:
            with suppress(OSError):
                unfinished.unlink(missing_ok=True)
        self._make_room()

    def _make_room(self) -> None:
        """Remove what killed processes left, and the entries beyond `LARGEST`."""
        assert self.folder is not None
        total = 0
        with suppress(OSError):  # another process may be removing the same
            known = [(entry.stat(), entry) for entry in os.scandir(self.folder) if entry.is_file()]
            for found, entry in sorted(known, key=lambda pair: -pair[0].st_mtime):
                finished = not entry.name.startswith(".")
                total += found.st_size
                if total > LARGEST if finished else time.time() - found.st_mtime > ABANDONED:
                    os.unlink(entry)


def _name(kind: str, key: Any) -> str:
    return f"{kind}-{blake2b(json.dumps(key, sort_keys=True).encode(), digest_size=20).hexdigest()}"


def _checksum(body: bytes | memoryview) -> bytes:
    return blake2b(body, digest_size=CHECKSUM).digest()


@once
def _say_unwritable(folder: Path, reason: str) -> None:
    ranks.print_on_rank0(
        f"the cache {folder} cannot be written ({reason}), so the next run reads and tokenises again; "
        "free space, or set VLMVQA_CACHE to another folder"
    )


# --- a split of a source ------------------------------------------------------------------------------


def read_once(
    read: Callable[[], list[Example]],
    files: Sequence[Path],
    root: Path,
    key: Mapping[str, Any],
    bad_records: BadRecords,
    cache: Cache | None = None,
) -> list[Example]:
    """What `read` returns, or what it returned before from the same files.

    Kept is only a read without a bad record, so that every run stops at it or lists it.

    Args:
        files: all that `read` depends on; of a folder of images, that none came or went.
        root: the folder of the images; kept are paths below it.
        key: the arguments of `read`.
        bad_records: where `read` reports what it leaves out.
    """
    cache = cache or Cache()
    stamps = _stamps(files)
    if stamps is None:  # the reader says what is missing
        return read()
    whole_key = {**key, "files": stamps, "root": str(root.absolute()), "code": code()}
    known = cache.load("examples", whole_key)
    if known is not None:
        return _examples(known, root)
    before = len(bad_records.seen)
    examples = read()
    if len(bad_records.seen) == before and _stamps(files) == stamps:
        columns = _columns(examples, root)
        if columns is not None:
            cache.save("examples", whole_key, columns)
    return examples


def _stamps(files: Iterable[Path]) -> list[tuple[str, int, int]] | None:
    """Path, size and time of the last change of each file; None if one is missing."""
    try:
        return [(str(path.absolute()), *_stamp(path)) for path in files]
    except OSError:
        return None


def _stamp(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_size, found.st_mtime_ns


@once
def code() -> str:
    """A fingerprint of this folder's modules: whoever changes one need not think of the cache."""
    digest = blake2b(digest_size=20)
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


# --- examples as columns ------------------------------------------------------------------------------

TEXTS = [field.name for field in fields(Question) if field.name not in ("id", "answers", "details")]


def _columns(examples: Sequence[Example], root: Path) -> Columns | None:
    """Examples as arrays; None if one holds what these cannot (an image in memory, a number for a text)."""
    texts: dict[str, int] = {}  # each string's number; the columns refer to it
    answers: dict[tuple[str, ...], int] = {}
    questions = [question for example in examples for question in example.questions]

    def numbers(values: Iterable[str | None]) -> NDArray[np.int32]:
        return np.array([-1 if value is None else texts.setdefault(value, len(texts)) for value in values], np.int32)

    def ids(name: str, values: Sequence[int | str]) -> Columns:
        """Whole numbers as they are, texts by their number."""
        kept = [texts.setdefault(value, len(texts)) if isinstance(value, str) else value for value in values]
        return {name: np.array(kept, np.int64), f"{name}_is_text": np.array([isinstance(v, str) for v in values], bool)}

    try:
        columns = {
            **ids("id", [question.id for question in questions]),
            **{name: numbers(getattr(question, name) for question in questions) for name in TEXTS},
            "details": numbers(None if q.details is None else json.dumps(q.details) for q in questions),
            "answers": np.array([answers.setdefault(q.answers, len(answers)) for q in questions], np.int32),
            "answer_texts": numbers(text for several in answers for text in several),
            "answer_counts": np.array([len(several) for several in answers], np.int32),
            "image": numbers(_below(root, example) for example in examples),
            **ids("image_id", [example.image_id for example in examples]),
            "question_counts": np.array([len(example.questions) for example in examples], np.int32),
        }
        return {**columns, **pack(list(texts))}
    except (TypeError, ValueError, OverflowError):
        return None


def _below(root: Path, example: Example) -> str:
    if not isinstance(example.image, Path):
        raise TypeError(f"{example.name} is no file")
    return example.image.relative_to(root).as_posix()


def _examples(columns: Columns, root: Path) -> list[Example]:
    """The examples again; equal strings and equal answers are one object, as the reader leaves them."""
    texts: list[Any] = [*unpack(columns), None]  # number -1 is None

    def named(name: str) -> list[Any]:
        return [texts[number] for number in columns[name].tolist()]

    def ids(name: str) -> list[Any]:
        kept, is_text = columns[name].tolist(), columns[f"{name}_is_text"]
        for place in np.flatnonzero(is_text):
            kept[place] = texts[kept[place]]
        return kept

    with _no_garbage_collection():
        several = _cut(named("answer_texts"), columns["answer_counts"])
        given = {name: named(name) for name in TEXTS}
        given["details"] = [None if text is None else json.loads(text) for text in named("details")]
        given |= {"id": ids("id"), "answers": [several[number] for number in columns["answers"].tolist()]}
        questions = list(map(Question, *(given[field.name] for field in fields(Question))))
        images = [root / name for name in named("image")]
        return list(map(Example, images, ids("image_id"), _cut(questions, columns["question_counts"])))


def _cut(values: Sequence[Any], counts: NDArray[Any]) -> list[tuple[Any, ...]]:
    """Consecutive tuples of so many values each."""
    ends = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)]).tolist()
    return [tuple(values[start:end]) for start, end in pairwise(ends)]


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """While a million objects are made that all stay, looking for what could go takes most of the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


# --- strings as arrays --------------------------------------------------------------------------------


def pack(texts: Sequence[str]) -> Columns:
    """Strings as one array of UTF-8 bytes and one of their lengths in characters."""
    if not all(isinstance(text, str) for text in texts):
        raise TypeError("only strings can be packed")
    whole = "".join(texts).encode("utf-8", "surrogatepass")  # JSON may hold half a surrogate pair: "\ud83d"
    return {"utf8": np.frombuffer(whole, np.uint8), "characters": np.array([len(text) for text in texts], np.int32)}


def unpack(columns: Columns) -> list[str]:
    """The strings that `pack` packed."""
    whole = columns["utf8"].tobytes().decode("utf-8", "surrogatepass")
    ends = np.concatenate([[0], np.cumsum(columns["characters"], dtype=np.int64)]).tolist()
    return [whole[start:end] for start, end in pairwise(ends)]
