"""COCO captions from their official files or in Karpathy's splits, and the official results file.

    root/annotations/captions_train2017.json    images[{id, file_name}], annotations[{image_id, id, caption}]
    root/annotations/dataset_coco.json          images[{filepath, filename, cocoid, split, sentences[{raw, ...}]}]
    root/train2017/000000000009.jpg             the images of 2017 and, as train2014/COCO_train2014_000000000009.jpg,
                                                of 2014, which are Karpathy's too

Both files may also lie in root itself. A caption is asked for without a question: its text is empty, and the prompt
is the same for all.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from vlmvqa.data import submissions
from vlmvqa.data.bad_records import BadRecords
from vlmvqa.data.example import Example, Question
from vlmvqa.data.records import find_problem, group_by_image, list_under, load_json, refuse_missing
from vlmvqa.data.splits import Slice, parse_split
from vlmvqa.errors import InputError, suggest

HAS_QUESTIONS = False  # so the prompt has no place for one

KARPATHY = "dataset_coco.json"
# split: its file
SPLITS = {
    "train2014": "captions_train2014.json",
    "val2014": "captions_val2014.json",
    "train2017": "captions_train2017.json",
    "val2017": "captions_val2017.json",
    "karpathy_train": KARPATHY,
    "karpathy_val": KARPATHY,
    "karpathy_test": KARPATHY,
}
# What a Karpathy split is made of. The 30,504 images of restval, the rest of val2014, are trained on by all who report.
PARTS = {"karpathy_train": ("train", "restval"), "karpathy_val": ("val",), "karpathy_test": ("test",)}
CAPTIONS = ("each", "one")


class Picture(NamedTuple):
    """An image with all its captions."""

    id: int
    path: Path
    captions: tuple[str, ...]


def read(
    root: Path,
    split: str,
    *,
    prompt: str = "caption en\n",
    max_samples: int | None = None,
    bad_records: BadRecords | None = None,
    captions: str | None = None,
) -> list[Example]:
    """The images of a split in file order, with their captions.

    Args:
        split: `train2014`, `val2014`, `train2017`, `val2017`, `karpathy_train` (with restval), `karpathy_val` or
            `karpathy_test`, with an optional slice over the images: `train2017[:10%]`.
        prompt: what the model reads.
        max_samples: take only the first so many images of the slice.
        bad_records: what to do with a record that cannot be used; stop, unless it says otherwise.
        captions: "each": every caption is a question of its own, all of an image's share its row, to train on. "one":
            an image is one question, its id the image's, with all captions as references, to evaluate. None: "each" of
            a training split, "one" of the others.

    Raises:
        InputError: files are missing or cannot be read, or a record cannot be used.
    """
    selected = parse_split(split, SPLITS, "COCO captions", max_samples)
    _refuse_unknown(captions)
    if "{question}" in prompt:
        raise InputError(f"the prompt {prompt!r} has a place for a question, but captions have none; leave it out.")
    bad_records = bad_records or BadRecords()
    path = files(root, split)[0]
    find = _karpathy if selected.name in PARTS else _official
    pictures = find(root, path, selected, bad_records)
    paths = {picture.id: picture.path for picture in pictures}
    questions = ((one.id, Question(one.id, "", prompt, _line(one.captions[0]), one.captions)) for one in pictures)
    examples = group_by_image(questions, paths.__getitem__, path, split, bad_records)
    return arrange(examples, selected.name, captions=captions)


def files(root: Path, split: str, captions: str | None = None) -> list[Path]:
    """The file and the folders that a split is read from: while they stay, so does what `read` returns.

    Raises:
        InputError: one is missing.
    """
    name = parse_split(split, SPLITS, "COCO captions").name
    path = root / "annotations" / SPLITS[name]
    if not path.exists() and (root / SPLITS[name]).exists():
        path = root / SPLITS[name]
    # Karpathy's train split has images of both folders, his others of val2014.
    folders = {"karpathy_train": ("train2014", "val2014"), "karpathy_val": ("val2014",), "karpathy_test": ("val2014",)}
    *others, last = (root / folder for folder in folders.get(name, (name,)))
    refuse_missing(root, [path, *others], last, "COCO captions")
    return [path, *others, last]


def arrange(examples: list[Example], split: str, *, captions: str | None = None) -> list[Example]:
    """Images with one question each, in the form that `captions` names (see `read`).

    Args:
        split: of which "each" is the default where its name has `train` in it.
    """
    _refuse_unknown(captions)
    if (captions or ("each" if "train" in split else "one")) == "one":
        return examples
    return [replace(example, questions=tuple(_each(example.questions))) for example in examples]


def write_submission(path: Path, answers: Mapping[int | str, str]) -> None:
    """Write the official results file, `[{"image_id": 9, "caption": "a cat"}, ...]`, with the captions as they are.

    An id that is the name of an image's file, as in the hub's parquet form, becomes the number in it.
    """
    submissions.write_json(path, [{"image_id": submission_name(key), "caption": text} for key, text in answers.items()])


def _refuse_unknown(captions: str | None) -> None:
    if captions not in (None, *CAPTIONS):
        near = suggest(captions, CAPTIONS)
        raise InputError(f"data.options.captions={captions} is unknown; use one of {', '.join(CAPTIONS)}{near}")


def _each(questions: tuple[Question, ...]) -> Iterator[Question]:
    """A question for each caption."""
    for question in questions:
        for number, caption in enumerate(question.answers):
            target = _line(caption)
            yield replace(question, id=f"{question.id}-{number}", target=target, answers=(target,))


def _line(caption: str) -> str:
    """A caption to train on, without the line breaks and double spaces that some of the files' have."""
    return " ".join(caption.split())


def submission_name(key: int | str) -> int | str:
    """`COCO_val2014_000000391895.jpg` is image 391895."""
    match = re.fullmatch(r"(?:COCO_[a-z]+\d{4}_)?(\d+)\.\w+", key) if isinstance(key, str) else None
    return int(match[1]) if match else submissions.number(key)


# --- the files ----------------------------------------------------------------------------------------


def _official(root: Path, path: Path, selected: Slice, bad_records: BadRecords) -> list[Picture]:
    """The chosen images of a file of 2014 or 2017."""
    description = "COCO's official captions file"
    content = load_json(path)
    images = list_under(content, "images", path, description)
    captions = _captions(list_under(content, "annotations", path, description), path, bad_records)
    kinds = {"id": int, "file_name": str}
    chosen, pictures = set(selected.chosen(len(images), path, "images")), []
    known = set()
    for number, record in _distinct(images, "id", path, bad_records):
        known.add(record["id"])
        problem = find_problem(record, kinds) if number in chosen else None
        if number in chosen and not problem and record["id"] not in captions:
            problem = "no caption describes it"
        if problem:
            bad_records.add(f"{path}, image {record['id']}", problem)
        elif number in chosen:
            picture = root / selected.name / record["file_name"]
            pictures.append(Picture(record["id"], picture, tuple(captions[record["id"]])))
    for image_id in captions:
        if image_id not in known:
            bad_records.add(f"{path}, image {image_id}", "it has captions, but is not among the images")
    return pictures


def _captions(records: list[Any], path: Path, bad_records: BadRecords) -> dict[int, list[str]]:
    """The captions of each image, in file order."""
    captions: dict[int, list[str]] = {}
    for _, record in _distinct(records, "id", path, bad_records, "annotation"):
        problem = find_problem(record, {"image_id": int, "caption": str})
        if not problem and not record["caption"].strip():
            problem = "the caption is empty"
        if problem:
            bad_records.add(f"{path}, annotation {record['id']}", problem)
        else:
            captions.setdefault(record["image_id"], []).append(record["caption"])
    return captions


def _karpathy(root: Path, path: Path, selected: Slice, bad_records: BadRecords) -> list[Picture]:
    """The chosen images of a split of Karpathy and Fei-Fei (2015)."""
    records = list_under(load_json(path, object_hook=_slim), "images", path, "Karpathy's dataset_coco.json")
    parts, of_split = PARTS[selected.name], []
    for _, record in _distinct(records, "cocoid", path, bad_records):
        problem = find_problem(record, {"split": str})
        if problem:
            bad_records.add(f"{path}, image {record['cocoid']}", problem)
        elif record["split"] in parts:
            of_split.append(record)
    pictures = []
    for number in selected.chosen(len(of_split), path, "images"):
        record = of_split[number]
        problem = find_problem(record, {"filepath": str, "filename": str, "sentences": list})
        if not problem and not record["sentences"]:
            problem = "no caption describes it"
        if not problem and not all(isinstance(text, str) and text.strip() for text in record["sentences"]):
            problem = "one of its sentences has no text in 'raw'"
        if problem:
            bad_records.add(f"{path}, image {record['cocoid']}", problem)
        else:
            picture = root / record["filepath"] / record["filename"]
            pictures.append(Picture(record["cocoid"], picture, tuple(record["sentences"])))
    return pictures


def _slim(record: dict[str, Any]) -> Any:
    """A sentence becomes its text while parsing: its tokens take five times as much."""
    return record["raw"] if isinstance(record.get("raw"), str) else record


def _distinct(
    records: list[Any], key: str, path: Path, bad_records: BadRecords, kind: str = "image"
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Number and record of those that have an id of their own."""
    seen = set()
    for number, record in enumerate(records):
        problem = find_problem(record, {key: int})
        if problem:
            bad_records.add(f"{path}, {kind} number {number}", problem)
        elif record[key] in seen:
            bad_records.add(f"{path}, {kind} {record[key]}", f"its {key} is used twice", "keep one of them")
        else:
            seen.add(record[key])
            yield number, record
