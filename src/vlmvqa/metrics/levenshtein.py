"""ANLS, DocVQA's average normalised Levenshtein similarity, equal to the challenge script's.

Source: the evaluation script of the Robust Reading Competition's DocVQA tasks (rrc.cvc.uab.es, challenge 17); the
measure is Biten et al., "Scene Text Visual Question Answering", ICCV 2019, section 4.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from statistics import fmean

from vlmvqa.errors import InputError
from vlmvqa.metrics.registry import Id, MeanScore, Metric, check_answers, mean_scorer


class Anls(MeanScore):
    """ANLS in 0..1: the mean, and the value of each question."""

    __slots__ = ()


def anls(
    predictions: Mapping[Id, str],
    references: Mapping[Id, Sequence[str]],
    *,
    threshold: float = 0.5,
    inclusive: bool = True,
) -> Anls:
    """Compute the mean similarity to the nearest reference: 1 - edits / length of the longer string.

    Case and runs of white space are ignored: "A  b" scores 1 against "a b".

    Args:
        predictions: raw model answer by question id.
        references: raw reference answers by question id.
        threshold: in 0..1; a similarity below it counts as 0.
        inclusive: whether a similarity of exactly `threshold` counts: yes in the script, no in the paper's formula.

    Raises:
        InputError: ids differ between the mappings, a question has no reference, or the threshold is out of range.
    """
    from rapidfuzz.distance import Levenshtein  # local: benchmarking a model's speed needs no metric packages

    if not 0 <= threshold <= 1:
        raise InputError(f"threshold={threshold} is not in 0..1; ANLS is published with 0.5.")
    check_answers(predictions, references)
    scores: dict[int | str, float] = {}
    for question, answers in references.items():
        similarity = _similarity(predictions[question], answers, Levenshtein.distance)
        counts = similarity >= threshold if inclusive else similarity > threshold
        scores[question] = similarity if counts else 0.0
    return Anls(fmean(scores.values()), scores)


def _similarity(prediction: str, answers: Sequence[str], distance: Callable[[str, str], int]) -> float:
    """Return the similarity to the nearest answer; it is negative only if lower case is longer, as for Turkish "İ"."""
    cleaned, length = _clean(prediction), len(prediction.upper())
    return 1 - min(
        # The script compares cleaned strings but divides by the length of the raw ones.
        distance(cleaned, _clean(answer)) / (max(length, len(answer.upper())) or 1)
        for answer in answers
    )


def _clean(text: str) -> str:
    return " ".join(text.lower().split())


ANLS = Metric(
    title="ANLS (x 100)",
    version="anls: the challenge's script, threshold 0.5",
    score=mean_scorer("anls", anls),
    check_options=partial(anls, {0: "a"}, {0: ["a"]}),
    options=("threshold", "inclusive"),
    variants={"inclusive=false": {"inclusive": False}},
)
