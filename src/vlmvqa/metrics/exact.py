"""Exact match, and the relaxed accuracy of ChartQA, which lets numbers be 5 % off."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from vlmvqa.metrics.checks import Id, check_answers

TOLERANCE = 0.05


@dataclass(frozen=True, slots=True)
class Accuracy:
    """A share in 0..1, and each question's 0 or 1."""

    score: float
    per_question: dict[int | str, float]


def exact_match(
    predictions: Mapping[Id, str], references: Mapping[Id, Sequence[str]], *, ignore_case: bool = False
) -> Accuracy:
    """The share of predictions that equal one of their references, white space at the ends aside.

    Raises:
        InputError: ids differ between the mappings, or a question has no reference.
    """

    def same(answer: str, reference: str) -> bool:
        answer, reference = answer.strip(), reference.strip()
        return answer.lower() == reference.lower() if ignore_case else answer == reference

    return _best(predictions, references, same)


def relaxed_accuracy(
    predictions: Mapping[Id, str], references: Mapping[Id, Sequence[str]], *, tolerance: float = TOLERANCE
) -> Accuracy:
    """The share of predictions that match one of their references: numbers within 5 %, text but for its case.

    A percentage is the number that it means: "5%" is 0.05, so neither "5" nor "5 percent" matches it. Nothing is within
    5 % of zero, and so "0" is compared as text, which "0.0" is not. "nan" never matches.

    Source: Masry et al., "ChartQA", ACL 2022 findings, section 5.1, as Pix2Struct's `metrics.py` counts it, and
    lmms-eval after it.

    Args:
        predictions: raw answer of the model by question id.
        references: raw reference answers by question id.
        tolerance: the largest difference, as a part of the reference.

    Raises:
        InputError: ids differ between the mappings, or a question has no reference.
    """
    return _best(predictions, references, lambda answer, reference: _relaxed(answer, reference, tolerance))


def _relaxed(answer: str, reference: str, tolerance: float) -> bool:
    predicted, expected = _number(answer), _number(reference)
    if predicted is not None and expected:
        return abs(predicted - expected) / abs(expected) <= tolerance
    return answer.lower() == reference.lower()


def _number(text: str) -> float | None:
    """What Python reads as a number, which "1,000" is not."""
    try:
        return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None


def _best(
    predictions: Mapping[Id, str], references: Mapping[Id, Sequence[str]], same: Callable[[str, str], bool]
) -> Accuracy:
    check_answers(predictions, references)
    scores: dict[int | str, float] = {
        question: float(any(same(predictions[question], answer) for answer in answers))
        for question, answers in references.items()
    }
    return Accuracy(fmean(scores.values()), scores)
