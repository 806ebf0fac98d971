"""Pack a split into a few large parquet shards, one row per image, and read it back.

    examples --write--> folder/train-00000-of-00083.parquet ... --read_split--> Examples whose image is read on access

    image       the unchanged bytes of the image file
    record      JSON: image_id, and the questions with all their fields except the prompt

Each row is a row group: loading an image is a single read, and loading images in order reads the files sequentially.
The schema's metadata holds the key of the packed split; reading with another key is an error.
"""

from __future__ import annotations

import inspect
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from PIL.Image import Image

from vlmvqa.config.schema import DataSettings
from vlmvqa.data.example import Example, Question
from vlmvqa.data.records import PromptTemplate, refuse_empty
from vlmvqa.data.tasks import has_questions
from vlmvqa.errors import BadRecords, InputError
from vlmvqa.extras.hub.parquet import require
from vlmvqa.extras.synthetic.generate import GENERATORS, generator
from vlmvqa.extras.vision.several_images import refuse_several_images
from vlmvqa.ranks import bar

FORMAT = 2
IMAGES_PER_SHARD = 1000  # 160 MB for VQAv2
METADATA_KEY = b"vlmvqa"  # in the schema


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
    return require("pyarrow.parquet", "data.shards").ParquetFile(shard)


def packing_key(settings: DataSettings, split: str, max_samples: int | None) -> dict[str, Any]:
    """Return the description of a split that its shards keep; options of the generator are no part of it."""
    generating = inspect.signature(generator(settings.source)).parameters if settings.source in GENERATORS else ()
    options = {name: value for name, value in settings.options.items() if name not in generating}
    return {"format": FORMAT, "source": settings.source, "split": split, "max_samples": max_samples, "options": options}


def write(
    folder: Path,
    key: Mapping[str, Any],
    examples: Sequence[Example],
    bad_records: BadRecords,
    images_per_shard: int = IMAGES_PER_SHARD,
) -> int:
    """Write all shards of a split or none, replacing existing shards of the split; return the number of images.

    Args:
        key: the `packing_key` of the examples.
        examples: images are files or bytes.
        bad_records: policy for unreadable images; skipped images are not written.

    Raises:
        InputError: the folder cannot be written, or an image is unreadable.
    """
    arrow, parquet = require("pyarrow", "packing"), require("pyarrow.parquet", "packing")
    schema = arrow.schema(
        [("image", arrow.binary()), ("record", arrow.string())], metadata={METADATA_KEY: json.dumps(key)}
    )
    split, starts, written = str(key["split"]), range(0, len(examples), images_per_shard), 0
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with (
            TemporaryDirectory(dir=folder, prefix=".") as unfinished,
            bar(doing=f"packing {split}", unit="images", total=len(examples)) as count,
        ):
            for number, start in enumerate(starts):
                rows = []
                for example in examples[start : start + images_per_shard]:
                    count.update()
                    if (content := image_bytes(example, bad_records)) is not None:
                        rows.append({"image": content, "record": _record(example)})
                written += len(rows)
                path = Path(unfinished, f"{_file_name(split)}-{number:05}-of-{len(starts):05}.parquet")
                table = arrow.Table.from_pylist(rows, schema=schema)
                parquet.write_table(table, path, row_group_size=1, compression="none", use_dictionary=False)
            if not written:
                raise InputError(f"{split}: no image could be read; see the list of bad records")
            _open.cache_clear()
            for old in shard_paths(folder, split):
                old.unlink()
            for path in Path(unfinished).iterdir():
                path.replace(folder / path.name)
    except OSError as error:
        raise InputError(
            f"{folder} cannot be written ({error.strerror or error}); free space, or choose another folder"
        ) from None
    return written


def read_split(settings: DataSettings, split: str, max_samples: int | None) -> list[Example]:
    """Return the examples of a split in the folder `data.shards`, in their packed order.

    Raises:
        InputError: the folder holds another split, other options, or only some of the shards.
    """
    folder, key = Path(str(settings.shards)).expanduser(), packing_key(settings, split, max_samples)
    command = (
        f"python launch/prepare.py pack data={settings.source} data.root=... 'split={split}' pack.dir={settings.shards}"
    )
    shards = shard_paths(folder, split)
    if not shards:
        problem = f"has no shards of {split}" if folder.is_dir() else "does not exist"
        raise InputError(f"data.shards={folder} {problem}; create them with: {command}")
    total = int(shards[0].stem.rpartition("-of-")[2])
    if len(shards) != total:
        raise InputError(f"data.shards={folder} has {len(shards)} of {total} shards of {split}; copy the others")
    prompt = settings.prompt
    to_prompt: Callable[[str], str] = PromptTemplate(prompt) if has_questions(settings.source) else lambda _: prompt
    examples: list[Example] = []
    for shard in shards:
        try:
            file = _open(shard, os.getpid())
            found = json.loads(file.schema_arrow.metadata[METADATA_KEY])
            records = file.read(columns=["record"])["record"].to_pylist() if found["format"] == FORMAT else ()
        except (OSError, ValueError, KeyError, TypeError) as error:  # ArrowInvalid is a ValueError
            raise InputError(
                f"{shard} is not a complete shard ({str(error)[:100]}); pack it again: {command}"
            ) from None
        wanted = json.loads(json.dumps(key))
        changed = [
            f"{name} {found.get(name)}, now {value}" for name, value in wanted.items() if found.get(name) != value
        ]
        if changed:
            raise InputError(
                f"data.shards={folder} was packed with other settings ({', '.join(changed)}); use those, or pack "
                f"again: {command}"
            )
        for row, record in enumerate(map(json.loads, records)):
            questions = tuple(
                Question(**{**fields, "prompt": to_prompt(fields["text"]), "answers": tuple(fields["answers"])})
                for fields in record["questions"]
            )
            examples.append(Example(ShardedImage(shard, row), record["image_id"], questions))
    return refuse_empty(examples, folder, split)


def shard_paths(folder: Path, split: str) -> list[Path]:
    """Return the shards of a split in order."""
    name = re.compile(re.escape(_file_name(split)) + r"-\d+-of-\d+\.parquet")
    return sorted(path for path in folder.glob("*.parquet") if name.fullmatch(path.name))


def _file_name(split: str) -> str:
    """Return a file name that is valid on any file system: `train[:10%]` -> `train_0_10pc`."""
    return re.sub(r"[^\w.-]+", "_", split.replace("%", "pc").replace("[:", "[0:")).strip("_")


def image_bytes(example: Example, bad_records: BadRecords) -> bytes | None:
    """Return the bytes of an image file; None if it cannot be read and is skipped."""
    refuse_several_images([example], "a packed split")
    image = example.image
    assert not isinstance(image, Image), "an image in memory is not a file"
    try:
        return image if isinstance(image, bytes) else image.read_bytes()
    except OSError as error:
        bad_records.add(example.name, f"its image cannot be read ({error.strerror or error})", "download it again")
        return None


def _record(example: Example) -> str:
    questions = [{**asdict(question), "prompt": None} for question in example.questions]
    for question in questions:
        del question["history"]  # of conversations, which are not packed
    return json.dumps({"image_id": example.image_id, "questions": questions})
