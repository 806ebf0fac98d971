"""Exact match, and ChartQA's relaxed accuracy, which accepts numbers within 5 %."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from vlmvqa.metrics.registry import AnyId, MeanScore, Metric, mean_over_questions, mean_scorer

TOLERANCE = 0.05


def exact_match(
    predictions: Mapping[AnyId, str], references: Mapping[AnyId, Sequence[str]], *, ignore_case: bool = False
) -> MeanScore:
    """Compute the share of predictions that equal one of their references, ignoring surrounding white space.

    Args:
        ignore_case: whether "Yes" equals "yes".

    Raises:
        InputError: ids differ between the mappings, or a question has no reference.
    """

    def clean(text: str) -> str:
        return text.strip().lower() if ignore_case else text.strip()

    return mean_over_questions(predictions, references, lambda answer, known: float(clean(answer) in map(clean, known)))


def relaxed_accuracy(
    predictions: Mapping[AnyId, str], references: Mapping[AnyId, Sequence[str]], *, tolerance: float = TOLERANCE
) -> MeanScore:
    """Compute the share of predictions that match a reference: numbers within 5 %, text up to case.

    A percentage is converted to its value: "5%" is 0.05, so neither "5" nor "5 percent" matches it. A reference of zero
    is compared as text, because no number is within 5 % of it: "0.0" doesn't match "0". "nan" never matches.

    Source: Masry et al., "ChartQA", ACL 2022 findings, section 5.1, as implemented in Pix2Struct's `metrics.py` and
    lmms-eval.

    Args:
        tolerance: largest difference, relative to the reference.

    Raises:
        InputError: ids differ between the mappings, or a question has no reference.
    """
    return mean_over_questions(
        predictions, references, lambda answer, known: float(any(_relaxed(answer, one, tolerance) for one in known))
    )


def _relaxed(answer: str, reference: str, tolerance: float) -> bool:
    predicted, expected = _number(answer), _number(reference)
    if predicted is not None and expected:
        return abs(predicted - expected) / abs(expected) <= tolerance
    return answer.lower() == reference.lower()


def _number(text: str) -> float | None:
    """Parse a number as Python does; None for other text, "1,000" included."""
    try:
        return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None


EXACT_MATCH = Metric("exact match (%)", "exact_match", mean_scorer("exact_match", exact_match))
RELAXED_ACCURACY = Metric(
    title="relaxed accuracy (%)",
    version="relaxed_accuracy: ChartQA's, 5 % of the number",
    score=mean_scorer("relaxed_accuracy", relaxed_accuracy),
)
