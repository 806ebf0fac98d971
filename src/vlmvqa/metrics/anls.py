"""ANLS, the average normalised Levenshtein similarity of DocVQA, as the challenge's script counts it.

Source: the evaluation script of the Robust Reading Competition's DocVQA tasks (rrc.cvc.uab.es, challenge 17); the
measure is Biten et al., "Scene Text Visual Question Answering", ICCV 2019, section 4.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from vlmvqa.errors import InputError
from vlmvqa.metrics.checks import Id, check_answers


@dataclass(frozen=True, slots=True)
class Anls:
    """ANLS in 0..1: the mean, and each question's."""

    score: float
    per_question: dict[int | str, float]


def anls(
    predictions: Mapping[Id, str],
    references: Mapping[Id, Sequence[str]],
    *,
    threshold: float = 0.5,
    inclusive: bool = True,
) -> Anls:
    """Mean over the questions of the likeness to the nearest reference: 1 - edits / length of the longer string.

    Case and white space are no edits: "A  b" is a perfect answer where "a b" is a reference, and scores 1.

    Args:
        predictions: raw answer of the model by question id.
        references: raw reference answers by question id.
        threshold: in 0..1; a likeness below it counts as 0.
        inclusive: whether a likeness of exactly `threshold` counts. The script says yes; the paper's formula says no.

    Raises:
        InputError: ids differ between the mappings, a question has no reference, or the threshold is out of range.
    """
    from rapidfuzz.distance import Levenshtein  # here, so that measuring a model's speed needs only PyTorch's packages

    if not 0 <= threshold <= 1:
        raise InputError(f"threshold={threshold} is not in 0..1; ANLS is published with 0.5.")
    check_answers(predictions, references)
    scores: dict[int | str, float] = {}
    for question, answers in references.items():
        likeness = _likeness(predictions[question], answers, Levenshtein.distance)
        counts = likeness >= threshold if inclusive else likeness > threshold
        scores[question] = likeness if counts else 0.0
    return Anls(fmean(scores.values()), scores)


def _likeness(prediction: str, answers: Sequence[str], distance: Callable[[str, str], int]) -> float:
    """To the nearest of the `answers`; below 0 only where lower case is longer than upper, as in a Turkish "İ"."""
    cleaned, length = _clean(prediction), len(prediction.upper())
    return 1 - min(
        # The script cleans what it compares and yet divides by the length of what it was given.
        distance(cleaned, _clean(answer)) / (max(length, len(answer.upper())) or 1)
        for answer in answers
    )


def _clean(text: str) -> str:
    return " ".join(text.lower().split())
