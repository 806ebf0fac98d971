"""GQA: official files and official results file.

    root/train_balanced_questions.json    {"02930152": {question, imageId, answer, types, groups, entailed, ...}, ...}
    root/train_all_questions/             the 14 million questions before balancing, in ten such files
    root/images/2354786.jpg               the image with imageId 2354786
    root/val_choices.json                 {"05515938": {"valid": [...], "plausible": [...]}, ...}; optional

Records are reduced while parsing: a training question keeps five of its strings, an evaluation question also the
fields that the metric needs.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from sys import intern
from typing import Any

from vlmvqa.data import records
from vlmvqa.data.example import Example, Question
from vlmvqa.data.splits import parse_split
from vlmvqa.errors import BadRecords, InputError

# split: its part of the file name; the balanced questions are the benchmark
SPLITS = {
    "train": "train_balanced",
    "val": "val_balanced",
    "testdev": "testdev_balanced",
    "train_all": "train_all",
    "val_all": "val_all",
    "testdev_all": "testdev_all",
}
TRAIN_ALL_FILES = 10
KINDS = {"imageId": str, "answer": str, "types": dict}
# Further fields that the official evaluation reads.
DETAILS = {"isBalanced": bool, "types": dict, "groups": dict, "entailed": list, "semantic": list}


def read(
    root: Path,
    split: str,
    *,
    prompt: str = "answer en {question}\n",
    max_samples: int | None = None,
    bad_records: BadRecords | None = None,
) -> list[Example]:
    """Read the questions of a split, grouped by image in order of first appearance.

    `question_type` is the structural type, `answer_type` the semantic one. Outside the training splits `details` holds
    the official record: question, answer, imageId, isBalanced, types, groups, entailed, semantic.

    Splits: `train`, `val`, `testdev` (balanced), `train_all`, `val_all` and `testdev_all`. Arguments and errors: see
    `datasets/__init__.py`.
    """
    selected = parse_split(split, SPLITS, "GQA", max_samples)
    with_details = not selected.name.startswith("train")
    template = records.PromptTemplate(prompt)
    bad_records = bad_records or BadRecords()
    *paths, images = files(root, split)
    where = paths[0] if len(paths) == 1 else paths[0].parent
    entries = _load(paths, with_details, bad_records)
    entries = [entries[index] for index in selected.indices(len(entries), where)]
    questions = _questions(entries, with_details, template, bad_records)
    return records.group_by_image(questions, lambda image_id: [images / f"{image_id}.jpg"], where, split, bad_records)


def files(root: Path, split: str) -> list[Path]:
    """Return the files and the image folder of a split; raise an InputError if one is missing."""
    name = f"{SPLITS[parse_split(split, SPLITS, 'GQA').name]}_questions"
    paths = [root / f"{name}.json"]
    if name == "train_all_questions":
        records.refuse_missing(root, [root / name], root / "images", "GQA")
        paths = [root / name / f"{name}_{number}.json" for number in range(TRAIN_ALL_FILES)]
    records.refuse_missing(root, paths, root / "images", "GQA")
    return [*paths, root / "images"]


def scoring(root: Path, split: str) -> dict[str, Any]:
    """Return the metric's options: the official choices, if their file is in `root`."""
    path = root / f"{parse_split(split, SPLITS, 'GQA').name.removesuffix('_all')}_choices.json"
    return {"choices": records.load_json(path)} if path.exists() else {}


def arrange(examples: list[Example], split: str) -> list[Example]:
    """Convert the details of the hub's parquet form to those of the official files."""
    return [replace(example, questions=tuple(map(_official, example.questions))) for example in examples]


def write_submission(path: Path, answers: Mapping[int | str, str]) -> None:
    """Write the official results file, `[{"questionId": "02930152", "prediction": "yes"}, ...]`.

    The answers are not modified; ids are strings, as in the official questions files.
    """
    records.write_json(path, [{"questionId": str(key), "prediction": text} for key, text in answers.items()])


def _official(question: Question) -> Question:
    """Undo the parquet form: `entailed` is one string, and `datasets` 3 turns `semantic` into an object of lists."""
    if question.details is None:
        return question
    details = dict(question.details)
    if isinstance(details.get("entailed"), str):
        details["entailed"] = re.findall(r"\d+", details["entailed"])
    semantic = details.get("semantic")
    if isinstance(semantic, Mapping):
        details["semantic"] = [dict(zip(semantic, step, strict=True)) for step in zip(*semantic.values(), strict=True)]
    return replace(question, details=details)


# --- the files ----------------------------------------------------------------------------------------


def _reduce(pairs: list[tuple[str, Any]], with_details: bool, repeated: list[str]) -> Any:
    """Reduce the record of a usable question to a tuple while parsing, and collect repeated keys.

    Of equal keys the first counts.
    """
    record = dict(pairs)
    if len(record) < len(pairs):
        record = {}
        for key, value in pairs:
            if record.setdefault(key, value) is not value:
                repeated.append(key)
    if "imageId" not in record or _find_problem(record, with_details):
        return record
    texts = (intern(record[key]) for key in ("imageId", "question", "answer"))
    types = (_interned(record["types"].get(kind)) for kind in ("structural", "semantic"))
    return (*texts, *types, {key: record[key] for key in DETAILS} if with_details else None)


def _interned(value: Any) -> str | None:
    return intern(value) if isinstance(value, str) else None


def _find_problem(record: Any, with_details: bool) -> str | None:
    problem = records.find_question_problem(record, {**KINDS, **DETAILS} if with_details else KINDS)
    return problem or (None if record["answer"].strip() else "its answer is empty")


def _load(paths: Sequence[Path], with_details: bool, bad_records: BadRecords) -> list[tuple[Path, str, Any]]:
    """Return file, id and record of all questions in file order, each id once."""
    entries: list[tuple[Path, str, Any]] = []
    seen: set[str] = set()
    for path in paths:
        repeated: list[str] = []
        content = records.load_json(
            path, object_pairs_hook=partial(_reduce, with_details=with_details, repeated=repeated)
        )
        if not isinstance(content, dict) or not content:
            raise InputError(f"{path} holds no object of questions by id; is it GQA's official questions file?")
        for key in [*(key for key in repeated if key in content), *(key for key in content if key in seen)]:
            bad_records.add(f"{path}, question {key}", "its id is used twice", "keep one of them")
        entries += [(path, key, record) for key, record in content.items() if key not in seen]
        seen.update(content)
    return entries


def _questions(
    entries: Sequence[tuple[Path, str, Any]],
    with_details: bool,
    template: records.PromptTemplate,
    bad_records: BadRecords,
) -> Iterator[tuple[str, Question]]:
    """Yield image id and question of each usable record."""
    for path, key, record in entries:
        if not isinstance(record, tuple):
            bad_records.add(f"{path}, question {key}", _find_problem(record, with_details) or "it cannot be used")
            continue
        image, text, answer, structural, semantic, details = record
        if details:
            details = {"question": text, "answer": answer, "imageId": image, **details}
        yield image, Question(key, text, template(text), answer, (answer,), structural, semantic, details)
