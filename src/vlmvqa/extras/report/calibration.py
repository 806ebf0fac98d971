"""Whether answers are as often right as the model is sure of them.

Confidence is the probability of the whole answer, exp(log-probability), its end included; accuracy is the answer's
score as a share of 1. Answers are put into ten bins of equal width by confidence, and the expected calibration error is
the mean distance between a bin's confidence and its accuracy, weighted by how many answers lie in it (Naeini et al.,
AAAI 2015; Guo et al., "On Calibration of Modern Neural Networks", ICML 2017, section 2).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

BINS = 10


@dataclass(frozen=True)
class Bin:
    """Answers whose confidence is above `low` and at most `high` (the first bin: 0 included).

    Attributes:
        confidence, accuracy: their means; None where the bin is empty.
    """

    low: float
    high: float
    n: int
    confidence: float | None
    accuracy: float | None


@dataclass(frozen=True)
class Calibration:
    """The bins, how many answers they hold, and the expected calibration error (0 to 1)."""

    bins: tuple[Bin, ...]
    n: int
    error: float


def confidence(log_probability: float | None) -> float:
    """The probability of a whole answer; 0 where none is known, of an answer that another program wrote."""
    return 0.0 if log_probability is None else math.exp(min(log_probability, 0.0))  # above 0 by rounding alone


def calibrate(records: Iterable[Mapping[str, Any]], name: str, bins: int = BINS) -> Calibration | None:
    """Of records of `predictions.jsonl`, by the score `name` (0 to 100); None if none has a score and a probability."""
    known = [
        (confidence(record["log_probability"]), record[name] / 100)
        for record in records
        if record["log_probability"] is not None and record[name] is not None
    ]
    if not known:
        return None
    held: list[list[tuple[float, float]]] = [[] for _ in range(bins)]
    for sure, accuracy in known:
        held[max(math.ceil(sure * bins) - 1, 0)].append((sure, accuracy))
    found = tuple(_bin(number / bins, (number + 1) / bins, one) for number, one in enumerate(held))
    apart = sum(abs(sum(a for _, a in one) - sum(c for c, _ in one)) for one in held)
    return Calibration(found, len(known), apart / len(known))


def _bin(low: float, high: float, held: list[tuple[float, float]]) -> Bin:
    n = len(held)
    if not n:
        return Bin(low, high, 0, None, None)
    return Bin(low, high, n, sum(c for c, _ in held) / n, sum(a for _, a in held) / n)
