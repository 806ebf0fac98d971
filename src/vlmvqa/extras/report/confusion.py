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
        total: number of questions with references.
    """

    answers: tuple[str, ...]
    counts: tuple[tuple[int, ...], ...]
    total: int

    @property
    def shown(self) -> int:
        """Number of questions in the matrix."""
        return sum(map(sum, self.counts))


def confusion_matrix(records: Sequence[Mapping[str, Any]], max_answers: int = MAX_ANSWERS) -> Confusion | None:
    """Compute the confusion matrix of records of `predictions.jsonl`; None if fewer than two answers are frequent.

    Answers are compared ignoring case and surrounding white space.
    """
    pairs = [(expected(record), _folded(record["answer"])) for record in records if record["answers"]]
    frequent = Counter(gold for gold, _ in pairs)
    ordered = sorted(
        (gold for gold in frequent if frequent[gold] >= MIN_QUESTIONS), key=lambda gold: (-frequent[gold], gold)
    )
    answers = ordered[:max_answers]
    if len(answers) < 2:
        return None
    places = {answer: place for place, answer in enumerate(answers)}
    counts = [[0] * (len(answers) + 1) for _ in answers]
    for gold, given in pairs:
        if gold in places:
            counts[places[gold]][places.get(given, len(answers))] += 1
    return Confusion(tuple(answers), tuple(map(tuple, counts)), len(pairs))


def expected(record: Mapping[str, Any]) -> str:
    """Return the expected answer: the target, or the most frequent reference (the first one in a tie)."""
    target = record["target"]
    return _folded(Counter(record["answers"]).most_common(1)[0][0] if target is None else target)


def _folded(answer: str) -> str:
    return answer.strip().casefold()
