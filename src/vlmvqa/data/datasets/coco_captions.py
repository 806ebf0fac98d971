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
from typing import Any

from vlmvqa.data import records
from vlmvqa.data.example import Example, Question
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


# An image's id, path and captions.
CaptionedImage = tuple[int, Path, tuple[str, ...]]


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

    Splits: `train2014`, `val2014`, `train2017`, `val2017`, `karpathy_train` (with restval), `karpathy_val` and
    `karpathy_test`; slices are over the images. Other arguments and errors: see `datasets/__init__.py`.

    Args:
        captions: "each" (for training): each caption is a question, and those of an image share its row. "one" (for
            evaluation): an image is one question, with the image's id and all captions as references. None: "each" for
            training splits, "one" for the others.
    """
    selected = parse_split(split, SPLITS, "COCO captions", max_samples)
    _check_option(captions)
    if "{question}" in prompt:
        raise InputError(f"the prompt {prompt!r} has a {{question}}, but captions have none; leave it out.")
    bad_records = bad_records or BadRecords()
    path = files(root, split)[0]
    load = _load_karpathy if selected.name in PARTS else _load_official
    images = list(load(root, path, selected, bad_records))
    paths = {key: image_path for key, image_path, _ in images}
    questions = ((key, Question(key, "", prompt, _one_line(texts[0]), texts)) for key, _, texts in images)
    examples = records.group_by_image(questions, lambda image_id: [paths[image_id]], path, split, bad_records)
    return arrange(examples, selected.name, captions=captions)


def files(root: Path, split: str, captions: str | None = None) -> list[Path]:
    """Return the file and the image folders of a split; raise an InputError if one is missing."""
    name = parse_split(split, SPLITS, "COCO captions").name
    path = root / "annotations" / SPLITS[name]
    if not path.exists() and (root / SPLITS[name]).exists():
        path = root / SPLITS[name]
    # Karpathy's train split has images of both folders, his other splits only of val2014.
    folders = {"karpathy_train": ("train2014", "val2014"), "karpathy_val": ("val2014",), "karpathy_test": ("val2014",)}
    *others, last = (root / folder for folder in folders.get(name, (name,)))
    records.refuse_missing(root, [path, *others], last, "COCO captions")
    return [path, *others, last]


def arrange(examples: list[Example], split: str, *, captions: str | None = None) -> list[Example]:
    """Convert images with one question, whose answers are the captions, to the form that `captions` selects."""
    _check_option(captions)
    if (captions or ("each" if "train" in split else "one")) == "one":
        return examples
    return [replace(example, questions=tuple(_one_per_caption(example.questions))) for example in examples]


def write_submission(path: Path, answers: Mapping[int | str, str]) -> None:
    """Write the official results file, `[{"image_id": 9, "caption": "a cat"}, ...]`, with unmodified captions."""
    records.write_json(path, [{"image_id": submission_name(key), "caption": text} for key, text in answers.items()])


def submission_name(key: int | str) -> int | str:
    """Return the image id for the results file; a file name as in the hub's parquet form becomes the number in it.

    `COCO_val2014_000000391895.jpg` is image 391895.
    """
    match = re.fullmatch(r"(?:COCO_[a-z]+\d{4}_)?(\d+)\.\w+", key) if isinstance(key, str) else None
    return int(match[1]) if match else records.numeric_id(key)


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


def _load_official(root: Path, path: Path, selected: Slice, bad_records: BadRecords) -> Iterator[CaptionedImage]:
    """Yield the selected images of an official file of 2014 or 2017."""
    description = "COCO's official captions file"
    content = records.load_json(path)
    entries = records.list_under(content, "images", path, description)
    captions: dict[int, list[str]] = {}
    annotations = records.list_under(content, "annotations", path, description)
    for record in records.usable_records(annotations, "id", path, bad_records, _caption_problem, kind="annotation"):
        captions.setdefault(record["image_id"], []).append(record["caption"])

    def find(record: dict[str, Any]) -> str | None:
        problem = records.find_problem(record, {"file_name": str})
        return problem or (None if record["id"] in captions else "it has no caption")

    indices = selected.indices(len(entries), path, "images")
    for record in records.usable_records(entries, "id", path, bad_records, find, indices=indices, kind="image"):
        yield record["id"], root / selected.name / record["file_name"], tuple(captions[record["id"]])
    known = records.ids_of(entries, "id")
    for image_id in captions:
        if image_id not in known:
            bad_records.add(f"{path}, image {image_id}", "it has captions, but is not among the images")


def _caption_problem(record: dict[str, Any]) -> str | None:
    problem = records.find_problem(record, {"image_id": int, "caption": str})
    return problem or (None if record["caption"].strip() else "the caption is empty")


def _load_karpathy(root: Path, path: Path, selected: Slice, bad_records: BadRecords) -> Iterator[CaptionedImage]:
    """Yield the selected images of a split of Karpathy and Fei-Fei (2015)."""
    entries = records.list_under(
        records.load_json(path, object_hook=_keep_text), "images", path, "Karpathy's dataset_coco.json"
    )
    placed = records.usable_records(
        entries, "cocoid", path, bad_records, lambda record: records.find_problem(record, {"split": str}), kind="image"
    )
    in_split = [record for record in placed if record["split"] in PARTS[selected.name]]
    chosen = [in_split[index] for index in selected.indices(len(in_split), path, "images")]
    for record in records.usable_records(chosen, "cocoid", path, bad_records, _sentences_problem, kind="image"):
        yield record["cocoid"], root / record["filepath"] / record["filename"], tuple(record["sentences"])


def _sentences_problem(record: dict[str, Any]) -> str | None:
    problem = records.find_problem(record, {"filepath": str, "filename": str, "sentences": list})
    if not problem and not record["sentences"]:
        problem = "it has no caption"
    if not problem and not all(isinstance(text, str) and text.strip() for text in record["sentences"]):
        problem = "one of its sentences has no text in 'raw'"
    return problem


def _keep_text(record: dict[str, Any]) -> Any:
    """Replace a sentence by its text while parsing; its tokens take five times the memory."""
    return record["raw"] if isinstance(record.get("raw"), str) else record
