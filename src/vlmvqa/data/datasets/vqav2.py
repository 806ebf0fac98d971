"""VQAv2: official files and official results file.

    root/v2_OpenEnded_mscoco_train2014_questions.json    questions[{image_id, question, question_id}]
    root/v2_mscoco_train2014_annotations.json            annotations[{question_id, answers[...], ...}]
    root/train2014/COCO_train2014_000000000009.jpg       the image with image_id 9

The training split has 443,757 questions with ten answers each, so the reader keeps one copy of every repeated string
and drops each answer record while parsing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from sys import intern
from typing import Any

from vlmvqa.data import records
from vlmvqa.data.example import Example, Question
from vlmvqa.data.splits import Slice, parse_split
from vlmvqa.errors import BadRecords

# split: (name in the file names, folder of the images, has annotations)
SPLITS = {
    "train": ("train2014", "train2014", True),
    "val": ("val2014", "val2014", True),
    "test": ("test2015", "test2015", False),
    "test-dev": ("test-dev2015", "test2015", False),  # questions about some of the test images
}


def read(
    root: Path,
    split: str,
    *,
    prompt: str = "answer en {question}\n",
    max_samples: int | None = None,
    bad_records: BadRecords | None = None,
) -> list[Example]:
    """Read the questions of a split, grouped by image in order of first appearance.

    Splits: `train`, `val`, `test` and `test-dev`. Arguments and errors: see `datasets/__init__.py`.
    """
    selected = parse_split(split, SPLITS, "VQAv2", max_samples)
    template = records.PromptTemplate(prompt)
    bad_records = bad_records or BadRecords()
    path, *annotations, images = files(root, selected.name)
    return records.group_by_image(
        _questions(path, annotations[0] if annotations else None, selected, template, bad_records),
        lambda image_id: [images / f"COCO_{images.name}_{image_id:012d}.jpg"],
        path,
        split,
        bad_records,
    )


def files(root: Path, split: str) -> list[Path]:
    """Return the questions, the annotations and the image folder of a split; raise an InputError if one is missing."""
    subset, folder, annotated = SPLITS[parse_split(split, SPLITS, "VQAv2").name]
    paths = [root / f"v2_OpenEnded_mscoco_{subset}_questions.json"]
    if annotated:
        paths.append(root / f"v2_mscoco_{subset}_annotations.json")
    records.refuse_missing(root, paths, root / folder, "VQAv2")
    return [*paths, root / folder]


def write_submission(path: Path, answers: Mapping[int | str, str]) -> None:
    """Write the official results file, `[{"question_id": 1, "answer": "yes"}, ...]`.

    The answers are not modified: the official evaluation normalises them. Ids that became strings (as keys of a JSON
    object) become numbers again.
    """
    records.write_json(
        path, [{"question_id": records.numeric_id(key), "answer": answer} for key, answer in answers.items()]
    )


# --- the files ----------------------------------------------------------------------------------------


def _load(path: Path, key: str) -> list[Any]:
    """Load the list under `key` of one of the two JSON files."""
    return records.list_under(
        records.load_json(path, object_hook=_keep_answer), key, path, f"VQAv2's official {key} file"
    )


def _keep_answer(record: dict[str, Any]) -> Any:
    """Replace an annotator's record by its answer while parsing; all 4.4 million records would take 1.4 GB more."""
    answer = record.get("answer")
    return intern(answer) if isinstance(answer, str) else record


# --- the records --------------------------------------------------------------------------------------

Annotation = tuple[str, tuple[str, ...], str, str]  # target, all answers, question type, answer type
SAME_SPLIT = "use two files of the same split and version"


def _annotations(path: Path, bad_records: BadRecords) -> dict[int, Annotation | None]:
    """Return annotations by question id; None for a bad one, whose question is then left out without a report."""
    annotations: dict[int, Annotation | None] = {}
    answer_lists: dict[tuple[str, ...], tuple[str, ...]] = {}
    entries = _load(path, "annotations")
    for record in records.usable_records(entries, "question_id", path, bad_records, kind="annotation"):
        key = record["question_id"]
        problem = _annotation_problem(record)
        if problem:
            bad_records.add(f"{path}, question {key}", problem)
            annotations[key] = None
            continue
        answers = tuple(record["answers"])
        annotations[key] = (
            intern(record["multiple_choice_answer"]),
            answer_lists.setdefault(answers, answers),
            intern(record["question_type"]),
            intern(record["answer_type"]),
        )
    return annotations


def _annotation_problem(record: dict[str, Any]) -> str | None:
    kinds = {"multiple_choice_answer": str, "answers": list, "question_type": str, "answer_type": str}
    problem = records.find_problem(record, kinds)
    if problem:
        return problem
    if not record["multiple_choice_answer"].strip():
        return "its multiple_choice_answer is empty"
    if not record["answers"]:
        return "its list of answers is empty"
    if not all(isinstance(answer, str) for answer in record["answers"]):
        return "one of its answers has no text in 'answer'"
    return None


def _questions(
    path: Path, annotated: Path | None, selected: Slice, template: records.PromptTemplate, bad_records: BadRecords
) -> Iterator[tuple[int, Question]]:
    """Yield image id and question of each usable one of the selected records."""
    annotations = _annotations(annotated, bad_records) if annotated else {}
    entries = _load(path, "questions")
    indices = selected.indices(len(entries), path)

    def find(record: dict[str, Any]) -> str | None:
        return records.find_question_problem(record, {"image_id": int})

    for record in records.usable_records(entries, "question_id", path, bad_records, find, indices=indices):
        key, text = record["question_id"], intern(record["question"])
        if annotated and key not in annotations:
            bad_records.add(f"{path}, question {key}", f"{annotated.name} has no annotation for it", SAME_SPLIT)
        elif not annotated or annotations[key] is not None:
            yield record["image_id"], Question(key, text, template(text), *(annotations.get(key) or ()))
    # In the full file: a slice may fit annotations of another split.
    known = records.ids_of(entries, "question_id")
    for key in annotations:
        if key not in known:
            bad_records.add(f"{annotated}, question {key}", f"{path.name} has no such question", SAME_SPLIT)
