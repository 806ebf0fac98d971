"""BLEU: of single answers, as HELM counts it for VQA, and of a whole set, as sacrebleu does."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import zip_longest
from statistics import fmean

from vlmvqa.errors import InputError
from vlmvqa.metrics.checks import Id, check_answers

# Where a sentence can end inside a text, and so where the words depend on how it is cut into sentences.
_INNER_END = re.compile(r"[.?!](?=.)", re.DOTALL)


@dataclass(frozen=True, slots=True)
class HelmBleu1:
    """BLEU-1 in 0..1: the mean, and each question's."""

    score: float
    per_question: dict[int | str, float]


@dataclass(frozen=True, slots=True)
class CorpusBleu:
    """BLEU in 0..100 of the whole set.

    Attributes:
        score: the geometric mean of `precisions` times `brevity_penalty`.
        precisions: of 1- to 4-grams, in percent.
        brevity_penalty: 1 where predictions are as long as the nearest references.
        signature: how sacrebleu counted it, to be printed beside the score.
    """

    score: float
    precisions: tuple[float, ...]
    brevity_penalty: float
    signature: str


def helm_bleu_1(predictions: Mapping[Id, str], references: Mapping[Id, Sequence[str]]) -> HelmBleu1:
    """HELM's "BLEU" of VQA: the best BLEU-1 of a prediction against each of its references alone, and their mean.

    Case and punctuation count: against "red", "red." has two words and scores 0.5, and "Red" scores 0. A perfect answer
    scores 1, but 0 where it has no words.

    Source: `bleu_1` of crfm-helm 0.5.16's `evaluate_reference_metrics.py`, which is nltk's `sentence_bleu` with weights
    (1, 0, 0, 0) over `word_tokenize`.

    Raises:
        InputError: ids differ between the mappings, a question has no reference, nltk is not installed, or a text
            has several sentences and nltk's sentence model is not there.
    """
    check_answers(predictions, references)
    words = cache(_word_tokenizer())
    scores: dict[int | str, float] = {
        question: max(_bleu_1(words(predictions[question].strip()), words(answer)) for answer in answers)
        for question, answers in references.items()
    }
    return HelmBleu1(fmean(scores.values()), scores)


def _bleu_1(words: Sequence[str], reference: Sequence[str]) -> float:
    """Share of the words that the reference has as often, times the penalty for being shorter than it."""
    if not words:
        return 0.0
    precision = (Counter(words) & Counter(reference)).total() / len(words)
    return precision * math.exp(min(0.0, 1 - len(reference) / len(words)))


def _word_tokenizer() -> Callable[[str], list[str]]:
    """nltk's `word_tokenize`, without its sentence model where the text cannot have two sentences."""
    try:
        from nltk.tokenize import word_tokenize
    except ImportError as error:
        raise InputError("helm_bleu_1 needs nltk; install it with: pip install 'vlmvqa[captions]'") from error

    def tokenize(text: str) -> list[str]:
        try:
            words: list[str] = word_tokenize(text, preserve_line=_INNER_END.search(text.strip()) is None)
        except LookupError:
            raise InputError(
                f"The words of {text!r} depend on nltk's sentence model, which is not installed; fetch it once with: "
                "python -m nltk.downloader punkt_tab"
            ) from None
        return words

    return tokenize


def corpus_bleu(predictions: Mapping[Id, str], references: Mapping[Id, Sequence[str]]) -> CorpusBleu:
    """sacrebleu's BLEU of all predictions together, each against all of its references.

    A perfect answer to every question scores 100, but where all answers are shorter than four words.

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
    # sacrebleu wants the first references of all questions, then the second ones; None where a question has no more.
    found = bleu.corpus_score(
        [predictions[question] for question in references], list(zip_longest(*references.values()))
    )
    return CorpusBleu(found.score, tuple(found.precisions), found.bp, str(bleu.get_signature()))
