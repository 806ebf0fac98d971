"""Your own data: a line of JSON for each question.

    root/train.jsonl    {"image": "images/1.jpg", "question": "What is it?", "answers": ["a cat", "cat"], "id": 1}

Paths are relative to the file. `id` is optional, the line's number where there is none; `question_type` too, for tables
and the prior control; so is `answers` in a file that
has them nowhere, a test split. `data.root` may also name one such file: its split is `all`, with slices of it
(`data.train_split=all[:90%] data.eval_split=all[90%:]`).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from vlmvqa.data import submissions
from vlmvqa.data.bad_records import BadRecords
from vlmvqa.data.example import Example, Question
from vlmvqa.data.records import (
    Prompts,
    find_answers_problem,
    find_problem,
    find_question_problem,
    group_by_image,
    most_common,
    unreadable,
)
from vlmvqa.data.splits import Slice, parse_split
from vlmvqa.errors import InputError

WHOLE = "all"  # the split of a single file
LINE = '{"image": "images/1.jpg", "question": "What is it?", "answers": ["a cat"]}'


class Record(NamedTuple):
    """A line's number, its question's id, its content."""

    line: int
    id: int | str
    content: Any


def read(
    root: Path,
    split: str,
    *,
    prompt: str = "answer en {question}\n",
    max_samples: int | None = None,
    bad_records: BadRecords | None = None,
) -> list[Example]:
    """The questions of a file, grouped by image in order of first appearance.

    The training target is the most frequent answer, of equally frequent ones the first. The images may lie anywhere,
    so nothing says cheaply whether they are still there: the file is read anew each time.

    Args:
        root: a folder with a file for each split, or one file.
        split: the file's name without `.jsonl`, or `all` of one file, with an optional slice over the lines:
            `train[:10%]`.
        prompt: what the model reads; `{question}` stands for the question.
        max_samples: take only the first so many questions of the slice.
        bad_records: what to do with a line that cannot be used; stop, unless it says otherwise.

    Raises:
        InputError: the file is missing or cannot be read, or a line cannot be used.
    """
    path, selected = _find(root, split, max_samples)
    prompts = Prompts(prompt)
    bad_records = bad_records or BadRecords()
    records = _load(path, bad_records)
    if not records:
        raise InputError(f"{path} holds no usable line; write one JSON object a line, with image, question and answers")
    chosen = selected.chosen(len(records), path, "lines")
    answered = any(record.content.get("answers") is not None for record in records)
    questions = _questions([records[number] for number in chosen], path, answered, prompts, bad_records)
    lines = {record.id: record.line for record in records}
    return group_by_image(
        questions, lambda image: path.parent / image, path, split, bad_records, lambda key: f"line {lines[key]}"
    )


def write_submission(path: Path, answers: Mapping[int | str, str]) -> None:
    """Write a line of JSON for each answer, `{"id": 1, "answer": "a cat"}`, with the answers as they are."""
    lines = [json.dumps({"id": key, "answer": answer}, ensure_ascii=False) + "\n" for key, answer in answers.items()]
    submissions.replace_file(path, "".join(lines))


def _find(root: Path, split: str, max_samples: int | None) -> tuple[Path, Slice]:
    """The file of a split."""
    if root.is_file():
        _refuse_list(root)
        # Not "train" and "val": both would be the whole file, and the score that of the training questions.
        if split.partition("[")[0] != WHOLE:
            raise InputError(
                f"{root} is one file, whose split is '{WHOLE}', not '{split}'; set data.train_split={WHOLE}[:90%] "
                f"data.eval_split={WHOLE}[90%:], or let data.root name a folder of .jsonl files."
            )
        return root, parse_split(split, [WHOLE], str(root), max_samples)
    if not root.is_dir():
        raise InputError(f"{root} does not exist; let data.root name a folder with train.jsonl, or a .jsonl file.")
    known = sorted(path.stem for path in root.glob("*.jsonl"))
    if not known:
        for path in sorted(root.glob("*.json")):
            _refuse_list(path)
        raise InputError(f"{root} holds no .jsonl file; put train.jsonl there, or set data.root.")
    selected = parse_split(split, known, str(root), max_samples)
    return root / f"{selected.name}.jsonl", selected


def _refuse_list(path: Path) -> None:
    """Stop at a file that is one JSON list, as LLaVA's are."""
    try:
        with path.open("rb") as file:
            start = file.read(1 << 16).removeprefix(b"\xef\xbb\xbf").lstrip()
    except OSError as error:
        raise unreadable(path, error) from None
    if start.startswith(b"["):
        _refuse_format(path, llava=b'"conversations"' in start)


def _refuse_format(where: Path | str, llava: bool) -> NoReturn:
    """Show the form that is read."""
    format = "in LLaVA's format ('conversations'), which is not supported yet" if llava else "a JSON list"
    raise InputError(f"{where} is {format}; write a file of JSON lines, a line for each question: {LINE}")


def _load(path: Path, bad_records: BadRecords) -> list[Record]:
    """The lines in file order, each id once; an empty line is none."""
    _refuse_list(path)
    found: list[Record] = []
    seen: set[int | str] = set()
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise unreadable(path, error) from None
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line.decode("utf-8-sig"))
        except json.JSONDecodeError as error:
            bad_records.add(f"{path}, line {number}, column {error.colno}", f"broken JSON ({error.msg})")
            continue
        except UnicodeDecodeError as error:
            bad_records.add(f"{path}, line {number}", f"byte {error.start} is not UTF-8 text")
            continue
        if isinstance(record, dict) and "conversations" in record and "question" not in record:
            _refuse_format(f"{path}, line {number}", llava=True)
        problem = find_problem(record, {"id": (int, str)} if isinstance(record, dict) and "id" in record else {})
        key = number if problem else record.get("id", number)
        if not problem and key in seen:
            problem = f"the id {key} is used twice"
        if problem:
            bad_records.add(f"{path}, line {number}", problem)
        else:
            seen.add(key)
            found.append(Record(number, key, record))
    return found


def _questions(
    records: list[Record], path: Path, answered: bool, prompts: Prompts, bad_records: BadRecords
) -> Iterator[tuple[str, Question]]:
    """Image and question, for each usable record."""
    for line, key, record in records:
        if isinstance(record, dict) and isinstance(record.get("answers"), str):
            record = {**record, "answers": [record["answers"]]}
        typed = {"question_type": str} if isinstance(record, dict) and "question_type" in record else {}
        problem = find_question_problem(record, {"image": str, **typed})
        if not problem and answered:
            problem = find_answers_problem(record)
        if problem:
            bad_records.add(f"{path}, line {line}", problem)
            continue
        text, answers = record["question"], tuple(record.get("answers") or ())
        target = most_common(answers) if answers else None
        yield record["image"], Question(key, text, prompts(text), target, answers, record.get("question_type"))
