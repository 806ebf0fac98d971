"""Calibration of answers: reliability bins and the expected calibration error.

Confidence is the probability of the full answer, exp(log-probability), including its end token; accuracy is the
answer's score as a share of 1. Answers are sorted by confidence into ten bins of equal width. The expected calibration
error is the mean distance between a bin's mean confidence and accuracy, weighted by its number of answers (Naeini et
al., AAAI 2015; Guo et al., "On Calibration of Modern Neural Networks", ICML 2017, section 2).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from vlmvqa.inference.predictor import confidence

BINS = 10


@dataclass(frozen=True)
class Bin:
    """Answers with a confidence in (low, high]; the first bin includes 0.

    Attributes:
        low, high: bounds of the confidence.
        n: number of answers.
        confidence, accuracy: means over the bin; None if it is empty.
    """

    low: float
    high: float
    n: int
    confidence: float | None
    accuracy: float | None


@dataclass(frozen=True)
class Calibration:
    """The bins, the number of answers in them, and the expected calibration error (0 to 1)."""

    bins: tuple[Bin, ...]
    n: int
    error: float


def calibrate(records: Iterable[Mapping[str, Any]], metric: str, bins: int = BINS) -> Calibration | None:
    """Compute the calibration of records of `predictions.jsonl`.

    Args:
        records: answers with their "log_probability" and score.
        metric: name of the score (0 to 100) in the records.
        bins: number of bins.

    Returns:
        The calibration, or None if no record has both a score and a probability.
    """
    known = [
        (confidence(record["log_probability"]), record[metric] / 100)
        for record in records
        if record["log_probability"] is not None and record[metric] is not None
    ]
    if not known:
        return None
    contents: list[list[tuple[float, float]]] = [[] for _ in range(bins)]
    for probability, accuracy in known:
        contents[max(math.ceil(probability * bins) - 1, 0)].append((probability, accuracy))
    gap = sum(abs(sum(a for _, a in content) - sum(c for c, _ in content)) for content in contents)
    return Calibration(
        tuple(_bin(index / bins, (index + 1) / bins, content) for index, content in enumerate(contents)),
        len(known),
        gap / len(known),
    )


def _bin(low: float, high: float, content: list[tuple[float, float]]) -> Bin:
    n = len(content)
    if not n:
        return Bin(low, high, 0, None, None)
    return Bin(low, high, n, sum(c for c, _ in content) / n, sum(a for _, a in content) / n)
