"""Packed splits hold the same questions and image bytes; mismatched or incomplete shards are refused."""

from __future__ import annotations

import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from vlmvqa import fingerprint
from vlmvqa.config.schema import DataSettings
from vlmvqa.data.datasets.docvqa import read as read_docvqa
from vlmvqa.data.datasets.gqa import read as read_gqa
from vlmvqa.data.example import Example
from vlmvqa.data.images import decode
from vlmvqa.errors import BadRecords, InputError
from vlmvqa.extras.shards import shards
from vlmvqa.extras.shards.shards import packing_key
from vlmvqa.extras.synthetic import docvqa as synthetic_docvqa
from vlmvqa.extras.synthetic import gqa as synthetic_gqa

SETTINGS = DataSettings("docvqa", None, prompt="{question}\n", metric="anls")
KEY = packing_key(SETTINGS, "train", None)


@pytest.fixture
def examples(tmp_path: Path) -> list[Example]:
    root = synthetic_docvqa.write(tmp_path / "forms", train_images=7, val_images=2)
    return read_docvqa(root, "train")


def pack(folder: Path, examples: list[Example], key: Any = KEY, **options: Any) -> Path:
    shards.write(folder, key, examples, BadRecords(), **options)
    return folder


def read(folder: Path, split: str = "train", max_samples: int | None = None, **changed: Any) -> list[Example]:
    return shards.read_split(replace(SETTINGS, shards=str(folder), **changed), split, max_samples)


def test_it_reads_what_was_packed(examples: list[Example], tmp_path: Path) -> None:
    folder = pack(tmp_path / "packed", examples, images_per_shard=3)
    assert [path.name for path in sorted(folder.iterdir())] == [f"train-{n:05}-of-00003.parquet" for n in range(3)]
    found = read(folder)
    assert [replace(one, image=b"") for one in found] == [replace(one, image=b"") for one in examples]
    for one, before in zip(found, examples, strict=True):
        assert not isinstance(one.image, bytes | Image.Image) and isinstance(before.image, Path)
        assert one.image.read_bytes() == before.image.read_bytes()
        assert decode(one.image, one.name).tobytes() == decode(before.image, before.name).tobytes()


def test_an_image_is_read_in_another_process(examples: list[Example], tmp_path: Path) -> None:
    """Spawned DataLoader workers receive the examples pickled."""
    found = read(pack(tmp_path / "packed", examples))
    again = pickle.loads(pickle.dumps(found[3]))
    assert again.image.read_bytes() == examples[3].image.read_bytes()  # type: ignore[union-attr]


def test_the_prompt_is_that_of_the_run(examples: list[Example], tmp_path: Path) -> None:
    folder = pack(tmp_path / "packed", examples)
    assert read(folder, prompt="say: {question}")[0].questions[0].prompt == f"say: {examples[0].questions[0].text}"
    pack(folder, examples, {**KEY, "source": "coco_captions"})
    assert read(folder, source="coco_captions", prompt="caption en\n")[0].questions[0].prompt == "caption en\n"


def test_gqas_details_are_kept(tmp_path: Path) -> None:
    root = synthetic_gqa.write(tmp_path / "gqa", train_images=3, val_images=3)
    examples = read_gqa(root, "val")
    folder = pack(tmp_path / "packed", examples, {**KEY, "source": "gqa", "split": "val"})
    found = read(folder, "val", source="gqa", prompt="answer en {question}\n")
    assert [one.questions for one in found] == [one.questions for one in examples]
    assert found[0].questions[0].details


def test_options_of_the_generator_are_not_in_the_key() -> None:
    drawn = DataSettings("docvqa", "x", {"train_images": 7}, synthetic=True, metric="anls")
    assert packing_key(drawn, "train", None) == KEY
    captions = DataSettings("coco_captions", "x", {"captions": "one", "val_images": 3}, synthetic=True, metric="cider")
    assert packing_key(captions, "val2014", None)["options"] == {"captions": "one"}


def test_a_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"does not exist; create them with: .* data=docvqa .*'split=train'"):
        read(tmp_path / "pakced")


def test_two_splits_share_a_folder(examples: list[Example], tmp_path: Path) -> None:
    folder = tmp_path / "packed"
    pack(folder, examples)
    pack(folder, examples[:2], {**KEY, "split": "train[:10%]"})
    assert len(read(folder)) == 7
    assert len(read(folder, "train[:10%]")) == 2
    pack(folder, examples[:4], images_per_shard=1)  # packed again with another shard size: the old shards are deleted
    assert len(read(folder)) == 4


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"split": "val"}, "has no shards of val; create them with"),
        ({"source": "gqa"}, r"packed with other settings \(source docvqa, now gqa\)"),
        ({"max_samples": 5}, r"max_samples None, now 5"),
        ({"options": {"captions": "one"}}, "options"),
    ],
)
def test_other_questions_are_refused(
    examples: list[Example], tmp_path: Path, changed: dict[str, Any], said: str
) -> None:
    folder = pack(tmp_path / "packed", examples)
    with pytest.raises(InputError, match=said):
        read(folder, **changed)


def test_a_lost_or_cut_shard_is_an_error(examples: list[Example], tmp_path: Path) -> None:
    folder = pack(tmp_path / "packed", examples, images_per_shard=3)
    second = folder / "train-00001-of-00003.parquet"
    content = second.read_bytes()
    second.write_bytes(content[: len(content) // 2])
    with pytest.raises(InputError, match=r"train-00001-of-00003\.parquet is not a complete shard"):
        read(folder)
    second.unlink()
    with pytest.raises(InputError, match="has 2 of 3 shards of train; copy the others"):
        read(folder)


def test_another_programs_parquet_is_refused(tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"image": [b""]}), tmp_path / "train-00000-of-00001.parquet")
    with pytest.raises(InputError, match="is not a complete shard"):
        read(tmp_path)


def test_an_unreadable_image_is_skipped_or_an_error(examples: list[Example], tmp_path: Path) -> None:
    assert isinstance(examples[2].image, Path)
    examples[2].image.unlink()
    with pytest.raises(InputError, match="its image cannot be read"):
        pack(tmp_path / "packed", examples)
    assert not list((tmp_path / "packed").glob("*"))  # no partial output
    bad_records = BadRecords("skip")
    assert shards.write(tmp_path / "packed", KEY, examples, bad_records) == 6
    assert len(bad_records.seen) == 1 and len(read(tmp_path / "packed")) == 6


def test_similar_slices_have_different_file_names(examples: list[Example], tmp_path: Path) -> None:
    for split, count in (("train[2:]", 5), ("train[-2:]", 2), ("train[:2]", 2), ("train[:-2]", 5)):
        pack(tmp_path / "packed", examples[:count], {**KEY, "split": split})
    for split, count in (("train[2:]", 5), ("train[-2:]", 2), ("train[:2]", 2), ("train[:-2]", 5)):
        assert len(read(tmp_path / "packed", split)) == count


def test_fingerprints_include_the_bytes_of_packed_images(examples: list[Example], tmp_path: Path) -> None:
    """Cached features and saved answers of other images must not be mistaken for these."""
    found = read(pack(tmp_path / "packed", examples))
    assert fingerprint.image_files(found) == fingerprint.image_files(examples)
    assert fingerprint.image_files(found[1:]) != fingerprint.image_files(examples)
    (tmp_path / "packed" / "train-00000-of-00001.parquet").unlink()
    shards._open.cache_clear()
    assert fingerprint.file_of(found[0].image) is None
