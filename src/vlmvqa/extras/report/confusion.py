"""Confusion matrix of the most frequent expected answers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

MAX_ANSWERS = 12  # rows of a matrix that is still readable
MIN_QUESTIONS = 3  # per expected answer


@dataclass(frozen=True)
class Confusion:
    """Counts of questions by expected answer (rows) and given answer (columns; the last one: any other answer).

    Attributes:
        answers: expected answers, the most frequent first.
        counts: `int[len(answers), len(answers) + 1]`.
        shown: number of questions in the matrix.
        total: number of questions with references.
    """

    answers: tuple[str, ...]
    counts: tuple[tuple[int, ...], ...]
    shown: int
    total: int


def confusion_matrix(records: Sequence[Mapping[str, Any]]) -> Confusion | None:
    """Compute the confusion matrix of records of `predictions.jsonl`; None if fewer than two answers are frequent.

    Answers are compared ignoring case and surrounding white space.
    """
    pairs = Counter((expected(record), _folded(record["answer"])) for record in records if record["answers"])
    frequent: Counter[str] = Counter()
    for (gold, _), count in pairs.items():
        frequent[gold] += count
    ordered = sorted(frequent.items(), key=lambda item: (-item[1], item[0]))
    answers = tuple(gold for gold, count in ordered[:MAX_ANSWERS] if count >= MIN_QUESTIONS)
    if len(answers) < 2:
        return None
    rows = [[pairs[gold, given] for given in answers] for gold in answers]
    counts = tuple((*row, frequent[gold] - sum(row)) for gold, row in zip(answers, rows, strict=True))
    return Confusion(answers, counts, sum(map(sum, counts)), pairs.total())


def expected(record: Mapping[str, Any]) -> str:
    """Return the expected answer: the target, or the most frequent reference (the first one in a tie)."""
    target = record["target"]
    return _folded(Counter(record["answers"]).most_common(1)[0][0] if target is None else target)


def _folded(answer: str) -> str:
    return answer.strip().casefold()
