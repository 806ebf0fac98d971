"""DocVQA (single page) from its official files, and its official results file.

root/train_v1.0_withQT.json    data[{questionId, question, question_types, image, answers[...], ...}]
root/test_v1.0.json            the same without answers
root/documents/xnbl0037_1.png  the image "documents/xnbl0037_1.png"
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping
from pathlib import Path
from typing import Any

from vlmvqa.data import submissions
from vlmvqa.data.bad_records import BadRecords
from vlmvqa.data.example import Example, Question
from vlmvqa.data.records import (
    Prompts,
    find_answers_problem,
    find_problem,
    find_question_problem,
    group_by_image,
    list_under,
    load_json,
    most_common,
    refuse_missing,
)
from vlmvqa.data.splits import parse_split

# split: (file, has answers)
SPLITS = {
    "train": ("train_v1.0_withQT.json", True),
    "val": ("val_v1.0_withQT.json", True),
    "test": ("test_v1.0.json", False),
}


def read(
    root: Path,
    split: str,
    *,
    prompt: str = "{question}\n",
    max_samples: int | None = None,
    bad_records: BadRecords | None = None,
) -> list[Example]:
    """The questions of a split, grouped by page in order of first appearance.

    The training target is the most frequent answer, of equally frequent ones the first; the question type is
    the first of `question_types`.

    Args:
        split: `train`, `val` or `test`, with an optional slice over the questions in file order: `train[:10%]`.
        prompt: what the model reads; `{question}` stands for the question.
        max_samples: take only the first so many questions of the slice.
        bad_records: what to do with a record that cannot be used; stop, unless it says otherwise.

    Raises:
        InputError: files are missing or cannot be read, or a record cannot be used.
    """
    selected = parse_split(split, SPLITS, "DocVQA", max_samples)
    prompts = Prompts(prompt)
    bad_records = bad_records or BadRecords()
    path, _ = files(root, split)
    records = list_under(load_json(path), "data", path, "DocVQA's official file")
    usable = _usable(records, set(selected.chosen(len(records), path)), path, SPLITS[selected.name][1], bad_records)
    questions = ((record["image"], _question(record, prompts)) for record in usable)
    return group_by_image(questions, lambda image: root / image, path, split, bad_records)


def files(root: Path, split: str) -> list[Path]:
    """The file and the folder that a split is read from: while they stay, so does what `read` returns.

    Raises:
        InputError: one is missing.
    """
    path = root / SPLITS[parse_split(split, SPLITS, "DocVQA").name][0]
    refuse_missing(root, [path], root / "documents", "DocVQA")
    return [path, root / "documents"]


def write_submission(path: Path, answers: Mapping[int | str, str]) -> None:
    """Write the official results file, `[{"questionId": 1, "answer": "$ 5"}, ...]`, with the answers as they are."""
    submissions.write_json(
        path, [{"questionId": submissions.number(key), "answer": answer} for key, answer in answers.items()]
    )


def _usable(
    records: list[Any], chosen: Container[int], path: Path, answered: bool, bad_records: BadRecords
) -> Iterator[dict[str, Any]]:
    """The usable ones of the chosen records; ids are looked at over the whole file, whatever the slice."""
    seen: set[int] = set()
    for number, record in enumerate(records):
        problem = find_problem(record, {"questionId": int})
        if problem:
            bad_records.add(f"{path}, question number {number}", problem)
            continue
        where = f"{path}, question {record['questionId']}"
        if record["questionId"] in seen:
            bad_records.add(where, "its questionId is used twice", "keep one of them")
            continue
        seen.add(record["questionId"])
        if number not in chosen:
            continue
        problem = find_question_problem(record, {"image": str})
        if not problem and answered:
            problem = find_answers_problem(record)
        if not problem and record.get("question_types") is not None:
            problem = find_problem(record, {"question_types": list})
        if problem:
            bad_records.add(where, problem)
        else:
            yield record


def _question(record: Mapping[str, Any], prompts: Prompts) -> Question:
    types = record.get("question_types")
    return Question(
        record["questionId"],
        record["question"],
        prompts(record["question"]),
        most_common(record["answers"]) if record.get("answers") else None,
        tuple(record.get("answers") or ()),
        types[0] if types else None,
    )
