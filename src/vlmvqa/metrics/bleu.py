"""BLEU: HELM's BLEU-1 of single answers, and sacrebleu's corpus BLEU."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import zip_longest
from typing import TYPE_CHECKING

from vlmvqa.errors import InputError
from vlmvqa.metrics.registry import (
    Answers,
    AnyId,
    MeanScore,
    Metric,
    Score,
    check_answers,
    mean_over_questions,
    mean_scorer,
    references_by_id,
)

if TYPE_CHECKING:
    from vlmvqa.data.example import Question

# Possible end of a sentence inside a text: only then do the words depend on the sentence splitter.
_INNER_END = re.compile(r"[.?!](?=.)", re.DOTALL)


@dataclass(frozen=True, slots=True)
class CorpusBleu:
    """Corpus BLEU in 0..100.

    Attributes:
        score: geometric mean of `precisions`, times `brevity_penalty`.
        precisions: precision of 1- to 4-grams, in percent.
        brevity_penalty: 1 if the predictions are as long as the nearest references.
        signature: sacrebleu's signature, to be published with the score.
    """

    score: float
    precisions: tuple[float, ...]
    brevity_penalty: float
    signature: str


def helm_bleu_1(predictions: Mapping[AnyId, str], references: Mapping[AnyId, Sequence[str]]) -> MeanScore:
    """Compute HELM's "BLEU" for VQA in 0..1: the mean of each question's highest BLEU-1 against one reference.

    Case and punctuation count: against "red", "red." has two words and scores 0.5, and "Red" scores 0. A perfect answer
    scores 1, or 0 if it has no words.

    Source: `bleu_1` of crfm-helm 0.5.16's `evaluate_reference_metrics.py`, which is nltk's `sentence_bleu` with weights
    (1, 0, 0, 0) over `word_tokenize`.

    Raises:
        InputError: ids differ between the mappings, a question has no reference, nltk is not installed, or a text
            has several sentences and nltk's sentence model is not installed.
    """
    try:
        from nltk.tokenize import word_tokenize
    except ImportError as error:
        raise InputError("helm_bleu_1 needs nltk; install it with: pip install 'vlmvqa[captions]'") from error

    @cache
    def words(text: str) -> list[str]:
        try:  # nltk needs its sentence model only for texts of several sentences
            tokens: list[str] = word_tokenize(text, preserve_line=_INNER_END.search(text.strip()) is None)
        except LookupError:
            raise InputError(
                f"Splitting {text!r} into words needs nltk's sentence model, which is not installed; download it with: "
                "python -m nltk.downloader punkt_tab"
            ) from None
        return tokens

    def score(prediction: str, answers: Sequence[str]) -> float:
        return max(_bleu_1(words(prediction.strip()), words(answer)) for answer in answers)

    return mean_over_questions(predictions, references, score)


def _bleu_1(words: Sequence[str], reference: Sequence[str]) -> float:
    """Return the clipped precision of the words, times the brevity penalty."""
    if not words:
        return 0.0
    precision = (Counter(words) & Counter(reference)).total() / len(words)
    return precision * math.exp(min(0.0, 1 - len(reference) / len(words)))


def corpus_bleu(predictions: Mapping[AnyId, str], references: Mapping[AnyId, Sequence[str]]) -> CorpusBleu:
    """Compute sacrebleu's corpus BLEU of all predictions, each against all of its references.

    Perfect answers score 100, unless all of them have fewer than four words.

    Source: Post, "A Call for Clarity in Reporting BLEU Scores", WMT 2018; sacrebleu's defaults.

    Raises:
        InputError: ids differ between the mappings, a question has no reference, or sacrebleu is not installed.
    """
    check_answers(predictions, references)
    try:
        from sacrebleu.metrics.bleu import BLEU
    except ImportError as error:
        raise InputError("corpus_bleu needs sacrebleu; install it with: pip install 'vlmvqa[captions]'") from error
    bleu = BLEU()
    # sacrebleu takes the first references of all questions, then the second ones; None if a question has no more.
    result = bleu.corpus_score(
        [predictions[question] for question in references], list(zip_longest(*references.values()))
    )
    return CorpusBleu(result.score, tuple(result.precisions), result.bp, str(bleu.get_signature()))


def _score_corpus(questions: Sequence[Question], answers: Answers) -> Score:
    return Score({"corpus_bleu": corpus_bleu(answers, references_by_id(questions)).score})


HELM_BLEU_1 = Metric(
    title="HELM's BLEU-1 (%)",
    version="helm_bleu_1: the best of the references, nltk's words",
    score=mean_scorer("helm_bleu_1", helm_bleu_1),
)
CORPUS_BLEU = Metric(title="corpus BLEU", version="corpus_bleu: sacrebleu's defaults", score=_score_corpus)
