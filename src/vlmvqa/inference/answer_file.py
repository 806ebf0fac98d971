"""Read a file of answers that another program wrote."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from vlmvqa.data.example import Question
from vlmvqa.errors import InputError
from vlmvqa.inference.predictor import Answer
from vlmvqa.metrics.registry import Id

ID_KEYS = ("question_id", "questionId", "image_id", "id")
ANSWER_KEYS = ("answer", "prediction", "caption")


def read_answers(
    path: Path, questions: Sequence[Question], named: Callable[[Id], Id] = lambda name: name, *, others: bool = False
) -> dict[Id, Answer]:
    """Read answers that another program wrote, by question id.

    The file holds JSON lines or one JSON list of records with an id (`question_id`, `questionId`, `image_id` or `id`)
    and an answer (`answer`, `prediction` or `caption`), as the benchmarks' results files do.

    Args:
        named: maps a question's id to its id in the benchmark's results file, where that differs.
        others: whether to skip answers to other questions.

    Raises:
        InputError: the file cannot be read, or it does not answer exactly these questions, each once.
    """
    records = _read_records(path)
    # A key of JSON is text, the data's may be a number.
    ids = {str(name): question.id for question in questions for name in (named(question.id), question.id)}
    found: dict[Id, Answer] = {}
    for number, record in enumerate(records, start=1):
        name = next((record[key] for key in ID_KEYS if key in record), None) if isinstance(record, dict) else None
        answer = next((record[key] for key in ANSWER_KEYS if key in record), None) if name is not None else None
        if not isinstance(answer, str):
            raise InputError(
                f"{path}, record {number}: it should hold one of {', '.join(ID_KEYS)} and, as text, one of "
                f"{', '.join(ANSWER_KEYS)}"
            )
        if str(name) not in ids and others:
            continue
        if str(name) not in ids:
            raise InputError(
                f"{path}, record {number}: the split has no question {name}; score the split or slice it was made for"
            )
        if ids[str(name)] in found:
            raise InputError(f"{path}, record {number}: question {name} is answered twice; keep one answer")
        known = record.get("log_probability")
        if known is not None and not isinstance(known, int | float):
            raise InputError(f"{path}, record {number}: its log_probability is no number; fix it or leave it out")
        found[ids[str(name)]] = Answer(answer, float("nan") if known is None else known)
    missing = [question.id for question in questions if question.id not in found]
    if missing:
        raise InputError(
            f"{path} does not answer {len(missing)} of {len(questions)} questions (question {missing[0]} first); "
            "answer all, or score a slice"
        )
    return found


def _read_records(path: Path) -> list[Any]:
    """Read a JSON list, or one JSON value per line."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise InputError(f"predictions={path} does not exist; correct the path") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"predictions={path} cannot be read as text ({error})") from None
    listed = text.lstrip().startswith("[")
    records: list[Any] = []
    for number, piece in enumerate([text] if listed else text.split("\n"), start=1):
        try:
            if piece.strip():
                records.append(json.loads(piece))
        except json.JSONDecodeError as error:
            place = number + error.lineno - 1
            raise InputError(f"{path}, line {place}: broken JSON ({error.msg}); write a record a line") from None
    return records[0] if listed else records
