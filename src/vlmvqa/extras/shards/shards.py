"""Pack a split into a few large parquet shards, one row per image, and read it back.

    examples --write--> folder/train-00000-of-00083.parquet ... --read--> Examples whose image is read on access

    image       the unchanged bytes of the image file
    image_id    integer or text
    questions   [id, text, target, answers, question_type, answer_type, details (JSON)]

Each row is a row group: loading an image is a single read, and loading images in order reads the files sequentially.
The schema's metadata holds the key of the packed split; reading with another key is an error.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

from PIL.Image import Image

from vlmvqa.data.example import Example, Question
from vlmvqa.data.records import PromptTemplate, refuse_empty
from vlmvqa.errors import BadRecords, InputError
from vlmvqa.ranks import bar

FORMAT = 1
IMAGES_PER_SHARD = 1000  # 160 MB for VQAv2
METADATA_KEY = b"vlmvqa"  # in the schema
TEXTS = ("text", "target", "question_type", "answer_type")


@dataclass(frozen=True, slots=True)
class ShardedImage:
    """An image file in a shard, read on access."""

    shard: Path
    row: int

    def read_bytes(self) -> bytes:
        """Return the bytes of the image file.

        Raises:
            OSError: the shard is missing or damaged.
        """
        table = _open(self.shard, os.getpid()).read_row_group(self.row, columns=["image"])
        content: bytes = table["image"][0].as_py()
        return content


@cache
def _open(shard: Path, process: int) -> Any:
    """Open a shard, once per process."""
    return _parquet().ParquetFile(shard)


def write(
    folder: Path,
    key: Mapping[str, Any],
    examples: Sequence[Example],
    bad_records: BadRecords,
    images_per_shard: int = IMAGES_PER_SHARD,
) -> int:
    """Write all shards of a split or none, replacing existing shards of the split; return the number of images.

    Args:
        key: identifies the examples: source, split, and all options that select them.
        examples: images are files or bytes.
        bad_records: policy for unreadable images; skipped images are not written.

    Raises:
        InputError: the folder cannot be written, or an image is unreadable.
    """
    unfinished, split = folder / f".{uuid.uuid4().hex}", str(key["split"])
    try:
        unfinished.mkdir(parents=True)
        schema = _schema(examples, key)
        shown = bar(examples, doing=f"packing {split}", unit="images")
        rows = _rows(shown, bad_records)
        sizes: list[int] = []
        while shard := list(islice(rows, images_per_shard)):
            _write_shard(unfinished / f"{len(sizes):05}.parquet", shard, schema)
            sizes.append(len(shard))
        if not sizes:
            raise InputError(f"{split}: no image could be read; see the list of bad records")
        _open.cache_clear()
        for old in shard_paths(folder, split):
            old.unlink()
        for number in range(len(sizes)):
            name = f"{_file_name(split)}-{number:05}-of-{len(sizes):05}.parquet"
            (unfinished / f"{number:05}.parquet").replace(folder / name)
        return sum(sizes)
    except OSError as error:
        raise InputError(
            f"{folder} cannot be written ({error.strerror or error}); free space, or choose another folder"
        ) from None
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def read(folder: Path, key: Mapping[str, Any], prompt: str, *, has_questions: bool = True) -> list[Example]:
    """Return the examples of a split in their packed order.

    Args:
        key: identifies the examples; it must equal the key of the packed split.
        prompt: the model's input text; `{question}` is replaced by the question if the source `has_questions`.
        has_questions: False for captions.

    Raises:
        InputError: the folder holds another split, other options, or only some of the shards.
    """
    shards = shard_paths(folder, str(key["split"]))
    if not shards:
        problem = f"has no shards of {key['split']}" if folder.is_dir() else "does not exist"
        raise InputError(f"data.shards={folder} {problem}; create them with: {_command(folder, key)}")
    total = int(shards[0].stem.rpartition("-of-")[2])
    if len(shards) != total:
        raise InputError(f"data.shards={folder} has {len(shards)} of {total} shards of {key['split']}; copy the others")
    to_prompt: Callable[[str], str] = PromptTemplate(prompt) if has_questions else lambda _: prompt
    examples: list[Example] = []
    for shard in shards:
        try:
            file = _open(shard, os.getpid())
            packed = json.loads(file.schema_arrow.metadata[METADATA_KEY])
            rows = file.read(columns=["image_id", "questions"]).to_pylist()
        except (OSError, ValueError, KeyError, TypeError) as error:  # ArrowInvalid is a ValueError
            raise InputError(
                f"{shard} is not a complete shard ({str(error)[:100]}); pack it again: {_command(folder, key)}"
            ) from None
        _check_key(packed, key, folder)
        for number, row in enumerate(rows):
            questions = tuple(_question(record, to_prompt) for record in row["questions"])
            examples.append(Example(ShardedImage(shard, number), row["image_id"], questions))
    return refuse_empty(examples, folder, str(key["split"]))


def shard_paths(folder: Path, split: str) -> list[Path]:
    """Return the shards of a split in order."""
    name = re.compile(re.escape(_file_name(split)) + r"-\d+-of-\d+\.parquet")
    return sorted(path for path in folder.glob("*.parquet") if name.fullmatch(path.name))


def _file_name(split: str) -> str:
    """Return a file name that is valid on any file system: `train[:10%]` -> `train_0_10pc`."""
    return re.sub(r"[^\w.-]+", "_", split.replace("%", "pc").replace("[:", "[0:")).strip("_")


def _command(folder: Path, key: Mapping[str, Any]) -> str:
    """Return the command that packs a split."""
    return f"python launch/prepare.py pack data={key['source']} data.root=... 'split={key['split']}' pack.dir={folder}"


def _check_key(found: Mapping[str, Any], key: Mapping[str, Any], folder: Path) -> None:
    """Raise if the packed split has another key or format."""
    wanted = json.loads(json.dumps({"format": FORMAT, **key}))
    different = [f"{name} {found.get(name)}, now {value}" for name, value in wanted.items() if found.get(name) != value]
    if different:
        raise InputError(
            f"data.shards={folder} was packed with other settings ({', '.join(different)}); use those, or pack "
            f"again: {_command(folder, key)}"
        )


# --- rows ---------------------------------------------------------------------------------------------


def _rows(examples: Iterable[Example], bad_records: BadRecords) -> Iterator[dict[str, Any]]:
    for example in examples:
        image = example.image
        try:
            if isinstance(image, Image):
                raise TypeError(f"{example.name} is an image in memory, not a file")
            content = image if isinstance(image, bytes) else image.read_bytes()
        except OSError as error:
            bad_records.add(example.name, f"its image cannot be read ({error.strerror or error})", "download it again")
            continue
        questions = [_record(question) for question in example.questions]
        yield {"image": content, "image_id": example.image_id, "questions": questions}


def _record(question: Question) -> dict[str, Any]:
    record = {name: getattr(question, name) for name in ("id", *TEXTS)}
    details = None if question.details is None else json.dumps(question.details)
    return {**record, "answers": list(question.answers), "details": details}


def _question(record: Mapping[str, Any], to_prompt: Callable[[str], str]) -> Question:
    details = None if record["details"] is None else json.loads(record["details"])
    prompt = to_prompt(record["text"])
    return Question(**{**record, "prompt": prompt, "answers": tuple(record["answers"]), "details": details})


def _schema(examples: Sequence[Example], key: Mapping[str, Any]) -> Any:
    arrow = _arrow()

    def id_type(ids: Iterable[int | str]) -> Any:
        types = {type(value) for value in ids}
        if len(types) > 1:
            raise InputError("integer ids and text ids cannot be packed together; use one type")
        return arrow.int64() if types == {int} else arrow.string()

    question = [
        ("id", id_type(question.id for example in examples for question in example.questions)),
        *((name, arrow.string()) for name in TEXTS),
        ("answers", arrow.list_(arrow.string())),
        ("details", arrow.string()),
    ]
    columns = [
        ("image", arrow.binary()),
        ("image_id", id_type(example.image_id for example in examples)),
        ("questions", arrow.list_(arrow.struct(question))),
    ]
    return arrow.schema(columns, metadata={METADATA_KEY: json.dumps({"format": FORMAT, **key})})


def _write_shard(path: Path, rows: list[dict[str, Any]], schema: Any) -> None:
    table = _arrow().Table.from_pylist(rows, schema=schema)
    _parquet().write_table(table, path, row_group_size=1, compression="none", use_dictionary=False)


def _arrow() -> Any:
    try:
        import pyarrow
    except ImportError:
        raise InputError("packing needs the package pyarrow; install it with: pip install 'vlmvqa[hub]'") from None
    return pyarrow


def _parquet() -> Any:
    _arrow()
    from pyarrow import parquet

    return parquet
