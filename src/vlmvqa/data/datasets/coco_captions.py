"""COCO captions: official files, Karpathy's splits and the official results file.

    root/annotations/captions_train2017.json    images[{id, file_name}], annotations[{image_id, id, caption}]
    root/annotations/dataset_coco.json          images[{filepath, filename, cocoid, split, sentences[{raw, ...}]}]
    root/train2017/000000000009.jpg             the images of 2017
    root/train2014/COCO_train2014_000000000009.jpg    the images of 2014, which Karpathy's splits use

The JSON files may also be in root itself. Captioning has no question: `Question.text` is empty, and all prompts are
equal.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from vlmvqa.data.example import Example, Question
from vlmvqa.data.records import (
    find_problem,
    group_by_image,
    list_under,
    load_json,
    numeric_id,
    refuse_missing,
    unique_records,
    write_json,
)
from vlmvqa.data.splits import Slice, parse_split
from vlmvqa.errors import BadRecords, InputError, suggest

HAS_QUESTIONS = False  # the prompt has no `{question}`

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
# Values of "split" in Karpathy's file. All published results also train on restval, the other 30,504 images of val2014.
PARTS = {"karpathy_train": ("train", "restval"), "karpathy_val": ("val",), "karpathy_test": ("test",)}
CAPTIONS = ("each", "one")


class CaptionedImage(NamedTuple):
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
    """Read the images of a split in file order, with their captions.

    Args:
        root: the folder of the official files.
        split: `train2014`, `val2014`, `train2017`, `val2017`, `karpathy_train` (with restval), `karpathy_val` or
            `karpathy_test`, with an optional slice over the images: `train2017[:10%]`.
        prompt: the model's input.
        max_samples: limit on the number of images, from the start of the slice.
        bad_records: policy for records that cannot be used (default: stop).
        captions: "each" (for training): each caption is a question, and those of an image share its row. "one" (for
            evaluation): an image is one question, with the image's id and all captions as references. None: "each" for
            training splits, "one" for the others.

    Raises:
        InputError: files are missing or cannot be read, or a record cannot be used.
    """
    selected = parse_split(split, SPLITS, "COCO captions", max_samples)
    _check_option(captions)
    if "{question}" in prompt:
        raise InputError(f"the prompt {prompt!r} has a {{question}}, but captions have none; leave it out.")
    bad_records = bad_records or BadRecords()
    path = files(root, split)[0]
    load = _load_karpathy if selected.name in PARTS else _load_official
    images = load(root, path, selected, bad_records)
    paths = {image.id: image.path for image in images}
    questions = (
        (image.id, Question(image.id, "", prompt, _one_line(image.captions[0]), image.captions)) for image in images
    )
    examples = group_by_image(questions, paths.__getitem__, path, split, bad_records)
    return arrange(examples, selected.name, captions=captions)


def files(root: Path, split: str, captions: str | None = None) -> list[Path]:
    """Return the file and the image folders of a split; while they are unchanged, `read` returns the same.

    Raises:
        InputError: one is missing.
    """
    name = parse_split(split, SPLITS, "COCO captions").name
    path = root / "annotations" / SPLITS[name]
    if not path.exists() and (root / SPLITS[name]).exists():
        path = root / SPLITS[name]
    # Karpathy's train split has images of both folders, his other splits only of val2014.
    folders = {"karpathy_train": ("train2014", "val2014"), "karpathy_val": ("val2014",), "karpathy_test": ("val2014",)}
    *others, last = (root / folder for folder in folders.get(name, (name,)))
    refuse_missing(root, [path, *others], last, "COCO captions")
    return [path, *others, last]


def arrange(examples: list[Example], split: str, *, captions: str | None = None) -> list[Example]:
    """Convert images with one question each to the form that `captions` selects (see `read`).

    Args:
        examples: images with one question, all captions of which are its answers.
        split: the split; the default of `captions` is "each" if its name contains `train`.
        captions: "each", "one" or None.
    """
    _check_option(captions)
    if (captions or ("each" if "train" in split else "one")) == "one":
        return examples
    return [replace(example, questions=tuple(_one_per_caption(example.questions))) for example in examples]


def write_submission(path: Path, answers: Mapping[int | str, str]) -> None:
    """Write the official results file, `[{"image_id": 9, "caption": "a cat"}, ...]`, with unmodified captions."""
    write_json(path, [{"image_id": submission_name(key), "caption": text} for key, text in answers.items()])


def submission_name(key: int | str) -> int | str:
    """Return the image id for the results file; a file name as in the hub's parquet form becomes the number in it.

    `COCO_val2014_000000391895.jpg` is image 391895.
    """
    match = re.fullmatch(r"(?:COCO_[a-z]+\d{4}_)?(\d+)\.\w+", key) if isinstance(key, str) else None
    return int(match[1]) if match else numeric_id(key)


def _check_option(captions: str | None) -> None:
    if captions not in (None, *CAPTIONS):
        near = suggest(captions, CAPTIONS)
        raise InputError(f"data.options.captions={captions} is unknown; use one of {', '.join(CAPTIONS)}{near}")


def _one_per_caption(questions: tuple[Question, ...]) -> Iterator[Question]:
    for question in questions:
        for number, caption in enumerate(question.answers):
            target = _one_line(caption)
            yield replace(question, id=f"{question.id}-{number}", target=target, answers=(target,))


def _one_line(caption: str) -> str:
    """Remove the line breaks and double spaces of some captions."""
    return " ".join(caption.split())


# --- the files ----------------------------------------------------------------------------------------


def _load_official(root: Path, path: Path, selected: Slice, bad_records: BadRecords) -> list[CaptionedImage]:
    """Load the selected images of an official file of 2014 or 2017."""
    description = "COCO's official captions file"
    content = load_json(path)
    records = list_under(content, "images", path, description)
    captions = _captions(list_under(content, "annotations", path, description), path, bad_records)
    indices, images = set(selected.indices(len(records), path, "images")), []
    known = set()
    for number, record in unique_records(records, "id", path, bad_records, "image"):
        image_id = record["id"]
        known.add(image_id)
        if number not in indices:
            continue
        problem = find_problem(record, {"file_name": str})
        if not problem and image_id not in captions:
            problem = "it has no caption"
        if problem:
            bad_records.add(f"{path}, image {image_id}", problem)
        else:
            images.append(
                CaptionedImage(image_id, root / selected.name / record["file_name"], tuple(captions[image_id]))
            )
    for image_id in captions:
        if image_id not in known:
            bad_records.add(f"{path}, image {image_id}", "it has captions, but is not among the images")
    return images


def _captions(records: list[Any], path: Path, bad_records: BadRecords) -> dict[int, list[str]]:
    """Return the captions of each image, in file order."""
    captions: dict[int, list[str]] = {}
    for _, record in unique_records(records, "id", path, bad_records, "annotation"):
        problem = find_problem(record, {"image_id": int, "caption": str})
        if not problem and not record["caption"].strip():
            problem = "the caption is empty"
        if problem:
            bad_records.add(f"{path}, annotation {record['id']}", problem)
        else:
            captions.setdefault(record["image_id"], []).append(record["caption"])
    return captions


def _load_karpathy(root: Path, path: Path, selected: Slice, bad_records: BadRecords) -> list[CaptionedImage]:
    """Load the selected images of a split of Karpathy and Fei-Fei (2015)."""
    records = list_under(load_json(path, object_hook=_keep_text), "images", path, "Karpathy's dataset_coco.json")
    in_split = []
    for _, record in unique_records(records, "cocoid", path, bad_records, "image"):
        problem = find_problem(record, {"split": str})
        if problem:
            bad_records.add(f"{path}, image {record['cocoid']}", problem)
        elif record["split"] in PARTS[selected.name]:
            in_split.append(record)
    images = []
    for index in selected.indices(len(in_split), path, "images"):
        record = in_split[index]
        problem = find_problem(record, {"filepath": str, "filename": str, "sentences": list})
        if not problem and not record["sentences"]:
            problem = "it has no caption"
        if not problem and not all(isinstance(text, str) and text.strip() for text in record["sentences"]):
            problem = "one of its sentences has no text in 'raw'"
        if problem:
            bad_records.add(f"{path}, image {record['cocoid']}", problem)
        else:
            image_path = root / record["filepath"] / record["filename"]
            images.append(CaptionedImage(record["cocoid"], image_path, tuple(record["sentences"])))
    return images


def _keep_text(record: dict[str, Any]) -> Any:
    """Replace a sentence by its text while parsing; its tokens take five times the memory."""
    return record["raw"] if isinstance(record.get("raw"), str) else record
