"""VQAv2 from its official files, and its official results file.

    root/v2_OpenEnded_mscoco_train2014_questions.json    questions[{image_id, question, question_id}]
    root/v2_mscoco_train2014_annotations.json            annotations[{question_id, answers[...], ...}]
    root/train2014/COCO_train2014_000000000009.jpg       the image with image_id 9

The training split has 443,757 questions with ten answers each, so the reader keeps every repeated
string once and drops each answer record as soon as it is parsed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from sys import intern
from typing import Any

from vlmvqa.data import submissions
from vlmvqa.data.bad_records import BadRecords
from vlmvqa.data.example import Example, Question
from vlmvqa.data.records import (
    Prompts,
    find_problem,
    find_question_problem,
    group_by_image,
    list_under,
    load_json,
    refuse_missing,
)
from vlmvqa.data.splits import parse_split

# split: (name in the file names, folder of the images, has annotations)
SPLITS = {
    "train": ("train2014", "train2014", True),
    "val": ("val2014", "val2014", True),
    "test": ("test2015", "test2015", False),
    "test-dev": ("test-dev2015", "test2015", False),  # test-dev asks about a part of the test images
}


def read(
    root: Path,
    split: str,
    *,
    prompt: str = "answer en {question}\n",
    max_samples: int | None = None,
    bad_records: BadRecords | None = None,
) -> list[Example]:
    """The questions of a split, grouped by image in order of first appearance.

    Args:
        split: `train`, `val`, `test` or `test-dev`, with an optional slice over the questions in file
            order: `train[:10%]`, `val[100:200]`, `train[10%:20%]`.
        prompt: what the model reads; `{question}` stands for the question.
        max_samples: take only the first so many questions of the slice.
        bad_records: what to do with a record that cannot be used; stop, unless it says otherwise.

    Raises:
        InputError: files are missing or cannot be read, or a record cannot be used.
    """
    selected = parse_split(split, SPLITS, "VQAv2", max_samples)
    _, folder, annotated = SPLITS[selected.name]
    prompts = Prompts(prompt)
    bad_records = bad_records or BadRecords()
    files = _find(root, selected.name)

    annotations = _annotations(files["annotations"], bad_records) if annotated else {}
    records = _load(files["questions"], "questions")
    chosen = selected.chosen(len(records), files["questions"])
    ids = _check_ids(records, annotations, files, bad_records)
    questions = _questions(records, chosen, ids, annotations, files, prompts, bad_records)
    return group_by_image(
        questions,
        lambda image_id: files["images"] / f"COCO_{folder}_{image_id:012d}.jpg",
        files["questions"],
        split,
        bad_records,
    )


def files(root: Path, split: str) -> list[Path]:
    """The files and the folder that a split is read from: while they stay, so does what `read` returns.

    Raises:
        InputError: one is missing.
    """
    return list(_find(root, parse_split(split, SPLITS, "VQAv2").name).values())


def write_submission(path: Path, answers: Mapping[int | str, str]) -> None:
    """Write the official results file, `[{"question_id": 1, "answer": "yes"}, ...]`.

    The answers stay as the model gave them: the official evaluation normalises them itself. Ids that
    became text on their way (keys of a JSON object) become the numbers that it expects again.
    """
    submissions.write_json(
        path, [{"question_id": submissions.number(key), "answer": answer} for key, answer in answers.items()]
    )


# --- the files ----------------------------------------------------------------------------------------


def _find(root: Path, name: str) -> dict[str, Path]:
    """Paths of a split's questions, annotations and images; all of them exist."""
    subset, folder, annotated = SPLITS[name]
    files = {"questions": root / f"v2_OpenEnded_mscoco_{subset}_questions.json"}
    if annotated:
        files["annotations"] = root / f"v2_mscoco_{subset}_annotations.json"
    refuse_missing(root, list(files.values()), root / folder, "VQAv2")
    return {**files, "images": root / folder}


def _load(path: Path, key: str) -> list[Any]:
    """The list under `key` of one of the two JSON files."""
    return list_under(load_json(path, object_hook=_slim), key, path, f"VQAv2's official {key} file")


def _slim(record: dict[str, Any]) -> Any:
    """An annotator's record becomes its answer while parsing: kept, 4.4 million of them take 1.4 GB more."""
    answer = record.get("answer")
    return intern(answer) if isinstance(answer, str) else record


# --- the records --------------------------------------------------------------------------------------

Annotation = tuple[str, tuple[str, ...], str, str]  # target, all answers, question type, answer type


def _annotations(path: Path, bad_records: BadRecords) -> dict[int, Annotation | None]:
    """Annotations by question id; None for one that was left out (so that its question goes silently too)."""
    found: dict[int, Annotation | None] = {}
    once: dict[tuple[str, ...], tuple[str, ...]] = {}
    for number, record in enumerate(_load(path, "annotations")):
        problem = find_problem(record, {"question_id": int})
        if problem:
            bad_records.add(f"{path}, annotation number {number}", problem)
            continue
        key = record["question_id"]
        where = f"{path}, question {key}"
        if key in found:
            bad_records.add(where, "this question_id is annotated twice", "keep one of them")
            continue
        problem = _annotation_problem(record)
        if problem:
            bad_records.add(where, problem)
            found[key] = None
            continue
        answers = tuple(record["answers"])
        found[key] = (
            intern(record["multiple_choice_answer"]),
            once.setdefault(answers, answers),
            intern(record["question_type"]),
            intern(record["answer_type"]),
        )
    return found


def _annotation_problem(record: dict[str, Any]) -> str | None:
    kinds = {"multiple_choice_answer": str, "answers": list, "question_type": str, "answer_type": str}
    problem = find_problem(record, kinds)
    if problem:
        return problem
    if not record["multiple_choice_answer"].strip():
        return "its multiple_choice_answer is empty"
    if not record["answers"]:
        return "its list of answers is empty"
    if not all(isinstance(answer, str) for answer in record["answers"]):
        return "one of its answers has no text in 'answer'"
    return None


def _check_ids(
    records: list[Any],
    annotations: Mapping[int, Annotation | None],
    files: Mapping[str, Path],
    bad_records: BadRecords,
) -> list[int | None]:
    """The id of each question, None where there is none or it is a repetition.

    Over the whole file, whatever the slice: two files that do not belong together must not go
    unnoticed because the first questions happen to fit.
    """
    path = files["questions"]
    ids: list[int | None] = []
    seen: set[int] = set()
    for number, record in enumerate(records):
        ids.append(None)
        problem = find_problem(record, {"question_id": int})
        if problem:
            bad_records.add(f"{path}, question number {number}", problem)
        elif record["question_id"] in seen:
            where = f"{path}, question {record['question_id']}"
            bad_records.add(where, "its question_id is used twice", "keep one of them")
        else:
            ids[-1] = record["question_id"]
            seen.add(record["question_id"])
    for key in annotations:
        if key not in seen:
            where = f"{files['annotations']}, question {key}"
            bad_records.add(where, f"{path.name} has no such question", "use two files of the same split and version")
    return ids


def _questions(
    records: list[Any],
    chosen: Iterable[int],
    ids: list[int | None],
    annotations: Mapping[int, Annotation | None],
    files: Mapping[str, Path],
    prompts: Prompts,
    bad_records: BadRecords,
) -> Iterator[tuple[int, Question]]:
    """Image id and question, for each usable one of the chosen records."""
    for number in chosen:
        record, key = records[number], ids[number]
        if key is None:
            continue
        where = f"{files['questions']}, question {key}"
        problem = find_question_problem(record, {"image_id": int})
        if problem:
            bad_records.add(where, problem)
            continue
        annotation: Annotation | None = None
        if "annotations" in files:
            if key not in annotations:
                name = files["annotations"].name
                bad_records.add(where, f"{name} does not answer it", "use two files of the same split and version")
                continue
            annotation = annotations[key]
            if annotation is None:
                continue
        text = intern(record["question"])
        if annotation is None:
            yield record["image_id"], Question(key, text, prompts(text))
        else:
            yield record["image_id"], Question(key, text, prompts(text), *annotation)
