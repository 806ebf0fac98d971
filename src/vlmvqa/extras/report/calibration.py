"""Calibration of answers: reliability bins and the expected calibration error.

Confidence is the probability of the full answer, exp(log-probability), including its end token; accuracy is the
answer's score on a scale of 0 to 1. Answers are sorted by confidence into ten bins of equal width. The expected
calibration error is the mean distance between a bin's mean confidence and accuracy, weighted by its number of answers
(Naeini et al., AAAI 2015; Guo et al., "On Calibration of Modern Neural Networks", ICML 2017, section 2).
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
    """A bin of n answers with confidence in (low, high]; the first bin includes 0. Both means are None if n is 0."""

    low: float
    high: float
    n: int
    confidence: float | None = None
    accuracy: float | None = None


@dataclass(frozen=True)
class Calibration:
    """The bins, the number of answers in all of them, and the expected calibration error (0 to 1)."""

    bins: tuple[Bin, ...]
    n: int
    error: float


def calibrate(records: Iterable[Mapping[str, Any]], metric: str) -> Calibration | None:
    """Return the calibration of records of `predictions.jsonl`; None if no record has both a score and a probability.

    Args:
        metric: name of the score (0 to 100) in the records.
    """
    known = [
        (confidence(record["log_probability"]), record[metric] / 100)
        for record in records
        if record["log_probability"] is not None and record[metric] is not None
    ]
    if not known:
        return None
    bins, distance = [], 0.0
    for index in range(BINS):
        low, high = index / BINS, (index + 1) / BINS
        inside = [pair for pair in known if max(math.ceil(pair[0] * BINS) - 1, 0) == index]
        if not inside:
            bins.append(Bin(low, high, 0))
            continue
        means = [sum(values) / len(inside) for values in zip(*inside, strict=True)]
        bins.append(Bin(low, high, len(inside), *means))
        distance += len(inside) * abs(means[0] - means[1])
    return Calibration(tuple(bins), len(known), distance / len(known))
