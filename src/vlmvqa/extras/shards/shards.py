"""A split as a few large files in place of a hundred thousand small ones: parquet shards with a row an image.

    examples --write--> folder/train-00000-of-00083.parquet ... --read--> Examples whose image is read when it is needed

    image       the bytes of the picture's file, as they were
    image_id    number or text
    questions   [id, text, target, answers, question_type, answer_type, details (JSON)]

A row is a row group: one picture is one read of one file, and pictures in order are read from end to end. What was
packed stands in the schema's metadata, so that other questions than those asked for are an error.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from PIL.Image import Image

from vlmvqa.data.bad_records import BadRecords
from vlmvqa.data.example import Example, Question
from vlmvqa.data.records import Prompts, refuse_empty
from vlmvqa.errors import InputError
from vlmvqa.progress import bar

FORMAT = 1
IMAGES_A_SHARD = 1000  # VQAv2's are 160 MB
KEY = b"vlmvqa"  # of the schema's metadata
TEXTS = ("text", "target", "question_type", "answer_type")


@dataclass(frozen=True, slots=True)
class PackedPicture:
    """A picture's place in a shard."""

    shard: Path
    row: int

    def read_bytes(self) -> bytes:
        """The bytes of the picture's file.

        Raises:
            OSError: the shard is gone or damaged.
        """
        content: bytes = (
            _opened(self.shard, os.getpid()).read_row_group(self.row, columns=["image"])["image"][0].as_py()
        )
        return content


@cache
def _opened(shard: Path, process: int) -> Any:
    """A shard, opened once a process."""
    return _parquet().ParquetFile(shard)


def write(
    folder: Path,
    key: Mapping[str, Any],
    examples: Sequence[Example],
    bad_records: BadRecords,
    *,
    images_a_shard: int = IMAGES_A_SHARD,
    progress: bool = False,
) -> int:
    """Write a split's shards, all or none; those of the same split that are there are replaced.

    Args:
        key: what the examples are: source, split, what else chose them.
        examples: their pictures are files or bytes.
        bad_records: what to do with a picture that cannot be read; it is left out where that goes on.

    Returns:
        the number of pictures written.

    Raises:
        InputError: the folder cannot be written, or a picture cannot be read.
    """
    unfinished = folder / f".{uuid.uuid4().hex}"
    try:
        unfinished.mkdir(parents=True)
        schema = _schema(examples, key)
        written, shards = 0, 0
        with bar(doing=f"packing {key['split']}", unit="images", total=len(examples), shown=progress) as done:
            for first in range(0, len(examples), images_a_shard):
                rows = list(_rows(examples[first : first + images_a_shard], bad_records, done.update))
                if rows:
                    _write_shard(unfinished / f"{shards:05}.parquet", rows, schema)
                    written, shards = written + len(rows), shards + 1
        if not written:
            raise InputError(f"{key['split']}: no picture could be read; see the bad records' listing")
        _opened.cache_clear()
        for old in shards_of(folder, str(key["split"])):
            old.unlink()
        for number in range(shards):
            name = f"{_file_name(str(key['split']))}-{number:05}-of-{shards:05}.parquet"
            (unfinished / f"{number:05}.parquet").replace(folder / name)
        return written
    except OSError as error:
        raise InputError(
            f"{folder} cannot be written ({error.strerror or error}); free space, or choose another"
        ) from None
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def read(folder: Path, key: Mapping[str, Any], prompt: str, *, asks: bool = True) -> list[Example]:
    """The examples of a split, in the order in which they were packed.

    Args:
        key: what is asked for; it must be what was packed.
        prompt: what the model reads; `{question}` stands for the question, if the source `asks` any.

    Raises:
        InputError: the folder does not hold these questions, or not all of its shards.
    """
    shards = shards_of(folder, str(key["split"]))
    if not shards:
        there = "holds no" if folder.is_dir() else "does not exist, so it holds no"
        raise InputError(f"data.shards={folder} {there} {key['split']}; make it with: {_command(folder, key)}")
    total = int(shards[0].stem.rpartition("-of-")[2])
    if len(shards) != total:
        raise InputError(
            f"data.shards={folder} holds {len(shards)} of {total} shards of {key['split']}; copy the others"
        )
    to_prompt: Callable[[str], str] = Prompts(prompt) if asks else lambda _: prompt
    examples: list[Example] = []
    for shard in shards:
        try:
            file = _opened(shard, os.getpid())
            packed = json.loads(file.schema_arrow.metadata[KEY])
            rows = file.read(columns=["image_id", "questions"]).to_pylist()
        except (OSError, ValueError, KeyError, TypeError) as error:  # ArrowInvalid is a ValueError
            raise InputError(
                f"{shard} is not a whole shard ({str(error)[:100]}); pack it again: {_command(folder, key)}"
            ) from None
        _refuse_other(packed, key, folder)
        for number, row in enumerate(rows):
            questions = tuple(_question(one, to_prompt) for one in row["questions"])
            examples.append(Example(PackedPicture(shard, number), row["image_id"], questions))
    return refuse_empty(examples, folder, str(key["split"]))


def shards_of(folder: Path, split: str) -> list[Path]:
    """The files of a split, in order."""
    name = re.compile(re.escape(_file_name(split)) + r"-\d+-of-\d+\.parquet")
    return sorted(path for path in folder.glob("*.parquet") if name.fullmatch(path.name))


def _file_name(split: str) -> str:
    """`train[:10%]` -> `train_10pc`: a name for any file system."""
    return re.sub(r"[^\w.-]+", "_", split.replace("%", "pc").replace("[:", "[0:")).strip("_")


def _command(folder: Path, key: Mapping[str, Any]) -> str:
    """What packs a split; a slice is packed by itself."""
    return f"python launch/prepare.py pack data={key['source']} data.root=... 'split={key['split']}' pack.dir={folder}"


def _refuse_other(found: Mapping[str, Any], key: Mapping[str, Any], folder: Path) -> None:
    wanted = json.loads(json.dumps({"format": FORMAT, **key}))
    different = [f"{name} {found.get(name)}, now {value}" for name, value in wanted.items() if found.get(name) != value]
    if different:
        raise InputError(
            f"data.shards={folder} was packed of others ({', '.join(different)}); ask for what was packed, or pack "
            f"again: {_command(folder, key)}"
        )


# --- rows ---------------------------------------------------------------------------------------------


def _rows(examples: Iterable[Example], bad_records: BadRecords, done: Callable[[], Any]) -> Iterable[dict[str, Any]]:
    for example in examples:
        done()
        image = example.image
        try:
            if isinstance(image, Image):
                raise TypeError(f"{example.name} is a picture in memory, not a file")
            content = image if isinstance(image, bytes) else image.read_bytes()
        except OSError as error:
            bad_records.add(example.name, f"its picture cannot be read ({error.strerror or error})", "fetch it again")
            continue
        yield {"image": content, "image_id": example.image_id, "questions": [_record(one) for one in example.questions]}


def _record(question: Question) -> dict[str, Any]:
    details = None if question.details is None else json.dumps(question.details)
    texts = {name: getattr(question, name) for name in TEXTS}
    return {"id": question.id, **texts, "answers": list(question.answers), "details": details}


def _question(record: Mapping[str, Any], to_prompt: Callable[[str], str]) -> Question:
    return Question(
        record["id"],
        record["text"],
        to_prompt(record["text"]),
        record["target"],
        tuple(record["answers"]),
        record["question_type"],
        record["answer_type"],
        None if record["details"] is None else json.loads(record["details"]),
    )


def _schema(examples: Sequence[Example], key: Mapping[str, Any]) -> Any:
    arrow = _arrow()

    def kind(ids: Iterable[int | str]) -> Any:
        kinds = {type(one) for one in ids}
        if len(kinds) > 1:
            raise InputError("ids that are numbers and ids that are texts cannot be packed together; make them alike")
        return arrow.int64() if kinds == {int} else arrow.string()

    question = [
        ("id", kind(question.id for example in examples for question in example.questions)),
        *((name, arrow.string()) for name in TEXTS),
        ("answers", arrow.list_(arrow.string())),
        ("details", arrow.string()),
    ]
    columns = [
        ("image", arrow.binary()),
        ("image_id", kind(example.image_id for example in examples)),
        ("questions", arrow.list_(arrow.struct(question))),
    ]
    return arrow.schema(columns, metadata={KEY: json.dumps({"format": FORMAT, **key})})


def _write_shard(path: Path, rows: list[dict[str, Any]], schema: Any) -> None:
    table = _arrow().Table.from_pylist(rows, schema=schema)
    _parquet().write_table(table, path, row_group_size=1, compression="none", use_dictionary=False)


def _arrow() -> Any:
    try:
        import pyarrow
    except ImportError:
        raise InputError("packing needs the package pyarrow; install it: pip install 'vlmvqa[hub]'") from None
    return pyarrow


def _parquet() -> Any:
    _arrow()
    from pyarrow import parquet

    return parquet
