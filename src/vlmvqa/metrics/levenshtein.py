"""ANLS, DocVQA's average normalised Levenshtein similarity, equal to the challenge script's.

Source: the evaluation script of the Robust Reading Competition's DocVQA tasks (rrc.cvc.uab.es, challenge 17); the
measure is Biten et al., "Scene Text Visual Question Answering", ICCV 2019, section 4.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

from vlmvqa.errors import InputError
from vlmvqa.metrics.registry import AnyId, MeanScore, Metric, mean_over_questions, mean_scorer


def anls(
    predictions: Mapping[AnyId, str],
    references: Mapping[AnyId, Sequence[str]],
    *,
    threshold: float = 0.5,
    inclusive: bool = True,
) -> MeanScore:
    """Compute the mean similarity in 0..1 to the nearest reference: 1 - edits / length of the longer string.

    Case and runs of white space are ignored: "A  b" scores 1 against "a b".

    Args:
        threshold: in 0..1; a similarity below it counts as 0.
        inclusive: whether a similarity of exactly `threshold` counts: yes in the script, no in the paper's formula.

    Raises:
        InputError: ids differ between the mappings, a question has no reference, or the threshold is out of range.
    """
    from rapidfuzz.distance.Levenshtein import distance  # local: benchmarking a model's speed needs no metric packages

    if not 0 <= threshold <= 1:
        raise InputError(f"threshold={threshold} is not in 0..1; ANLS is published with 0.5.")

    def score(prediction: str, answers: Sequence[str]) -> float:
        cleaned, length = _clean(prediction), len(prediction.upper())
        # The script compares cleaned strings but divides by the length of the raw ones. The similarity is negative only
        # if lower case is longer, as for Turkish "İ".
        similarity = 1 - min(
            distance(cleaned, _clean(answer)) / (max(length, len(answer.upper())) or 1) for answer in answers
        )
        return similarity if similarity > threshold or (inclusive and similarity == threshold) else 0.0

    return mean_over_questions(predictions, references, score)


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
