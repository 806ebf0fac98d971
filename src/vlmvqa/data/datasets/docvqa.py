"""DocVQA (single page): official files and official results file.

root/train_v1.0_withQT.json    data[{questionId, question, question_types, image, answers[...], ...}]
root/test_v1.0.json            the same without answers
root/documents/xnbl0037_1.png  the image "documents/xnbl0037_1.png"
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from vlmvqa.data import records
from vlmvqa.data.example import Example, Question
from vlmvqa.data.splits import parse_split
from vlmvqa.errors import BadRecords

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
    """Read the questions of a split, grouped by page in order of first appearance.

    The training target is the most frequent answer (the first of equally frequent ones); the question type is the
    first of `question_types`.

    Splits: `train`, `val` and `test`. Arguments and errors: see `datasets/__init__.py`.
    """
    selected = parse_split(split, SPLITS, "DocVQA", max_samples)
    template = records.PromptTemplate(prompt)
    bad_records = bad_records or BadRecords()
    path, _ = files(root, split)
    entries = records.list_under(records.load_json(path), "data", path, "DocVQA's official file")
    find = partial(_find_problem, answered=SPLITS[selected.name][1])
    indices = selected.indices(len(entries), path)
    usable = records.usable_records(entries, "questionId", path, bad_records, find, indices=indices)
    questions = ((record["image"], _question(record, template)) for record in usable)
    return records.group_by_image(questions, lambda image: [root / image], path, split, bad_records)


def files(root: Path, split: str) -> list[Path]:
    """Return the file and the image folder of a split; raise an InputError if one is missing."""
    path = root / SPLITS[parse_split(split, SPLITS, "DocVQA").name][0]
    records.refuse_missing(root, [path], root / "documents", "DocVQA")
    return [path, root / "documents"]


def write_submission(path: Path, answers: Mapping[int | str, str]) -> None:
    """Write the official results file, `[{"questionId": 1, "answer": "$ 5"}, ...]`, with unmodified answers."""
    records.write_json(
        path, [{"questionId": records.numeric_id(key), "answer": answer} for key, answer in answers.items()]
    )


def _find_problem(record: dict[str, Any], answered: bool) -> str | None:
    problem = records.find_question_problem(record, {"image": str})
    if not problem and answered:
        problem = records.find_answers_problem(record)
    if not problem and record.get("question_types") is not None:
        problem = records.find_problem(record, {"question_types": list})
    return problem


def _question(record: Mapping[str, Any], template: records.PromptTemplate) -> Question:
    types = record.get("question_types")
    return Question(
        record["questionId"],
        record["question"],
        template(record["question"]),
        records.most_common(record["answers"]) if record.get("answers") else None,
        tuple(record.get("answers") or ()),
        types[0] if types else None,
    )
