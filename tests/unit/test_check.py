"""Dataset checks count and name missing data."""

from __future__ import annotations

from pathlib import Path

import pytest

from vlmvqa.data.datasets import vqav2
from vlmvqa.data.example import Example
from vlmvqa.errors import BadRecords
from vlmvqa.extras.dataset_tools.check import check, table
from vlmvqa.extras.synthetic import vqav2 as synthetic_vqav2


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return synthetic_vqav2.write(tmp_path / "vqav2", train_images=6, val_images=4, questions_per_image=2)


def check_splits(root: Path, decode_images: bool, **published: dict[str, int]) -> list[str]:
    def read(split: str, bad_records: BadRecords) -> list[Example]:
        return vqav2.read(root, split, bad_records=bad_records)

    splits = {"train": {}, "val": {}, "test": {}} | published
    found = list(check(read, splits, decode_images))
    return [*table(found).splitlines()[1:], *(problem for one in found for problem in one.problems)]


def test_counts_are_compared_with_the_published_ones(root: Path) -> None:
    train, val, test, *problems = check_splits(
        root, False, train={"questions": 443_757, "images": 82_783}, val={"images": 4}
    )
    assert train.split()[2:] == ["443,757", "6", "82,783", "0", "incomplete"]
    assert val.split()[3:] == ["4", "4", "0"] and test.endswith("incomplete")
    (problem,) = problems
    assert "v2_OpenEnded_mscoco_test2015_questions.json" in problem


def test_missing_and_broken_images_are_named(root: Path) -> None:
    first, second, *_ = sorted((root / "train2014").iterdir())
    first.unlink()
    second.write_bytes(second.read_bytes()[:300])
    *_, missing, _ = check_splits(root, False)
    assert first.name in missing
    problems = check_splits(root, True)[3:]
    assert any(first.name in problem for problem in problems) and any(second.name in problem for problem in problems)
