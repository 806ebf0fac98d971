"""Split names with slices and random samples."""

from __future__ import annotations

import re

import numpy as np
import pytest

from vlmvqa.data.splits import Slice, parse_split
from vlmvqa.errors import InputError

KNOWN = ("train", "val", "test-dev")


@pytest.mark.parametrize(
    ("split", "expected"),
    [
        ("val", range(10)),
        ("val[:]", range(10)),
        ("val[:3]", range(3)),
        ("val[2:1_0]", range(2, 10)),
        ("val[-3:]", range(7, 10)),
        ("val[:-3]", range(7)),
        ("val[20%:50%]", range(2, 5)),
        ("val[:25%]", range(2)),  # 2.5, rounded to even
        ("val[:12.5%]", range(1)),
        ("test-dev[-10%:]", range(9, 10)),
    ],
)
def test_a_slice_is_numbers_or_percentages_of_what_there_is(split: str, expected: range) -> None:
    assert parse_split(split, KNOWN, "It").indices(10, "file") == expected


def test_parts_by_percentages_share_nothing_and_miss_nothing() -> None:
    for total in (100, 101, 7777):
        parts = [parse_split(f"val[{n}%:{n + 1}%]", KNOWN, "It").indices(total, "file") for n in range(100)]
        assert [number for part in parts for number in part] == list(range(total))


def test_max_samples_takes_the_first_of_the_slice() -> None:
    assert parse_split("val[5:]", KNOWN, "It", 2).indices(10, "file") == range(5, 7)
    assert parse_split("val[5:]", KNOWN, "It", 200).indices(10, "file") == range(5, 10)
    assert parse_split("val[:10%]", KNOWN, "It", 3) == Slice("val[:10%]", "val", None, "10%", 3)


def test_a_draw_is_helms_own() -> None:
    """crfm-helm selects instances with numpy's global state seeded with 0 and `choice` over a list of objects."""
    np.random.seed(0)
    helm = np.random.choice([str(number) for number in range(5000)], 100, replace=False)
    assert parse_split("val[random:100]", KNOWN, "It").indices(5000, "file") == sorted(map(int, helm))
    assert parse_split("val[random:100]", KNOWN, "It", 30).indices(5000, "file") == sorted(map(int, helm[:30]))
    assert parse_split("val[random:10]", KNOWN, "It").indices(10, "file") == list(range(10))


@pytest.mark.parametrize(
    ("split", "sentence"),
    [
        ("vall", r"It has no split 'vall', only train, val, test-dev; did you mean 'val'\?"),
        ("2014", r"It has no split '2014', only train, val, test-dev\.$"),
        (
            "val[3]",
            r"'val\[3\]' is malformed; write it like val\[:10%\], val\[100:200\] or val\[random:1000\]\.",
        ),
        ("val[1:2:3]", "is malformed"),
        ("val [1:2]", "has no split 'val '"),
    ],
)
def test_what_cannot_be_read_is_explained(split: str, sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        parse_split(split, KNOWN, "It")


@pytest.mark.parametrize(("known", "part"), [(["train"], "train"), (["test", "train"], "train"), (["mine"], "mine")])
def test_without_a_split_to_evaluate_on_a_part_of_the_other_is_proposed(known: list[str], part: str) -> None:
    with pytest.raises(InputError) as caught:
        parse_split("val", known, "It")
    found = re.search(r"data.train_split=(\S+) data.eval_split=(\S+)$", str(caught.value))
    assert found and str(caught.value).startswith(f"It has no split 'val', only {', '.join(known)}; ")
    first, rest = (parse_split(split, known, "It").indices(10, "file") for split in found.groups())
    assert (first, rest) == (range(9), range(9, 10)) and found[1].startswith(f"{part}[")


@pytest.mark.parametrize(
    ("split", "sentence"),
    [
        ("val[:11]", r"^file: 'val\[:11\]' reaches beyond its 10 images; choose a smaller slice\.$"),
        ("val[random:11]", r"^file: 'val\[random:11\]' cannot be sampled from its 10 images; choose another number\.$"),
        ("val[5:5]", r"^file: 'val\[5:5\]' selects none of its 10 images; choose a larger slice\.$"),
    ],
)
def test_a_slice_that_does_not_fit_names_the_file_and_what_is_counted(split: str, sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        parse_split(split, KNOWN, "It").indices(10, "file", "images")


def test_no_samples_are_refused() -> None:
    with pytest.raises(InputError, match="max_samples=0 selects nothing"):
        parse_split("val", KNOWN, "It", 0)
