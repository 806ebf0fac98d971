"""What was answered where a frequent answer was expected."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

MOST = 12  # answers: a matrix of more cannot be taken in
AT_LEAST = 3  # questions: fewer say nothing about an answer


@dataclass(frozen=True)
class Confusion:
    """Counts of questions: a row an expected answer, a column an answer, the last column all other answers.

    Attributes:
        answers: the expected ones, the most frequent first.
        counts: `int[len(answers), len(answers) + 1]`.
        of: how many questions there are in all.
    """

    answers: tuple[str, ...]
    counts: tuple[tuple[int, ...], ...]
    of: int

    @property
    def shown(self) -> int:
        """How many questions are in it."""
        return sum(map(sum, self.counts))


def confuse(records: Sequence[Mapping[str, Any]], most: int = MOST, at_least: int = AT_LEAST) -> Confusion | None:
    """Of records of `predictions.jsonl`; None where fewer than two answers are expected often enough.

    Answers are compared without regard to case and to white space at their ends.
    """
    pairs = [(expected(record), _folded(record["answer"])) for record in records if record["answers"]]
    frequent = Counter(gold for gold, _ in pairs)
    ordered = sorted(
        (gold for gold in frequent if frequent[gold] >= at_least), key=lambda gold: (-frequent[gold], gold)
    )
    answers = ordered[:most]
    if len(answers) < 2:
        return None
    places = {answer: place for place, answer in enumerate(answers)}
    counts = [[0] * (len(answers) + 1) for _ in answers]
    for gold, given in pairs:
        if gold in places:
            counts[places[gold]][places.get(given, len(answers))] += 1
    return Confusion(tuple(answers), tuple(map(tuple, counts)), len(pairs))


def expected(record: Mapping[str, Any]) -> str:
    """The answer to a question: its target, or the most frequent of its references (of equal ones the first)."""
    target = record["target"]
    return _folded(Counter(record["answers"]).most_common(1)[0][0] if target is None else target)


def _folded(answer: str) -> str:
    return answer.strip().casefold()
