"""Disk cache: entries load unchanged or not at all, and no error of the disk stops a run."""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from tests.unit.test_vqav2 import ANNOTATIONS, ASKED, QUESTIONS, annotation, change, save
from vlmvqa.config.schema import DataSettings
from vlmvqa.data import cache as cache_module
from vlmvqa.data.cache import Cache, read_once
from vlmvqa.data.datasets import vqav2
from vlmvqa.data.example import Example, Question
from vlmvqa.data.tasks import read_examples
from vlmvqa.errors import BadRecords, InputError

COLUMNS = {"a": np.arange(5, dtype=np.int32), "b": np.array([True, False]), "empty": np.zeros(0, np.int64)}
KEY = {"split": "val[:10%]", "prompt": "é {question}\n", "max_samples": None}


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(tmp_path / "cache")


def entry(cache: Cache) -> Path:
    assert cache.folder is not None
    (only,) = cache.folder.iterdir()
    return only


def equal(found: Any, expected: dict[str, Any]) -> bool:
    return found is not None and all(
        np.array_equal(found[name], array) and found[name].dtype == array.dtype for name, array in expected.items()
    )


# --- entries ------------------------------------------------------------------------------------------


def test_arrays_are_found_under_their_kind_and_key_alone(cache: Cache) -> None:
    assert cache.load("tokens", KEY) is None
    cache.save("tokens", KEY, COLUMNS)
    assert equal(cache.load("tokens", dict(reversed(KEY.items()))), COLUMNS)
    assert cache.load("examples", KEY) is None
    assert cache.load("tokens", {**KEY, "max_samples": 1}) is None


def test_an_entry_with_a_byte_changed_or_missing_is_not_loaded(cache: Cache) -> None:
    cache.save("tokens", KEY, COLUMNS)
    path = entry(cache)
    content = path.read_bytes()
    for place in range(0, len(content), 7):
        damaged = bytearray(content)
        damaged[place] ^= 0x40
        path.write_bytes(damaged)
        assert cache.load("tokens", KEY) is None
        path.write_bytes(content[:place])
        assert cache.load("tokens", KEY) is None
    cache.save("tokens", KEY, COLUMNS)
    assert equal(cache.load("tokens", KEY), COLUMNS)


def test_entries_of_another_version_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLMVQA_CACHE", str(tmp_path))
    Cache().save("tokens", KEY, COLUMNS)
    assert equal(Cache().load("tokens", KEY), COLUMNS)
    monkeypatch.setattr(cache_module, "VERSION", cache_module.VERSION + 1)
    assert Cache().load("tokens", KEY) is None


def test_without_the_variable_the_cache_is_in_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("VLMVQA_CACHE", "")
    Cache().save("tokens", KEY, COLUMNS)
    assert list((tmp_path / ".cache" / "vlmvqa").rglob("tokens-*"))


def test_a_user_without_a_home_folder_has_no_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_home(path: Path) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("VLMVQA_CACHE")
    monkeypatch.setattr(Path, "expanduser", no_home)
    Cache().save("tokens", KEY, COLUMNS)
    assert Cache().load("tokens", KEY) is None


@contextmanager
def small_disk(size: int) -> Iterator[None]:
    """Limit the size of files, which fails like a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_costs_one_sentence_and_leaves_nothing(cache: Cache, capsys: pytest.CaptureFixture[str]) -> None:
    with small_disk(100):
        for number in range(3):
            cache.save("tokens", number, COLUMNS)
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and f"the cache {cache.folder} cannot be written (File too large)" in said
    assert cache.folder is not None and not list(cache.folder.iterdir())


def test_a_folder_that_cannot_be_made_costs_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    cache = Cache(tmp_path / "file" / "cache")
    cache.save("tokens", KEY, COLUMNS)
    cache.save("tokens", KEY, COLUMNS)
    assert capsys.readouterr().out.count("cannot be written") == 1
    assert cache.load("tokens", KEY) is None


def test_unfinished_entries_of_killed_processes_are_deleted_after_a_day(cache: Cache) -> None:
    assert cache.folder is not None
    cache.folder.mkdir()
    old, new = cache.folder / ".tokens-old", cache.folder / ".tokens-new"
    for path in (old, new):
        path.touch()
    os.utime(old, (time.time() - 100_000,) * 2)
    cache.save("tokens", KEY, COLUMNS)
    assert not old.exists() and new.exists()


def test_the_least_recently_used_entries_are_deleted(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(3):
        cache.save("tokens", number, COLUMNS)
        assert cache.folder is not None
        newest = max(cache.folder.iterdir(), key=lambda path: path.stat().st_mtime_ns)
        os.utime(newest, (time.time() - 1000 + number,) * 2)
    cache.load("tokens", 0)  # the oldest, but just used
    monkeypatch.setattr(cache_module, "MAX_BYTES", int(3.5 * newest.stat().st_size))
    cache.save("tokens", 3, COLUMNS)
    assert [cache.load("tokens", number) is not None for number in range(4)] == [True, False, True, True]


def write_and_read(folder: Path, seed: int) -> None:
    cache = Cache(folder)
    for _ in range(20):
        cache.save("tokens", KEY, {"a": np.full(100_000, seed)})
        found = cache.load("tokens", KEY)
        assert found is not None and len(np.unique(found["a"])) == 1 and len(found["a"]) == 100_000


def test_processes_that_write_one_entry_at_once_read_whole_ones(cache: Cache) -> None:
    assert cache.folder is not None
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=write_and_read, args=(cache.folder, seed)) for seed in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]


# --- the examples of a split --------------------------------------------------------------------------

TEXTS = {9000: "What colour\tis the café? \ud83d", 7000: "Is it 日本? 🐈", 8000: "What is {question}?"}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """VQAv2's files, with unusual characters, empty types and half a surrogate pair."""
    root = tmp_path / "vqav2"
    asked = [(image, key, TEXTS.get(key, text), answer) for image, key, text, answer in ASKED]
    questions = [{"image_id": image, "question_id": key, "question": text} for image, key, text, _ in asked]
    annotations = [annotation(image, key, answer) for image, key, _, answer in asked]
    annotations[1] |= {"question_type": "", "answer_type": ""}
    annotations[2]["answers"] = [{"answer": ""}, {"answer": " Öl"}]
    for folder in ("val2014", "test2015"):
        (root / folder).mkdir(parents=True)
        for image in (7, 8, 9):
            (root / folder / f"COCO_{folder}_{image:012d}.jpg").touch()
    (root / QUESTIONS).write_text(json.dumps({"questions": questions}))  # escaped: half a pair is not UTF-8
    (root / QUESTIONS.replace("val2014", "test2015")).write_text(json.dumps({"questions": questions}))
    save(root / ANNOTATIONS, {"annotations": annotations})
    return root


class Reader:
    """`vqav2.read`, counting its calls."""

    def __init__(self, cache: Cache, root: Path) -> None:
        self.cache, self.root, self.calls = cache, root, 0

    def __call__(self, split: str = "val", bad_records: BadRecords | None = None, **arguments: Any) -> list[Example]:
        bad_records = bad_records or BadRecords()

        def read() -> list[Example]:
            self.calls += 1
            return vqav2.read(self.root, split, bad_records=bad_records, **arguments)

        files = vqav2.files(self.root, split)
        return read_once(read, files, self.root, {"split": split, **arguments}, bad_records, self.cache)


@pytest.fixture
def read(cache: Cache, root: Path) -> Reader:
    return Reader(cache, root)


@pytest.mark.parametrize("split", ["val", "val[1:4]", "test"])
def test_cached_examples_equal_those_that_were_read(read: Reader, split: str) -> None:
    expected = vqav2.read(read.root, split)
    assert read(split) == expected
    assert read(split) == expected
    assert read.calls == 1
    question = expected[0].questions[0]
    assert [type(value) for value in (question.id, question.answers)] == [int, tuple]


def test_all_fields_of_examples_are_cached() -> None:
    """A new field needs a place in the JSON; questions about several images and conversations are not cached."""
    assert [field.name for field in fields(Example)] == ["image", "image_id", "questions", "more_images"]
    names = ["id", "text", "prompt", "target", "answers", "question_type", "answer_type", "details", "history"]
    assert [field.name for field in fields(Question)] == names


def test_equal_strings_and_answers_are_one_object_again(read: Reader) -> None:
    def same(content: Any) -> None:
        content["annotations"][3].update(annotation(7, 7001, "yes"))

    change(read.root / ANNOTATIONS, same)
    read()
    first, second = next(example for example in read() if example.image_id == 7).questions
    assert read.calls == 1
    assert first.answers is not None and first.answers is second.answers
    assert second.target is second.answers[0] and first.target is second.target


def test_a_relative_root_gives_relative_paths(read: Reader, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(read.root.parent)
    read.root = Path(read.root.name)
    assert [read()[0].image, read()[0].image] == [Path("vqav2/val2014/COCO_val2014_000000000009.jpg")] * 2
    assert read.calls == 1


def test_other_arguments_are_other_entries(read: Reader) -> None:
    read()
    assert read(prompt="{question}")[0].questions[0].prompt == TEXTS[9000]
    assert len(read(max_samples=1)) == 1
    assert len(read("val[:40%]")) == 2
    assert read.calls == 4


def rewrite(root: Path) -> None:
    change(root / ANNOTATIONS, lambda content: content["annotations"][0].update(multiple_choice_answer="noir"))


CHANGES: dict[str, Callable[[Path], None]] = {
    "another size": rewrite,
    "another time": lambda root: os.utime(root / QUESTIONS, (1, 1)),
    "another image": lambda root: (root / "val2014" / "new.jpg").touch(),
}


@pytest.mark.parametrize("case", CHANGES)
def test_changed_files_are_read_again(read: Reader, case: str) -> None:
    read()
    CHANGES[case](read.root)
    assert read() == vqav2.read(read.root, "val")
    assert read.calls == 2


def test_a_missing_image_folder_and_file_are_noticed_as_before(read: Reader) -> None:
    read()
    image = read.root / "val2014" / "COCO_val2014_000000000009.jpg"
    image.unlink()
    with pytest.raises(InputError, match=r"009\.jpg is missing"):
        read()
    (read.root / ANNOTATIONS).unlink()
    with pytest.raises(InputError, match=f"has no {ANNOTATIONS}"):
        read()


def test_bad_records_are_listed_every_time(read: Reader) -> None:
    change(read.root / ANNOTATIONS, lambda content: content["annotations"][0].update(multiple_choice_answer=""))
    for _ in range(2):
        bad_records = BadRecords("skip")
        assert sum(len(example.questions) for example in read(bad_records=bad_records)) == 4
        assert len(bad_records.seen) == 1
    bad_records = BadRecords("skip", seen=["a record of another split"])
    read("test", bad_records)
    calls = read.calls
    read("test", bad_records)
    assert read.calls == calls


def test_files_changed_while_they_are_read_are_not_kept(read: Reader, cache: Cache) -> None:
    def read_slowly() -> list[Example]:
        examples = vqav2.read(read.root, "val")
        rewrite(read.root)
        return examples

    read_once(read_slowly, vqav2.files(read.root, "val"), read.root, {}, BadRecords(), cache)
    assert cache.folder is not None and not cache.folder.exists()


def test_a_damaged_entry_is_read_again(read: Reader, cache: Cache) -> None:
    expected = read()
    entry(cache).write_bytes(b"PK")
    assert read() == expected and read() == expected
    assert read.calls == 2


def test_ids_may_be_texts_or_large_numbers(read: Reader, cache: Cache) -> None:
    examples = [
        replace(example, image_id=f"n{number}", questions=tuple(replace(q, id=f"q{q.id}") for q in example.questions))
        if number != 0
        else replace(example, image_id=2**70)
        if number != 1
        else example
        for number, example in enumerate(vqav2.read(read.root, "val"))
    ]
    files = vqav2.files(read.root, "val")
    assert read_once(lambda: examples, files, read.root, {}, BadRecords(), cache) is examples
    assert read_once(list, files, read.root, {}, BadRecords(), cache) == examples


@pytest.mark.parametrize(
    "example",
    [
        Example(b"a picture", 1, ()),
        Example(Path("elsewhere/1.jpg"), 1, ()),
        Example(Path("vqav2/1.jpg"), b"1", ()),  # type: ignore[arg-type]
    ],
)
def test_examples_that_json_cannot_hold_are_read_each_time(read: Reader, cache: Cache, example: Example) -> None:
    files = vqav2.files(read.root, "val")
    for _ in range(2):
        assert read_once(lambda: [example], files, Path("vqav2"), {}, BadRecords(), cache) == [example]
    assert cache.folder is not None and not cache.folder.exists()


# --- as the launch scripts read -----------------------------------------------------------------------


def test_a_launch_script_reads_a_split_once(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = DataSettings("vqav2", str(root))
    expected = read_examples(settings, "val", 3, BadRecords())
    monkeypatch.setattr(vqav2, "read", lambda *_, **__: pytest.fail("read again"))
    assert read_examples(settings, "val", 3, BadRecords()) == expected


def test_the_shapes_are_drawn_and_then_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = DataSettings("shapes", str(tmp_path / "shapes"), {"train_images": 3, "val_images": 2, "image_size": 32})
    expected = read_examples(settings, "train", None, BadRecords())
    monkeypatch.setattr(vqav2, "read", lambda *_, **__: pytest.fail("read again"))
    assert len(expected) == 3 and read_examples(settings, "train", None, BadRecords()) == expected
    with pytest.raises(InputError, match="was generated with other settings"):
        read_examples(replace(settings, options={**settings.options, "seed": 5}), "train", None, BadRecords())


def test_a_source_that_does_not_name_its_files_is_read_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    source, calls = ModuleType("vlmvqa.data.datasets.mine"), []

    def read_mine(root: Path, split: str, *, bad_records: BadRecords, **arguments: Any) -> Iterator[Example]:
        calls.append(arguments)
        yield Example(root / "1.jpg", 1, ())

    vars(source)["read"] = read_mine
    monkeypatch.setitem(sys.modules, "vlmvqa.data.datasets.mine", source)
    settings = DataSettings("mine", "somewhere", {"colour": "red"}, prompt="{question}")
    for _ in range(2):
        assert read_examples(settings, "val", 7, BadRecords()) == [Example(Path("somewhere/1.jpg"), 1, ())]
    assert calls == [{"prompt": "{question}", "max_samples": 7, "colour": "red"}] * 2
